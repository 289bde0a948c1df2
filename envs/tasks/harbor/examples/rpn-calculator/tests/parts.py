"""Prints the share of each part that is right, and their mean as "reward"."""
import json
import subprocess

PARTS = {
    "arithmetic": [("3 4 + 2 *", 14), ("10 3 -", 7), ("-7 2 /", -4), ("42", 42), ("2 3 4 + *", 14)],
    "dup": [("5 dup *", 25), ("1 2 dup + +", 5)],
    "errors": [("", None), ("1 2", None), ("+", None), ("1 0 /", None), ("1 x +", None), ("dup", None)],
}


def right(expression, wanted):
    try:
        run = subprocess.run(["/usr/bin/env", "python3", "/app/rpn.py", *expression.split()], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return (run.returncode, run.stdout.strip()) == ((1, "") if wanted is None else (0, str(wanted)))


have_program = subprocess.run(["test", "-f", "/app/rpn.py"]).returncode == 0
worked = have_program and right("42", 42)  # a program that always fails has no error handling to be praised for
shares = {part: sum(right(*case) for case in cases) / len(cases) if worked else 0.0 for part, cases in PARTS.items()}
print(json.dumps({**shares, "reward": sum(shares.values()) / len(shares)}))
