#!/bin/bash
wanted=$(printf 'item,stock,least\nlamp,7,5\ncup,9,4\nrope,2,1\nbell,2,2\nhat,7,1')
if [ -f /app/inventory.csv ] && [ "$(< /app/inventory.csv)" = "$wanted" ]; then echo 1.0 > /logs/verifier/reward.txt; else echo 0.0 > /logs/verifier/reward.txt; fi
