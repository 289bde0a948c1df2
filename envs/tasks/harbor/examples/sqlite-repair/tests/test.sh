#!/bin/bash
# Programs of the agent's may have run in the tests: the reward is written last, and to a folder that is empty.
python3 /tests/test_outputs.py
code=$?
rm -rf /logs/verifier/*
if [ $code -eq 0 ]; then echo 1 > /logs/verifier/reward.txt; else echo 0 > /logs/verifier/reward.txt; fi
