"""Procedural mathematics: each family draws a text and its exact answer.

`size` is 1, 2 or 3 and makes numbers larger and problems longer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

# The text, and the answer: one number or several in the order that the text asks for.
Drawn = tuple[str, tuple[Fraction | int, ...]]
Point = tuple[int, int]

GOODS = ("pens", "books", "apples", "tickets", "cups", "lamps", "chairs", "maps")


def _with_signs(text: str) -> str:
    """Write "+ -3" as "- 3"."""
    return text.replace("+ -", "- ")


def _nonzero(low: int, high: int) -> list[int]:
    return [number for number in range(low, high + 1) if number]


def purchase(rng: random.Random, size: int) -> Drawn:
    """Compute the change of a purchase with a discount."""
    goods = rng.sample(GOODS, size + 1)
    lines = []
    for name in goods:
        count = rng.randint(2, 12 * size)
        price = rng.randint(1, 40 * size)
        lines.append((count, price, name))
    percent = rng.choice([5, 10, 20, 25, 50])
    paid_extra = rng.randint(1, 90)
    total = sum(count * price for count, price, _ in lines)
    due = Fraction(total * (100 - percent), 100)
    paid = math.ceil(due) + paid_extra
    bought = ", ".join(f"{count} {name} at {price} euros each" for count, price, name in lines)
    text = (
        f"Mina buys {bought}. She gets {percent}% off the whole and pays with {paid} euros. How"
        " many euros does she get back?"
    )
    return text, (paid - due,)


def travel_time(rng: random.Random, size: int) -> Drawn:
    """Compute the average speed over legs of different speeds."""
    legs = [(rng.randint(20, 120), rng.randint(10, 200)) for _ in range(size + 1)]
    distance = sum(distance for _, distance in legs)
    time = sum(Fraction(distance, speed) for speed, distance in legs)
    told = ", then ".join(f"{distance} km at {speed} km/h" for speed, distance in legs)
    text = (
        f"A lorry drives {told}. What is its average speed over the whole way, in km/h, as an"
        " exact fraction?"
    )
    return text, (distance / time,)


def linear_equation(rng: random.Random, size: int) -> Drawn:
    """Solve a linear equation with one unknown."""
    top = 9 * 10 ** (size - 1)
    a, c = rng.sample(_nonzero(-top, top - 1), 2)
    b = rng.randint(-top, top)
    d = rng.randint(-top, top)
    x = Fraction(d - b, a - c)
    text = f"Solve for x: {a}x + {b} = {c}x + {d}. Give x exactly."
    return _with_signs(text), (x,)


def linear_system(rng: random.Random, size: int) -> Drawn:
    """Solve a system of two linear equations."""
    top = 5 * size + 2
    factors = _nonzero(-top, top)
    determinant = 0
    while determinant == 0:
        a, b, c, d = (rng.choice(factors) for _ in range(4))
        determinant = a * d - b * c
    bound = 9 * size
    e = rng.randint(-bound, bound)
    f = rng.randint(-bound, bound)
    text = f"Solve the system {a}x + {b}y = {e}, {c}x + {d}y = {f}. Answer as (x, y), exactly."
    x = Fraction(e * d - b * f, determinant)
    y = Fraction(a * f - e * c, determinant)
    return _with_signs(text), (x, y)


def quadratic(rng: random.Random, size: int) -> Drawn:
    """Find both solutions of a quadratic equation."""
    p, q = rng.sample(range(-6 * size - 3, 6 * size + 4), 2)
    text = (
        f"The equation x^2 + {-(p + q)}x + {p * q} = 0 has two real solutions. Answer as (smaller,"
        " larger)."
    )
    return _with_signs(text), tuple(sorted((p, q)))


def modular_power(rng: random.Random, size: int) -> Drawn:
    """Compute a power modulo a number."""
    base = rng.randint(2, 10**size)
    exponent = rng.randint(10, 10 ** (size + 1))
    modulus = rng.randint(5, 40 * size**2)
    text = f"What is the remainder of {base}^{exponent} divided by {modulus}?"
    return text, (pow(base, exponent, modulus),)


def congruences(rng: random.Random, size: int) -> Drawn:
    """Find a number by its remainders (the Chinese remainder theorem)."""
    moduli = rng.sample([3, 4, 5, 7, 11, 13, 17], size + 1)
    whole = math.prod(moduli)
    number = rng.randrange(whole)
    told = ", ".join(f"{number % modulus} when divided by {modulus}" for modulus in moduli)
    text = f"Which number from 0 to {whole - 1} leaves the remainders {told}?"
    return text, (number,)


def committees(rng: random.Random, size: int) -> Drawn:
    """Count the committees with at least so many women."""
    women = rng.randint(3, 4 + 2 * size)
    men = rng.randint(3, 4 + 2 * size)
    chosen = rng.randint(2, min(women, men) + size - 1)
    least = rng.randint(1, min(chosen, women))
    count = 0
    for number in range(least, chosen + 1):
        count += math.comb(women, number) * math.comb(men, chosen - number)
    text = (
        f"From {women} women and {men} men a committee of {chosen} is chosen. How many"
        f" committees have at least {least} of the women?"
    )
    return text, (count,)


def arrangements(rng: random.Random, size: int) -> Drawn:
    """Count the different rearrangements of letters."""
    alphabet = rng.sample("ABCDE", rng.randint(2, 2 + size))
    length = rng.randint(4 + size, 5 + 3 * size)
    letters = "".join(rng.choice(alphabet) for _ in range(length))
    count = math.factorial(len(letters))
    for repeats in Counter(letters).values():
        count //= math.factorial(repeats)
    text = f"How many different strings can be made by rearranging the letters of {letters}?"
    return text, (count,)


def grid_paths(rng: random.Random, size: int) -> Drawn:
    """Count the lattice paths that avoid a point."""
    columns = rng.randint(3, 3 + 2 * size)
    rows = rng.randint(3, 3 + 2 * size)
    x = rng.randint(1, columns - 1)
    y = rng.randint(1, rows - 1)
    every_path = math.comb(columns + rows, rows)
    to_the_point = math.comb(x + y, x)
    from_the_point = math.comb(columns - x + rows - y, rows - y)
    text = (
        f"A path goes from (0, 0) to ({columns}, {rows}) by steps of one to the right or one"
        f" up. How many such paths do not visit ({x}, {y})?"
    )
    return text, (every_path - to_the_point * from_the_point,)


def dice(rng: random.Random, size: int) -> Drawn:
    """Compute the probability that dice sum to at least a bound."""
    count = rng.randint(2, 1 + size)
    sides = rng.choice([4, 6, 8])
    bound = rng.randint(count + 1, count * sides - 1)
    rolls = itertools.product(range(1, sides + 1), repeat=count)
    wins = sum(sum(roll) >= bound for roll in rolls)
    text = (
        f"{count} fair dice with {sides} sides (1 to {sides}) are thrown. What is the"
        f" probability that their sum is at least {bound}? Answer as a fraction."
    )
    return text, (Fraction(wins, sides**count),)


def polygon_area(rng: random.Random, size: int) -> Drawn:
    """Compute the area of a polygon.

    Its corners come in the order of their angles around the origin, so it does not cross itself.
    """
    corners: list[Point] = []
    while len(corners) < 3 or not _surround_origin(corners):
        corners = _draw_corners(rng, 6 * size, 2 + 2 * size)
    doubled = 0
    for (x, y), (next_x, next_y) in itertools.pairwise([*corners, corners[0]]):
        doubled += x * next_y - next_x * y
    text = (
        f"What is the area of the polygon with the corners {', '.join(map(str, corners))},"
        " joined in this order?"
    )
    return text, (Fraction(doubled, 2),)


def _draw_corners(rng: random.Random, top: int, count: int) -> list[Point]:
    """Draw at most `count` points apart from the origin, in the order of their angles."""
    drawn = {(rng.randint(-top, top), rng.randint(-top, top)) for _ in range(count)} - {(0, 0)}
    return sorted(drawn, key=_angle)


def _surround_origin(corners: list[Point]) -> bool:
    """Return whether neighbouring corners differ in angle, and by less than half a turn."""
    angles = [_angle(corner) for corner in corners]
    gaps = [
        (after - before) % (2 * math.pi)
        for before, after in itertools.pairwise([*angles, angles[0]])
    ]
    return min(gaps) > 1e-9 and max(gaps) < math.pi - 1e-9


def _angle(point: Point) -> float:
    return math.atan2(point[1], point[0])


def recurrence(rng: random.Random, size: int) -> Drawn:
    """Compute a term of a linear recurrence."""
    p = rng.randint(1, 3)
    q = rng.randint(-2, 3)
    first = rng.randint(-4, 5)
    second = rng.randint(-4, 5)
    steps = rng.randint(4, 4 + 3 * size)
    before, now = first, second
    for _ in range(steps - 2):
        before, now = now, p * now + q * before
    text = (
        f"Let a(1) = {first}, a(2) = {second} and a(n) = {p} a(n-1) + {q} a(n-2). What is"
        f" a({steps})?"
    )
    return _with_signs(text), (now,)


def divisors(rng: random.Random, size: int) -> Drawn:
    """Count the divisors of a number."""
    primes = sorted(rng.sample([2, 3, 5, 7, 11], size + 1))
    number = 1
    count = 1
    for prime in primes:
        exponent = rng.randint(1, 6 if prime == primes[0] else 3)
        number *= prime**exponent
        count *= exponent + 1
    return f"How many positive divisors does {number} have?", (count,)


FAMILIES: dict[str, Callable[[random.Random, int], Drawn]] = {
    draw.__name__: draw
    for draw in (
        purchase,
        travel_time,
        linear_equation,
        linear_system,
        quadratic,
        modular_power,
        congruences,
        committees,
        arrangements,
        grid_paths,
        dice,
        polygon_area,
        recurrence,
        divisors,
    )
}
