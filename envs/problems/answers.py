"""Answers compared by value: 1/2, 0.5, \\frac{1}{2} and 50% are one number.

Exact arithmetic on untrusted text; nothing is evaluated.

Read, in this order: the last \\boxed{...}; the last <answer>...</answer>; the whole text where it
is short.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200  # of an answer; no value here needs more
_FRAC = re.compile(r"\\[dt]?frac\{?([^{}]*)\}?\{([^{}]*)\}")
_NAME = re.compile(r"^\s*[a-zA-Z]\s*=\s*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))")

Value = tuple[Fraction, ...]


def final_answer(text: str) -> str | None:
    """What the text gives as its answer; None where it gives none. Takes linear time."""
    text = text.rsplit("</think>", 1)[-1]
    start = text.rfind("\\boxed{")
    if start >= 0:
        return _braced(text, start + len("\\boxed"))
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    return text.strip() if 0 < len(text.strip()) <= MAX_CHARS else None


def _braced(text: str, start: int) -> str | None:
    depth = 0
    for place in range(start, min(len(text), start + 4 * MAX_CHARS)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place].strip()
    return None


def read_value(text: str) -> Value | None:
    """A number, or several with commas between them as (2, -1/3); None for anything else.

    "x = 3" is 3, "x = 1, y = 2" is (1, 2).
    """
    if len(text) > MAX_CHARS:
        return None
    for mark in ("$", "\\left", "\\right", "\\,", "\\!"):
        text = text.replace(mark, "")
    text = text.replace("\\%", "%")
    text = _FRAC.sub(r"((\1)/(\2))", text.replace("\u2212", "-").strip().rstrip("."))
    if re.search(
        r"[0-9]\s*[\s(][0-9(]|\)\s*[0-9]", text
    ):  # two numbers side by side are a product, a mixed number or a list
        return None
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") and "," in text else text
    if inner == text and ", " not in text:
        inner = _THOUSANDS.sub("", text)
    numbers = [_read_number(part) for part in inner.split(",")]
    return (
        tuple(number for number in numbers if number is not None) if None not in numbers else None
    )


def _read_number(text: str) -> Fraction | None:
    text = _NAME.sub("", text).replace("(", "").replace(")", "").strip()
    share = text.endswith("%")
    parts = text.rstrip("%").strip().split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        return None
    numbers = [Fraction(part.strip()) for part in parts]
    if len(numbers) == 2 and numbers[1] == 0:
        return None
    return (numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]) / (100 if share else 1)


def is_correct(text: str, truth: Value) -> bool:
    """Whether the text's answer has exactly the value."""
    answer = final_answer(text)
    return answer is not None and read_value(answer) == truth


def written(truth: Value) -> str:
    """A value as an answer."""
    return str(truth[0]) if len(truth) == 1 else f"({', '.join(map(str, truth))})"
