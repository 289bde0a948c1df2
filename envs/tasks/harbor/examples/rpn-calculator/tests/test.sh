#!/bin/bash
# The parts are the entries of reward.json; "reward" is what counts. No process of the agent's is left when it is written.
parts=$(python3 /tests/guard.py python3 /tests/parts.py)
code=$?
if [ $code -ne 0 ]; then kill -9 -1; fi   # something lives on, or killed the guard: end everything, this grading too
rm -rf /logs/verifier/*
printf '%s\n' "$parts" > /logs/verifier/reward.json
