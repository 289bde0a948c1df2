"""Procedural programming: each family draws constants, a statement, a reference solution as source,
and inputs.

`draw(rng, size)` gives Drawn; the reference is run on the inputs when a problem is made, so a
problem that its own reference cannot do does not exist.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Drawn:
    """name(*parameters) is to be written. draw_input gives one list of arguments, as JSON values."""

    name: str
    parameters: str
    statement: str
    source: str
    draw_input: Callable[[random.Random], list[Any]]


def _ints(rng: random.Random, most: int, low: int = -50, high: int = 50) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(0, most))]


def window_sum(rng: random.Random, size: int) -> Drawn:
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
        lambda draw: [
            "".join(draw.choice("abcxyzABCXYZ .,1") for _ in range(draw.randint(0, 10 * size)))
        ],
    )


def covered_length(rng: random.Random, size: int) -> Drawn:
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
    margin = rng.randint(0, 5 * size)
    source = f"""\
def inversions(values):
    return sum(values[i] > values[j] + {margin} for i in range(len(values)) for j in range(i + 1, len(values)))
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
    a = rng.randint(2, 9)
    b = rng.randint(1, 9)
    source = f"""\
def evaluate(tokens):
    stack = []
    for token in tokens:
        if token in ('+', '-', '*', '@'):
            right, left = stack.pop(), stack.pop()
            stack.append({{'+': left + right, '-': left - right, '*': left * right, '@': {a} * left - {b} * right}}[token])
        else:
            stack.append(int(token))
    return stack[0]
"""

    def draw_input(draw: random.Random) -> list[Any]:
        def expression(depth: int) -> list[str]:
            if depth == 0 or draw.random() < 0.2:
                return [str(draw.randint(-9, 9))]
            return [*expression(depth - 1), *expression(depth - 1), draw.choice("+-*@")]

        return [expression(1 + size)]

    return Drawn(
        "evaluate",
        "tokens",
        "Evaluate an expression in postfix notation, given as a list of texts: integers and the"
        f" operators +, -, * and @, where x @ y is {a} * x - {b} * y. Return the integer.",
        source,
        draw_input,
    )


def fewest_coins(rng: random.Random, size: int) -> Drawn:
    coins = sorted(rng.sample(range(2, 12 + 8 * size), 2 + size))
    source = f"""\
def fewest(amount):
    best = [0] + [None] * amount
    for total in range(1, amount + 1):
        ways = [best[total - coin] + 1 for coin in {coins} if coin <= total and best[total - coin] is not None]
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
    reverse = rng.random() < 0.5
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
        lambda draw: (
            lambda count: [
                count,
                [draw.sample(range(count), 2) for _ in range(draw.randint(0, count))],
            ]
        )(draw.randint(2, 4 + 2 * size)),
    )


def common_subsequence(rng: random.Random, size: int) -> Drawn:
    vowel = rng.randint(1, 5)
    other = rng.randint(1, 5)
    source = f"""\
def common(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = max(table[i - 1][j], table[i][j - 1])
            if a == b:
                table[i][j] = max(table[i][j], table[i - 1][j - 1] + ({vowel} if a in 'aeiou' else {other}))
    return table[-1][-1]
"""
    return Drawn(
        "common",
        "first, second",
        f"A common subsequence of two texts of lower-case letters is worth {vowel} for each of its"
        f" vowels (aeiou) and {other} for each other letter. Return the largest worth.",
        source,
        lambda draw: [
            "".join(draw.choice("aeibcd") for _ in range(draw.randint(0, 6 * size)))
            for _ in range(2)
        ],
    )


FAMILIES: dict[str, Callable[[random.Random, int], Drawn]] = {
    one.__name__: one
    for one in (
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
