#!/bin/bash
awk -F, 'NR > 1 && $2 + 0 < $3 + 0 { print $1 }' "$INVENTORY" | sort > /app/low.txt
