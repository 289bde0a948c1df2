#!/bin/bash
# The parts are the entries of reward.json; "reward" is what counts.
result=$(python3 /tests/parts.py)
rm -rf /logs/verifier/*
printf '%s\n' "$result" > /logs/verifier/reward.json
