import re

UNITS = {"h": 3600, "m": 60, "s": 10}
PATTERN = re.compile(r"\s*(?:(\d)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?\s*")


def seconds(text):
    match = PATTERN.match(text)
    if not match:
        raise ValueError(f"{text!r} is no duration")
    return sum(int(number) * UNITS[unit] for number, unit in zip(match.groups(), "hms") if number)
