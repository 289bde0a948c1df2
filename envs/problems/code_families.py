"""Procedural programming problems: each family draws constants, a statement, a solution and inputs.

The solution runs on the inputs when a problem is made, so every problem can be solved by it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A function `name(parameters)` to be written.

    `draw_input` draws the arguments of one call as JSON values; `source` is the reference solution.
    """

    name: str
    parameters: str
    statement: str
    source: str
    draw_input: Callable[[random.Random], list[Any]]


def _ints(rng: random.Random, max_count: int, low: int = -50, high: int = 50) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(0, max_count))]


def _text(rng: random.Random, letters: str, max_length: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, max_length)))


def window_sum(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about the largest or smallest sum of neighbouring numbers."""
    width = rng.randint(2, 2 + size)
    most = rng.choice(["largest", "smallest"])
    source = f"""\
def window(values):
    sums = [sum(values[i:i + {width}]) for i in range(len(values) - {width} + 1)]
    return {"max" if most == "largest" else "min"}(sums) if sums else None
"""
    return Drawn(
        "window",
        "values",
        f"Return the {most} sum of {width} neighbouring numbers of the list `values`, or None where"
        f" it has fewer than {width}.",
        source,
        lambda draw: [_ints(draw, 12 * size)],
    )


def shifted_text(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about a Caesar cipher whose shift grows with the position."""
    shift = rng.randint(1, 25)
    step = rng.randint(0, size)
    source = f"""\
def shifted(text):
    result = []
    for place, letter in enumerate(text):
        if letter.isalpha():
            first = ord('a') if letter.islower() else ord('A')
            letter = chr((ord(letter) - first + {shift} + {step} * place) % 26 + first)
        result.append(letter)
    return ''.join(result)
"""
    return Drawn(
        "shifted",
        "text",
        f"Shift each English letter at position i (from 0, all characters counted) by {shift} +"
        f" {step} * i places in the alphabet, going round, upper and lower case kept; leave other"
        " characters as they are. Return the new text.",
        source,
        lambda draw: [_text(draw, "abcxyzABCXYZ .,1", 10 * size)],
    )


def covered_length(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about the length that intervals cover."""
    gap = rng.randint(0, size)
    source = f"""\
def covered(intervals):
    total, end = 0, None
    for low, high in sorted(intervals):
        if end is None or low > end + {gap}:
            total, end = total + high - low, high
        elif high > end:
            total, end = total + high - end, high
    return total
"""
    return Drawn(
        "covered",
        "intervals",
        "`intervals` is a list of pairs [low, high] with low <= high. Merge intervals that overlap"
        f" or are at most {gap} apart (what lies between such two becomes covered, too). Return the"
        " length that is covered in the end.",
        source,
        lambda draw: [[[low, low + draw.randint(0, 9)] for low in _ints(draw, 6 * size)]],
    )


def inversions(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about counting inversions by a margin."""
    margin = rng.randint(0, 5 * size)
    source = f"""\
def inversions(values):
    return sum(values[i] > values[j] + {margin} \
for i in range(len(values)) for j in range(i + 1, len(values)))
"""
    return Drawn(
        "inversions",
        "values",
        "Return how many pairs of positions i < j of the list `values` have values[i] > values[j]"
        f" + {margin}.",
        source,
        lambda draw: [_ints(draw, 15 * size)],
    )


def postfix(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about evaluating postfix notation with an operator of its own."""
    a = rng.randint(2, 9)
    b = rng.randint(1, 9)
    source = f"""\
def evaluate(tokens):
    stack = []
    for token in tokens:
        if token in ('+', '-', '*', '@'):
            right, left = stack.pop(), stack.pop()
            stack.append({{'+': left + right, '-': left - right, '*': left * right, \
'@': {a} * left - {b} * right}}[token])
        else:
            stack.append(int(token))
    return stack[0]
"""

    def draw_expression(draw: random.Random, depth: int) -> list[str]:
        if depth == 0 or draw.random() < 0.2:
            return [str(draw.randint(-9, 9))]
        left = draw_expression(draw, depth - 1)
        right = draw_expression(draw, depth - 1)
        return [*left, *right, draw.choice("+-*@")]

    return Drawn(
        "evaluate",
        "tokens",
        "Evaluate an expression in postfix notation, given as a list of texts: integers and the"
        f" operators +, -, * and @, where x @ y is {a} * x - {b} * y. Return the integer.",
        source,
        lambda draw: [draw_expression(draw, 1 + size)],
    )


def fewest_coins(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about the smallest number of coins."""
    coins = sorted(rng.sample(range(2, 12 + 8 * size), 2 + size))
    source = f"""\
def fewest(amount):
    best = [0] + [None] * amount
    for total in range(1, amount + 1):
        ways = [best[total - coin] + 1 for coin in {coins} \
if coin <= total and best[total - coin] is not None]
        best[total] = min(ways) if ways else None
    return best[amount]
"""
    return Drawn(
        "fewest",
        "amount",
        f"Return the smallest number of coins of the values {coins} that add up to `amount` (each"
        " value as often as needed, 0 <= amount <= 300), or None where they cannot.",
        source,
        lambda draw: [draw.randint(0, 100 * size)],
    )


def first_order(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about the first topological order."""
    reverse = rng.random() < 0.5

    def draw_input(draw: random.Random) -> list[Any]:
        count = draw.randint(2, 4 + 2 * size)
        edges = [draw.sample(range(count), 2) for _ in range(draw.randint(0, count))]
        return [count, edges]

    source = f"""\
def order(count, edges):
    left, done = list(range(count)), []
    while left:
        free = [one for one in left if not any(b == one and a in left for a, b in edges)]
        if not free:
            return None
        chosen = {"max" if reverse else "min"}(free)
        done.append(chosen)
        left.remove(chosen)
    return done
"""
    return Drawn(
        "order",
        "count, edges",
        "Tasks are numbered 0 to count - 1; a pair [a, b] in `edges` says that a comes before b."
        f" Do one task after the other, always the {'largest' if reverse else 'smallest'} number"
        " that may be done next. Return the list of all tasks in this order, or None where it"
        " cannot be completed.",
        source,
        draw_input,
    )


def common_subsequence(rng: random.Random, size: int) -> Drawn:
    """Draw a problem about the most valuable common subsequence."""
    vowel = rng.randint(1, 5)
    other = rng.randint(1, 5)
    source = f"""\
def common(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = max(table[i - 1][j], table[i][j - 1])
            if a == b:
                table[i][j] = max(table[i][j], table[i - 1][j - 1] + \
({vowel} if a in 'aeiou' else {other}))
    return table[-1][-1]
"""
    return Drawn(
        "common",
        "first, second",
        f"A common subsequence of two texts of lower-case letters is worth {vowel} for each of its"
        f" vowels (aeiou) and {other} for each other letter. Return the largest worth.",
        source,
        lambda draw: [_text(draw, "aeibcd", 6 * size) for _ in range(2)],
    )


FAMILIES: dict[str, Callable[[random.Random, int], Drawn]] = {
    draw.__name__: draw
    for draw in (
        window_sum,
        shifted_text,
        covered_length,
        inversions,
        postfix,
        fewest_coins,
        first_order,
        common_subsequence,
    )
}
