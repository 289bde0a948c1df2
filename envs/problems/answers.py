r"""Answers compared by value: 1/2, 0.5, \\frac{1}{2} and 50% are one number.

The arithmetic is exact, and nothing of the untrusted text is evaluated. The answer is the first of
these that the text has: the last \\boxed{...}; the last <answer>...</answer>; the whole text if it
is short.
"""

from __future__ import annotations

import re
from fractions import Fraction

from envs.gem import read_turn

MAX_CHARS = 200  # length of an answer; no value here needs more
# Its arguments are groups in braces, or single digits as in \frac12.
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_SPACE = re.compile(r"\\[;: ]|~")
_NAME = re.compile(r"^[\s(]*([a-zA-Z])\s*=\s*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# Two numbers side by side: a product, a mixed number or a list.
_ADJACENT = re.compile(r"[0-9.]\s*[\s(]+[0-9.]|\)\s*[0-9.(]")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))")

Value = tuple[Fraction, ...]


def final_answer(text: str) -> str | None:
    """Return the answer that a turn says, or None where it says none. Takes linear time."""
    text = read_turn(text).spoken
    start = text.rfind("\\boxed{")
    if start >= 0:
        return _braced(text, start + len("\\boxed"))
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    return text.strip() if 0 < len(text.strip()) <= MAX_CHARS else None


def _braced(text: str, start: int) -> str | None:
    """Return the text between the brace at `start` and its counterpart."""
    depth = 0
    for place in range(start, min(len(text), start + 4 * MAX_CHARS)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place].strip()
    return None


def read_value(text: str) -> Value | None:
    """Return the number that a text means, or several as in (2, -1/3); None for anything else.

    "x = 3" is 3, and both "x = 1, y = 2" and "y = 2, x = 1" are (1, 2).
    """
    if len(text) > MAX_CHARS:
        return None
    text = _SPACE.sub(" ", text).replace("{,}", ",")
    for mark in ("\\$", "$", "\\left", "\\right", "\\,", "\\!"):
        text = text.replace(mark, "")
    text = text.replace("\\%", "%").replace("\u2212", "-").strip().rstrip(".")
    text = _FRAC.sub(_divided, text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if _ADJACENT.search(text):
        return None
    inner = text
    if text.startswith("(") and text.endswith(")") and "," in text:
        inner = text[1:-1]
    elif ", " not in text:
        inner = _THOUSANDS.sub("", text)
    numbers = []
    names = []
    for part in inner.split(","):
        number = _read_number(part)
        if number is None:
            return None
        numbers.append(number)
        name = _NAME.match(part)
        names.append(name[1] if name else "")
    if all(names) and len(set(names)) == len(names):
        numbers = [number for _, number in sorted(zip(names, numbers, strict=True))]
    return tuple(numbers)


def _divided(fraction: re.Match[str]) -> str:
    """Write a \\frac as a division."""
    over, under = (
        _THOUSANDS.sub("", (fraction[group] or fraction[group + 1] or "").strip())
        for group in (1, 3)
    )
    return f"(({over})/({under}))"


def _read_number(text: str) -> Fraction | None:
    """Return the value of a number, a fraction or a percentage, perhaps with a name as "x = "."""
    text = _NAME.sub("", text).replace("(", "").replace(")", "").strip()
    parts = [part.strip() for part in text.rstrip("%").strip().split("/")]
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    value = Fraction(parts[0])
    if len(parts) == 2:
        denominator = Fraction(parts[1])
        if denominator == 0:
            return None
        value /= denominator
    return value / 100 if text.endswith("%") else value


def is_correct(text: str, truth: Value) -> bool:
    """Return whether the text's answer has exactly this value."""
    answer = final_answer(text)
    return answer is not None and read_value(answer) == truth


def written(truth: Value) -> str:
    """Write a value as an answer."""
    return str(truth[0]) if len(truth) == 1 else f"({', '.join(map(str, truth))})"
