#!/bin/bash
cd /app/logs
grep -H ' ERROR ' *.log | sed 's/\.log:/ /' | sort -k2,2 | awk '!seen[$4]++ { printf "%s\t%s\t", $4, $1; for (i = 5; i < NF; i++) printf "%s ", $i; print $NF }' > /app/failures.txt
