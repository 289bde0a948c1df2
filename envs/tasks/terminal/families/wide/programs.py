"""Small Python functions from which the programming families draw: source, what it computes, ways
in which it can be wrong, hidden inputs.

The source here is the only definition: the expected output of a hidden input is what this source
gives on it. A bug is a pair of texts, and `tests/envs/tasks` proves that each one changes the
output of some hidden input.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A module with one function of its name.

    `spec` is what an instruction says of it; `inputs` draws arguments, the odd cases always among
    them.
    """

    name: str
    signature: str
    spec: str
    source: str
    bugs: tuple[tuple[str, str], ...]
    inputs: Callable[[random.Random], list[tuple[Any, ...]]]

    def expected(self, arguments: tuple[Any, ...]) -> str:
        return repr(_compiled(self.source, self.name)(*arguments))

    def broken(self, bug: tuple[str, str]) -> str:
        right, wrong = bug
        if self.source.count(right) != 1:
            raise ValueError(
                f"bug {bug} of {self.name} must match its source once, and matches"
                f" {self.source.count(right)} times"
            )
        return self.source.replace(right, wrong)


@functools.cache
def _compiled(source: str, name: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {}
    exec(
        compile(source, f"<{name}>", "exec"), namespace
    )  # the texts below, never a task's or an agent's
    return namespace[name]


def _numbers(rng: random.Random, low: int = 3, high: int = 7) -> list[int]:
    return [rng.randint(-20, 40) for _ in range(rng.randint(low, high))]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdeilnorst") for _ in range(rng.randint(3, 7)))


PROGRAMS = (
    Program(
        "running_max",
        "running_max(values)",
        "return the list whose i-th entry is the largest of values[0..i]; [] for []",
        "def running_max(values):\n    result = []\n    best = None\n    for value in values:\n    "
        "    if best is None or value > best:\n            best = value\n       "
        " result.append(best)\n    return result\n",
        (
            ("value > best", "value < best"),
            ("best = None\n", "best = 0\n"),
            ("result.append(best)", "result.append(value)"),
        ),
        lambda rng: [([],), ([-5, -7, -3],), (_numbers(rng),), (_numbers(rng),)],
    ),
    Program(
        "digit_sum",
        "digit_sum(number)",
        "return the sum of the decimal digits of an integer, without its sign",
        "def digit_sum(number):\n    number = abs(number)\n    total = 0\n    while number > 0:\n  "
        "      total += number % 10\n        number //= 10\n    return total\n",
        (
            ("number > 0", "number > 9"),
            ("number % 10", "number % 9"),
            ("number = abs(number)", "number = number"),
        ),
        lambda rng: [(0,), (-19,), (rng.randint(100, 9999),), (rng.randint(10**6, 10**9),)],
    ),
    Program(
        "count_vowels",
        "count_vowels(text)",
        "return how many characters of the text are vowels (a, e, i, o, u), of either case",
        "VOWELS = 'aeiou'\n\n\ndef count_vowels(text):\n    count = 0\n    for letter in"
        " text.lower():\n        if letter in VOWELS:\n            count += 1\n    return count\n",
        (("'aeiou'", "'aeio'"), ("text.lower()", "text"), ("count += 1", "count = 1")),
        lambda rng: [("",), ("AUTUMN",), (_word(rng) + " U " + _word(rng),), (_word(rng) * 3,)],
    ),
    Program(
        "caesar",
        "caesar(text, shift)",
        "move every lower-case letter a-z by `shift` places, around the end of the alphabet, and"
        " leave other characters",
        "def caesar(text, shift):\n    result = ''\n    for letter in text:\n        if 'a' <="
        " letter <= 'z':\n            place = (ord(letter) - ord('a') + shift) % 26\n           "
        " result += chr(ord('a') + place)\n        else:\n            result += letter\n    return"
        " result\n",
        (
            (") % 26", ")"),
            ("+ shift", "- shift"),
            ("            result += letter\n", "            pass\n"),
        ),
        lambda rng: [
            ("xyz!", 3),
            (_word(rng) + " Z", rng.randint(4, 20)),
            (_word(rng), -rng.randint(1, 9)),
        ],
    ),
    Program(
        "chunks",
        "chunks(items, size)",
        "cut a list into lists of `size` items; the last one may be shorter",
        "def chunks(items, size):\n    result = []\n    for start in range(0, len(items), size):\n "
        "       result.append(items[start:start + size])\n    return result\n",
        (
            ("len(items), size", "len(items) - 1, size"),
            ("start + size]", "start + size - 1]"),
            ("range(0,", "range(1,"),
        ),
        lambda rng: [
            ([], 2),
            ([1], 1),
            (list(range(rng.randint(7, 11))), 3),
            (list(range(9)), rng.randint(2, 4)),
        ],
    ),
    Program(
        "merge_intervals",
        "merge_intervals(intervals)",
        "merge intervals [start, end] that overlap or touch; return them sorted, as lists",
        "def merge_intervals(intervals):\n    result = []\n    for start, end in"
        " sorted(intervals):\n        if result and start <= result[-1][1]:\n           "
        " result[-1][1] = max(result[-1][1], end)\n        else:\n            result.append([start,"
        " end])\n    return result\n",
        (
            ("start <= result", "start < result"),
            ("max(result[-1][1], end)", "end"),
            ("sorted(intervals)", "intervals"),
        ),
        lambda rng: [
            ([[1, 3], [3, 5]],),
            ([[1, 9], [2, 4]],),
            ([[7, 8], [1, 2]],),
            ([[a, a + rng.randint(1, 6)] for a in rng.sample(range(40), 6)],),
        ],
    ),
    Program(
        "word_counts",
        "word_counts(text)",
        "return a dict from each word of the text, in lower case, to how often it occurs; words are"
        " separated by white space",
        "def word_counts(text):\n    counts = {}\n    for word in text.lower().split():\n       "
        " counts[word] = counts.get(word, 0) + 1\n    return counts\n",
        (
            ("counts.get(word, 0)", "counts.get(word, 1)"),
            (".lower()", ""),
            (".split()", ".split(' ')"),
        ),
        lambda rng: [
            ("",),
            ("a  A b",),
            (" ".join(rng.choice("abc") for _ in range(8)),),
            ("Red red\tblue",),
        ],
    ),
    Program(
        "balanced",
        "balanced(text)",
        "return whether the brackets (), [] and {} in the text are balanced; other characters do"
        " not count",
        "PAIRS = {')': '(', ']': '[', '}': '{'}\n\n\ndef balanced(text):\n    stack = []\n    for"
        " letter in text:\n        if letter in PAIRS.values():\n            stack.append(letter)\n"
        "        elif letter in PAIRS:\n            if not stack or stack.pop() != PAIRS[letter]:\n"
        "                return False\n    return not stack\n",
        (
            ("return not stack", "return True"),
            ("not stack or stack.pop()", "stack and stack.pop()"),
            (", '}': '{'", ""),
        ),
        lambda rng: [
            ("",),
            ("(",),
            (")(",),
            ("[(])",),
            ("{(a)[b]}",),
            ("}",),
            ("".join(rng.choice("()[]") for _ in range(4)),),
        ],
    ),
    Program(
        "transpose",
        "transpose(rows)",
        "return the columns of a table (a list of rows of equal length) as a list of lists",
        "def transpose(rows):\n    if not rows:\n        return []\n    width = len(rows[0])\n   "
        " return [[row[column] for row in rows] for column in range(width)]\n",
        (
            ("len(rows[0])", "len(rows)"),
            ("    if not rows:\n        return []\n", ""),
            ("range(width)", "range(width - 1)"),
        ),
        lambda rng: [
            ([],),
            ([[1, 2, 3]],),
            ([[rng.randint(0, 9) for _ in range(2)] for _ in range(3)],),
        ],
    ),
    Program(
        "roman",
        "roman(number)",
        "write an integer from 1 to 3999 as a Roman numeral",
        "STEPS = [(1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'), (90, 'XC'), (50,"
        " 'L'), (40, 'XL'), (10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]\n\n\ndef"
        " roman(number):\n    text = ''\n    for value, letters in STEPS:\n        while number >="
        " value:\n            text += letters\n            number -= value\n    return text\n",
        (
            ("(90, 'XC'), ", ""),
            ("number >= value", "number > value"),
            ("while number", "if number"),
        ),
        lambda rng: [(1,), (3,), (1990,), (rng.randint(2000, 3999),), (rng.randint(1, 99),)],
    ),
    Program(
        "second_largest",
        "second_largest(values)",
        "return the second largest of the different values; None where there are fewer than two",
        "def second_largest(values):\n    ordered = sorted(set(values))\n    if len(ordered) < 2:\n"
        "        return None\n    return ordered[-2]\n",
        (("set(values)", "values"), ("< 2", "< 1"), ("[-2]", "[1]")),
        lambda rng: [([],), ([4],), ([5, 5, 3],), ([1, 2, 3, 4],), (_numbers(rng, 4, 7),)],
    ),
    Program(
        "flatten",
        "flatten(nested)",
        "return all numbers of a list that holds numbers and such lists, to any depth, in order",
        "def flatten(nested):\n    result = []\n    for item in nested:\n        if"
        " isinstance(item, list):\n            result.extend(flatten(item))\n        else:\n       "
        "     result.append(item)\n    return result\n",
        (
            ("result.extend(flatten(item))", "result.extend(item)"),
            ("result.append(item)", "result = [item]"),
            ("result.extend(", "result.append("),
        ),
        lambda rng: [
            ([],),
            ([[[1]], 2],),
            ([1, [2, [3, [rng.randint(0, 9)]]], 5],),
            ([[], _numbers(rng), [[4]]],),
        ],
    ),
)
NAMES = tuple(program.name for program in PROGRAMS)


def calls(program: Program, rng: random.Random, module: str) -> tuple[str, str]:
    """(code that calls it on hidden inputs, what that code prints)."""
    inputs = program.inputs(rng)
    code = "\n".join(
        [
            f"from {module} import {program.name}",
            *(f"print(repr({program.name}(*{arguments!r})))" for arguments in inputs),
        ]
    )
    return code, "\n".join(program.expected(arguments) for arguments in inputs)
