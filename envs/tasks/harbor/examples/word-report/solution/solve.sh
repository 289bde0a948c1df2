#!/bin/bash
cd /app
cat letters/*.txt | tr 'A-Z' 'a-z' | grep -oE '[a-z]+' | sort | uniq -c | sort -k1,1nr -k2,2 | awk '{print $2, $1}' > report.txt
