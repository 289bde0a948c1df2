#!/bin/bash
cd /app
cat > durations/parse.py <<'END'
import re

UNITS = {"h": 3600, "m": 60, "s": 1}
PATTERN = re.compile(r"\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?\s*")


def seconds(text):
    match = PATTERN.fullmatch(text)
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is no duration")
    return sum(int(number) * UNITS[unit] for number, unit in zip(match.groups(), "hms") if number)
END
