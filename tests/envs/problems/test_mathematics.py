"""Mathematics: each family's answer against an oracle that reads the text alone; every problem is
solved by its answer and by nothing cheaper.
"""

import itertools
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from envs.gem import make
from envs.problems import LEVELS, MathEnv
from envs.problems.math_families import FAMILIES

F = Fraction


def ints(text):
    return [int(one) for one in re.findall(r"-?\d+", text)]


def signed(text):
    """ "5x - 8" -> "5x +-8", so that each number carries its sign."""
    return re.sub(r"- (\d)", r"+ -\1", text)


def check_purchase(text, answer):
    goods = sum(int(count) * int(price) for count, price in re.findall(r"(\d+) \w+ at (\d+)", text))
    percent, paid = (
        int(one) for one in re.search(r"(\d+)% off .* with (\d+) euros", text).groups()
    )
    assert goods - F(goods * percent, 100) + answer[0] == paid


def check_travel_time(text, answer):
    legs = [(F(a), F(b)) for a, b in re.findall(r"(\d+) km at (\d+)", text)]
    assert sum(distance / speed for distance, speed in legs) * answer[0] == sum(
        distance for distance, _ in legs
    )


def check_linear_equation(text, answer):
    a, b, c, d = ints(signed(text))
    assert a * answer[0] + b == c * answer[0] + d


def check_linear_system(text, answer):
    a, b, e, c, d, f = ints(signed(text))
    np.testing.assert_allclose(
        np.linalg.solve([[a, b], [c, d]], [e, f]),
        [float(one) for one in answer],
        rtol=1e-9,
        atol=1e-9,
    )


def check_quadratic(text, answer):
    linear, constant = ints(signed(text.split("^2")[1]))[:2]
    np.testing.assert_allclose(
        sorted(np.roots([1, linear, constant]).real), [float(one) for one in answer], atol=1e-6
    )


def check_modular_power(text, answer):
    base, exponent, modulus = ints(text)
    value = 1
    for _ in range(exponent):
        value = value * base % modulus
    assert value == answer[0]


def check_congruences(text, answer):
    limit = ints(text)[1]
    wanted = [
        (int(rest), int(modulus))
        for rest, modulus in re.findall(r"(\d+) when divided by (\d+)", text)
    ]
    assert [
        one for one in range(limit + 1) if all(one % modulus == rest for rest, modulus in wanted)
    ] == [answer[0]]


def check_committees(text, answer):
    women, men, size, least = ints(text)
    people = [1] * women + [0] * men
    assert sum(sum(chosen) >= least for chosen in itertools.combinations(people, size)) == answer[0]


def check_arrangements(text, answer):
    counts = Counter(re.search(r"of ([A-E]+)\?", text)[1])
    total, left = 1, sum(counts.values())
    for count in counts.values():
        total, left = total * math.comb(left, count), left - count
    assert total == answer[0]


def check_grid_paths(text, answer):
    _, _, columns, rows, x, y = ints(text)
    ways = np.zeros((columns + 1, rows + 1), dtype=object)
    ways[0, 0] = 1
    for i, j in itertools.product(range(columns + 1), range(rows + 1)):
        if (i, j) != (0, 0):
            ways[i, j] = (
                0
                if (i, j) == (x, y)
                else (ways[i - 1, j] if i else 0) + (ways[i, j - 1] if j else 0)
            )
    assert ways[columns, rows] == answer[0]


def check_dice(text, answer):
    count, sides, _, _, bound = ints(text)
    sums = np.ones(1)
    for _ in range(count):
        sums = np.convolve(sums, np.ones(sides))
    assert math.isclose(sums[bound - count :].sum() / sides**count, float(answer[0]), abs_tol=1e-12)


def check_polygon_area(text, answer):
    corners = [(int(x), int(y)) for x, y in re.findall(r"\((-?\d+), (-?\d+)\)", text)]
    triangles = [
        abs(a[0] * b[1] - a[1] * b[0])
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True)
    ]  # with the origin, which lies inside
    assert F(sum(triangles), 2) == answer[0] > 0


def check_recurrence(text, answer):
    first, second, p, q, steps = [
        int(one)
        for one in re.search(
            r"a\(1\) = (-?\d+), a\(2\) = (-?\d+) and a\(n\) = (\d+) a\(n-1\) \+ (-?\d+) a\(n-2\)\."
            r" What is a\((\d+)\)",
            signed(text),
        ).groups()
    ]
    matrix = np.array([[p, q], [1, 0]], dtype=object)
    state = np.array([second, first], dtype=object)
    for _ in range(steps - 2):
        state = matrix.dot(state)
    assert state[0] == answer[0]


def check_divisors(text, answer):
    (number,) = ints(text)
    assert (
        sum(number % one == 0 for one in range(1, math.isqrt(number) + 1)) * 2
        - (math.isqrt(number) ** 2 == number)
        == answer[0]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_right_by_another_way(family):
    for size in (1, 2, 3):
        for seed in range(12):
            text, answer = FAMILIES[family](random.Random(f"{family}{seed}"), size)
            globals()[f"check_{family}"](text, tuple(map(F, answer)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_demonstrator_earns_1_and_nothing_and_cheats_earn_0(family):
    for level in LEVELS:
        env = make(f"rome:math/{family}-{level}")
        texts = set()
        for seed in range(8):
            texts.add(env.reset(seed)[0])
            _, reward, terminated, truncated, info = env.step(
                f"So the answer is {env.demonstrator_action()}"
            )
            assert (reward, terminated, truncated, info["ending"], info["correct"]) == (
                1.0,
                True,
                False,
                "success",
                True,
            )
            for action in ["done", *(one for turns in env.cheats().values() for one in turns)]:
                env.reset(seed)
                assert env.step(action)[1] == 0.0, (env.task, action)
        assert len(texts) > 4


def test_endings_and_settings():
    env = make("rome:math/all-easy", seed=3)
    assert env.reset()[1]["seed"] == 3 and env.reset()[1]["seed"] != 3
    assert env.step("word " * 100)[4]["ending"] == "malformed"
    with pytest.raises(RuntimeError, match="reset"):
        env.step("1")
    assert {
        make("rome:math/all-easy").reset(seed)[1]["drawn_family"] for seed in range(200)
    } == set(FAMILIES)
    with pytest.raises(ValueError, match="family 'x'"):
        MathEnv(family="x")
    env.reset(seed=5)
    assert (
        env.spawn(same_state=True).step(env.demonstrator_action())[1] == 1.0
        and env.spawn(seed=5).reset()[0] == env.problem
    )


@pytest.mark.parametrize(
    "env_id", ["rome:math/all-easy", "rome:code/all-easy", "rome:text/all-easy"]
)
def test_random_actions_do_not_change_the_problems_to_come(env_id):
    env, twin = make(env_id, seed=3), make(env_id, seed=3)
    assert env.reset() == twin.reset()
    env.sample_random_action()
    assert env.reset() == twin.reset()
