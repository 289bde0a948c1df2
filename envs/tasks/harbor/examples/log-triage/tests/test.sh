#!/bin/bash
printf 'r1\torders\tno such order\nr3\tstore\tdisk full\nr4\torders\tlock lost\n' > /tmp/wanted
if [ -f /app/failures.txt ] && [ ! -L /app/failures.txt ] && cmp -s /app/failures.txt /tmp/wanted; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
