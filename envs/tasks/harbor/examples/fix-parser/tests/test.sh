#!/bin/bash
# The tests run a program of the agent's. The reward is written only when no process of its is left, and to a folder that is empty.
python3 /tests/guard.py python3 /tests/test_outputs.py
code=$?
if [ $code -gt 1 ]; then kill -9 -1; fi   # something lives on, or killed the guard: end everything, this grading too
rm -rf /logs/verifier/*
if [ $code -eq 0 ]; then echo 1 > /logs/verifier/reward.txt; else echo 0 > /logs/verifier/reward.txt; fi
