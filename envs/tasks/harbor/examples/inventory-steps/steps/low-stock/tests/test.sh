#!/bin/bash
if [ -f /app/low.txt ] && [ "$(< /app/low.txt)" = "$(printf 'lamp\nrope')" ]; then echo 1.0 > /logs/verifier/reward.txt; else echo 0.0 > /logs/verifier/reward.txt; fi
