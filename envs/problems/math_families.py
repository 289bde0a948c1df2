"""Procedural mathematics: each family draws a text and its exact answer.

`size` is 1, 2 or 3 and makes numbers and steps larger.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

Drawn = tuple[
    str, tuple[Fraction | int, ...]
]  # text, answer: one number or several in the order asked for


def purchase(rng: random.Random, size: int) -> Drawn:
    goods = rng.sample(
        ["pens", "books", "apples", "tickets", "cups", "lamps", "chairs", "maps"], size + 1
    )
    lines = [(rng.randint(2, 12 * size), rng.randint(1, 40 * size), name) for name in goods]
    percent = rng.choice([5, 10, 20, 25, 50])
    paid_extra = rng.randint(1, 90)
    total = sum(count * price for count, price, _ in lines)
    due = Fraction(total * (100 - percent), 100)
    paid = math.ceil(due) + paid_extra
    bought = ", ".join(f"{count} {name} at {price} euros each" for count, price, name in lines)
    return (
        (
            f"Mina buys {bought}. She gets {percent}% off the whole and pays with {paid} euros. How"
            " many euros does she get back?"
        ),
        (paid - due,),
    )


def travel_time(rng: random.Random, size: int) -> Drawn:
    legs = [(rng.randint(20, 120), rng.randint(10, 200)) for _ in range(size + 1)]
    time = sum(Fraction(distance, speed) for speed, distance in legs)
    told = ", then ".join(f"{distance} km at {speed} km/h" for speed, distance in legs)
    return (
        (
            f"A lorry drives {told}. What is its average speed over the whole way, in km/h, as an"
            " exact fraction?"
        ),
        (sum(distance for _, distance in legs) / time,),
    )


def linear_equation(rng: random.Random, size: int) -> Drawn:
    top = 9 * 10 ** (size - 1)
    a, c = rng.sample([one for one in range(-top, top) if one], 2)
    b = rng.randint(-top, top)
    d = rng.randint(-top, top)
    return f"Solve for x: {a}x + {b} = {c}x + {d}. Give x exactly.".replace("+ -", "- "), (
        Fraction(d - b, a - c),
    )


def linear_system(rng: random.Random, size: int) -> Drawn:
    top = 5 * size + 2
    while True:
        a, b, c, d = (rng.choice([one for one in range(-top, top + 1) if one]) for _ in range(4))
        if determinant := a * d - b * c:
            break
    e = rng.randint(-9 * size, 9 * size)
    f = rng.randint(-9 * size, 9 * size)
    text = f"Solve the system {a}x + {b}y = {e}, {c}x + {d}y = {f}. Answer as (x, y), exactly.".replace(
        "+ -", "- "
    )
    return text, (Fraction(e * d - b * f, determinant), Fraction(a * f - e * c, determinant))


def quadratic(rng: random.Random, size: int) -> Drawn:
    p, q = rng.sample(range(-6 * size - 3, 6 * size + 4), 2)
    text = (
        f"The equation x^2 + {-(p + q)}x + {p * q} = 0 has two real solutions. Answer as (smaller,"
        " larger).".replace("+ -", "- ")
    )
    return text, tuple(sorted((p, q)))


def modular_power(rng: random.Random, size: int) -> Drawn:
    base = rng.randint(2, 10**size)
    exponent = rng.randint(10, 10 ** (size + 1))
    modulus = rng.randint(5, 40 * size**2)
    return f"What is the remainder of {base}^{exponent} divided by {modulus}?", (
        pow(base, exponent, modulus),
    )


def congruences(rng: random.Random, size: int) -> Drawn:
    moduli = rng.sample([3, 4, 5, 7, 11, 13, 17], size + 1)
    whole = math.prod(moduli)
    number = rng.randrange(whole)
    told = ", ".join(f"{number % modulus} when divided by {modulus}" for modulus in moduli)
    return f"Which number from 0 to {whole - 1} leaves the remainders {told}?", (number,)


def committees(rng: random.Random, size: int) -> Drawn:
    women = rng.randint(3, 4 + 2 * size)
    men = rng.randint(3, 4 + 2 * size)
    chosen = rng.randint(2, min(women, men) + size - 1)
    least = rng.randint(1, min(chosen, women))
    count = sum(
        math.comb(women, some) * math.comb(men, chosen - some) for some in range(least, chosen + 1)
    )
    return (
        (
            f"From {women} women and {men} men a committee of {chosen} is chosen. How many"
            f" committees have at least {least} of the women?"
        ),
        (count,),
    )


def arrangements(rng: random.Random, size: int) -> Drawn:
    letters = "".join(rng.choice("ABCDE"[: 2 + size]) for _ in range(4 + 2 * size))
    count = math.factorial(len(letters)) // math.prod(
        map(math.factorial, Counter(letters).values())
    )
    return f"How many different strings can be made by rearranging the letters of {letters}?", (
        count,
    )


def grid_paths(rng: random.Random, size: int) -> Drawn:
    columns = rng.randint(3, 3 + 2 * size)
    rows = rng.randint(3, 3 + 2 * size)
    x = rng.randint(1, columns - 1)
    y = rng.randint(1, rows - 1)
    through = math.comb(x + y, x) * math.comb(columns - x + rows - y, rows - y)
    return (
        (
            f"A path goes from (0, 0) to ({columns}, {rows}) by steps of one to the right or one"
            f" up. How many such paths do not visit ({x}, {y})?"
        ),
        (math.comb(columns + rows, rows) - through,),
    )


def dice(rng: random.Random, size: int) -> Drawn:
    count = rng.randint(2, 1 + size)
    sides = rng.choice([4, 6, 8])
    bound = rng.randint(count + 1, count * sides - 1)
    wins = sum(sum(roll) >= bound for roll in itertools.product(range(1, sides + 1), repeat=count))
    return (
        (
            f"{count} fair dice with {sides} sides (1 to {sides}) are thrown. What is the"
            f" probability that their sum is at least {bound}? Answer as a fraction."
        ),
        (Fraction(wins, sides**count),),
    )


def polygon_area(rng: random.Random, size: int) -> Drawn:
    """By a walk around the origin, so that the corners come in order of their angle and the polygon
    does not cross itself.
    """
    corners = []
    while len(corners) < 3:
        drawn = {
            (rng.randint(-6 * size, 6 * size), rng.randint(-6 * size, 6 * size))
            for _ in range(2 + 2 * size)
        } - {(0, 0)}
        corners = sorted(drawn, key=lambda one: math.atan2(one[1], one[0]))
        angles = [math.atan2(y, x) for x, y in corners]
        gaps = [
            (after - before) % (2 * math.pi)
            for before, after in zip(angles, angles[1:] + angles[:1], strict=True)
        ]
        corners = corners if gaps and min(gaps) > 1e-9 and max(gaps) < math.pi - 1e-9 else []
    doubled = sum(
        x * next_y - next_x * y
        for (x, y), (next_x, next_y) in zip(corners, corners[1:] + corners[:1], strict=True)
    )
    return (
        (
            f"What is the area of the polygon with the corners {', '.join(map(str, corners))},"
            " joined in this order?"
        ),
        (Fraction(doubled, 2),),
    )


def recurrence(rng: random.Random, size: int) -> Drawn:
    p = rng.randint(1, 3)
    q = rng.randint(-2, 3)
    first = rng.randint(-4, 5)
    second = rng.randint(-4, 5)
    steps = rng.randint(4, 4 + 3 * size)
    before = first
    now = second
    for _ in range(steps - 2):
        before, now = now, p * now + q * before
    text = (
        f"Let a(1) = {first}, a(2) = {second} and a(n) = {p} a(n-1) + {q} a(n-2). What is"
        f" a({steps})?".replace("+ -", "- ")
    )
    return text, (now,)


def divisors(rng: random.Random, size: int) -> Drawn:
    exponents = {
        prime: rng.randint(1, 2 + size // 2) for prime in rng.sample([2, 3, 5, 7, 11], size + 1)
    }
    number = math.prod(prime**exponent for prime, exponent in exponents.items())
    return f"How many positive divisors does {number} have?", (
        math.prod(exponent + 1 for exponent in exponents.values()),
    )


FAMILIES: dict[str, Callable[[random.Random, int], Drawn]] = {
    one.__name__: one
    for one in (
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
