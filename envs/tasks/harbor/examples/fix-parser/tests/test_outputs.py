"""Runs the package in a process of its own and compares what it prints: it never sees what is expected."""
import json
import subprocess
import unittest

PROGRAM = """
import json, sys
sys.path.insert(0, "/app")
from durations import seconds
for text in json.loads(sys.argv[1]):
    try:
        print(json.dumps(seconds(text)))
    except ValueError:
        print(json.dumps("ValueError"))
"""
CASES = {"1h 30m": 5400, "45s": 45, "2h5s": 7205, " 10h 2m 3s ": 36123, "120m": 7200, "0s": 0, "99h": 356400,
         "": "ValueError", "   ": "ValueError", "5": "ValueError", "1m 1h": "ValueError", "1h 1h": "ValueError", "-3s": "ValueError",
         "1h x": "ValueError"}


class Durations(unittest.TestCase):
    def test_cases(self):
        run = subprocess.run(["/usr/bin/env", "python3", "-B", "-X", "pycache_prefix=/dev/null/none", "-c", PROGRAM, json.dumps(list(CASES))],
                             capture_output=True, text=True, timeout=20)
        self.assertEqual(run.stdout.split("\n"), [*(json.dumps(value) for value in CASES.values()), ""])


if __name__ == "__main__":
    unittest.main()
