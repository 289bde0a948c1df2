"""Small Python functions that the programming families draw from.

Each comes with its source, its specification, bugs, and hidden inputs. The source is the only
definition: it gives the expected output for a hidden input. A bug is a pair of texts, and
`tests/envs/tasks` proves that each bug changes the output for some hidden input.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A module with one function of the same name.

    `spec` describes the function for an instruction. `inputs` draws arguments, with the edge cases
    always among them.
    """

    name: str
    signature: str
    spec: str
    source: str
    bugs: tuple[tuple[str, str], ...]
    inputs: Callable[[random.Random], list[tuple[Any, ...]]]

    def expected(self, arguments: tuple[Any, ...]) -> str:
        """Return the `repr` of the function's result."""
        return repr(_compiled(self.source, self.name)(*arguments))

    def broken(self, bug: tuple[str, str]) -> str:
        """Return the source with a bug."""
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
    exec(compile(source, f"<{name}>", "exec"), namespace)  # only sources of this file
    return namespace[name]


def _numbers(rng: random.Random, low: int = 3, high: int = 7) -> list[int]:
    return [rng.randint(-20, 40) for _ in range(rng.randint(low, high))]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdeilnorst") for _ in range(rng.randint(3, 7)))


def _coins(rng: random.Random, count: int) -> list[bool]:
    return [rng.random() < 0.5 for _ in range(count)]


def _brackets(rng: random.Random, is_balanced: bool) -> str:
    """Draw a text of three pairs of brackets, or one in which a closing one is of another kind."""
    text = ""
    for opening, closing in (rng.choice(("()", "[]", "{}")) for _ in range(3)):
        inside = rng.randint(0, 1)
        text = f"{opening}{text}{closing}" if inside else f"{text}{opening}{closing}"
    if is_balanced:
        return text
    place = rng.choice([place for place, letter in enumerate(text) if letter in ")]}"])
    other = rng.choice([letter for letter in ")]}" if letter != text[place]])
    return text[:place] + other + text[place + 1 :]


PROGRAMS = (
    Program(
        "running_max",
        "running_max(values)",
        "return the list whose i-th entry is the largest of values[0..i]; [] for []",
        """\
def running_max(values):
    result = []
    best = None
    for value in values:
        if best is None or value > best:
            best = value
        result.append(best)
    return result
""",
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
        """\
def digit_sum(number):
    number = abs(number)
    total = 0
    while number > 0:
        total += number % 10
        number //= 10
    return total
""",
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
        """\
VOWELS = 'aeiou'


def count_vowels(text):
    count = 0
    for letter in text.lower():
        if letter in VOWELS:
            count += 1
    return count
""",
        (("'aeiou'", "'aeio'"), ("text.lower()", "text"), ("count += 1", "count = 1")),
        lambda rng: [("",), ("AUTUMN",), (_word(rng) + " U " + _word(rng),), (_word(rng) * 3,)],
    ),
    Program(
        "caesar",
        "caesar(text, shift)",
        "move every lower-case letter a-z by `shift` places, around the end of the alphabet, and"
        " leave other characters",
        """\
def caesar(text, shift):
    result = ''
    for letter in text:
        if 'a' <= letter <= 'z':
            place = (ord(letter) - ord('a') + shift) % 26
            result += chr(ord('a') + place)
        else:
            result += letter
    return result
""",
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
        """\
def chunks(items, size):
    result = []
    for start in range(0, len(items), size):
        result.append(items[start:start + size])
    return result
""",
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
        """\
def merge_intervals(intervals):
    result = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1][1] = max(result[-1][1], end)
        else:
            result.append([start, end])
    return result
""",
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
        """\
def word_counts(text):
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts
""",
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
        """\
PAIRS = {')': '(', ']': '[', '}': '{'}


def balanced(text):
    stack = []
    for letter in text:
        if letter in PAIRS.values():
            stack.append(letter)
        elif letter in PAIRS:
            if not stack or stack.pop() != PAIRS[letter]:
                return False
    return not stack
""",
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
            *((_brackets(rng, is_balanced),) for is_balanced in _coins(rng, 6)),
        ],
    ),
    Program(
        "transpose",
        "transpose(rows)",
        "return the columns of a table (a list of rows of equal length) as a list of lists",
        """\
def transpose(rows):
    if not rows:
        return []
    width = len(rows[0])
    return [[row[column] for row in rows] for column in range(width)]
""",
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
        """\
STEPS = [(1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'), (90, 'XC'), \
(50, 'L'), (40, 'XL'), (10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]


def roman(number):
    text = ''
    for value, letters in STEPS:
        while number >= value:
            text += letters
            number -= value
    return text
""",
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
        """\
def second_largest(values):
    ordered = sorted(set(values))
    if len(ordered) < 2:
        return None
    return ordered[-2]
""",
        (("set(values)", "values"), ("< 2", "< 1"), ("[-2]", "[1]")),
        lambda rng: [([],), ([4],), ([5, 5, 3],), ([1, 2, 3, 4],), (_numbers(rng, 4, 7),)],
    ),
    Program(
        "flatten",
        "flatten(nested)",
        "return all numbers of a list that holds numbers and such lists, to any depth, in order",
        """\
def flatten(nested):
    result = []
    for item in nested:
        if isinstance(item, list):
            result.extend(flatten(item))
        else:
            result.append(item)
    return result
""",
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
    """Return (code that calls the function on hidden inputs, the output of that code)."""
    inputs = program.inputs(rng)
    code = "\n".join(
        [
            f"from {module} import {program.name}",
            *(f"print(repr({program.name}(*{arguments!r})))" for arguments in inputs),
        ]
    )
    return code, "\n".join(program.expected(arguments) for arguments in inputs)
