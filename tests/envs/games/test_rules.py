"""The rules of each game, against other computations of them."""

import itertools
import random
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.games import FrozenLake, GuessTheNumber, Sokoban, TowerOfHanoi, Wordle
from envs.games.sokoban_rooms import MOVES
from envs.games.sokoban_solver import lower_bound, solve
from envs.games.tower_of_hanoi import next_move
from envs.games.wordle import WORDS, best_guess, mark


def test_frozen_lake_looks_and_pays_as_in_roll():
    env = FrozenLake()
    env.reset(seed=0)
    env.size, env.player, env.goal = 3, (0, 0), (1, 1)
    env.ice = {(0, 0), (0, 1), (1, 1), (2, 2)}
    assert env._board() == "Here is the current state of the FrozenLake:\nP_O\nOGO\nOO_\n"
    observation, reward, terminated, _, info = env.step("<answer>Up</answer>")
    assert (
        observation == "At turn 1, you tried to move Up, which is not effective yet."
        and not terminated
    )
    assert info["metrics"] == {
        "action_is_effective": False,
        "action_is_valid": True,
        "success": False,
        "format_penalty": 0.0,
    }
    assert (
        env.step("<answer>Right</answer>")[0] == "At turn 2, you moved Right, which is effective."
    )
    _, reward, terminated, truncated, info = env.step("<answer>Down</answer>")
    assert (reward, terminated, truncated, info["ending"]) == (1.0, True, False, "success")
    assert info["suffix"].splitlines()[2] == "O√O"


def test_a_hole_ends_the_game_without_reward():
    env = FrozenLake()
    env.reset(seed=0)
    env.player, env.goal, env.ice = (0, 0), (3, 3), {(0, 0), (3, 3)}
    _, reward, terminated, truncated, info = env.step("Down")
    assert (reward, terminated, truncated, info["ending"]) == (0.0, True, False, "failure")
    assert info["suffix"].splitlines()[2][0] == "X"


def test_slippery_ice_goes_to_either_side_and_never_back():
    env = FrozenLake(is_slippery=True, size=5, p=1.0, max_turns=10_000)
    went = {name: 0 for name in ("Left", "Down", "Right", "Up")}
    env.reset(seed=0)
    for _ in range(900):
        env.player, env.goal = (2, 2), (4, 4)
        env.step("Right")
        went[{(2, 1): "Left", (3, 2): "Down", (2, 3): "Right", (1, 2): "Up"}[env.player]] += 1
    assert went["Left"] == 0
    assert all(
        240 < went[name] < 360 for name in ("Down", "Right", "Up")
    )  # 300 each; 60 is more than 4 standard deviations


def test_the_slippery_demonstrators_chances_solve_bellmans_equation():
    env = FrozenLake(is_slippery=True)
    env.reset(seed=8)
    chances = env._best_chances()
    grid = np.array([[chances[row, column] for column in range(4)] for row in range(4)])
    padded = np.pad(grid, 1, mode="edge")  # the border throws one back
    left, right, up, down = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
    best = (
        0.9999
        * np.maximum.reduce(
            [left + up + down, right + up + down, up + left + right, down + left + right]
        )
        / 3
    )
    inner = np.array(
        [
            [(row, column) in env.ice and (row, column) != env.goal for column in range(4)]
            for row in range(4)
        ]
    )
    np.testing.assert_allclose(grid[inner], best[inner], atol=1e-6)


def brute_force(room, player, boxes):
    """Length of a shortest solution by breadth-first search over single moves."""
    start = (player, frozenset(boxes))
    seen, queue = {start: 0}, deque([start])
    while queue:
        state = queue.popleft()
        player, boxes = state
        if boxes == room.targets:
            return seen[state]
        for down, right in MOVES.values():
            cell, behind = (
                (player[0] + down, player[1] + right),
                (player[0] + 2 * down, player[1] + 2 * right),
            )
            if cell not in room.floor or (
                cell in boxes and (behind not in room.floor or behind in boxes)
            ):
                continue
            after = (cell, boxes - {cell} | {behind} if cell in boxes else boxes)
            if after not in seen:
                seen[after] = seen[state] + 1
                queue.append(after)
    return None


@pytest.mark.parametrize("seed", range(8))
def test_the_sokoban_solver_is_as_short_as_brute_force(seed):
    env = Sokoban(dim_room=(6, 6), num_boxes=2, max_turns=40)
    env.reset(seed=seed)
    moves = solve(env.room, env.player, frozenset(env.boxes))
    assert len(moves) == brute_force(env.room, env.player, env.boxes) <= 40
    assert lower_bound(env.room)(frozenset(env.boxes)) <= len(moves)


def test_a_dead_sokoban_position_has_no_plan():
    env = Sokoban(dim_room=(5, 5))
    env.reset(seed=0)
    env.room = env.room._replace(
        floor=frozenset(itertools.product(range(1, 4), repeat=2)), targets=frozenset({(2, 2)})
    )
    env.player, env.boxes = (2, 2), {(1, 1)}
    assert solve(env.room, env.player, frozenset(env.boxes)) is None is env.demonstrator_action()


def test_sokoban_looks_and_pays_as_gym_sokoban_does():
    env = Sokoban(dim_room=(5, 6), max_turns=30)
    env.reset(seed=0)
    env.room = env.room._replace(
        floor=frozenset((2, column) for column in range(1, 5)), targets=frozenset({(2, 3)})
    )
    env.player, env.boxes = (2, 1), {(2, 2)}
    assert env._board().splitlines()[3] == "#PXO_#"
    env.room = env.room._replace(
        targets=frozenset({(2, 3), (2, 4)})
    )  # one target too many: the game goes on
    rewards = [
        env.step("Right")[1],
        env.step("Right")[1],
        env.step("Right")[1],
        env.step("Left")[1],
        env.step("what?")[1],
    ]
    assert rewards == pytest.approx(
        [0.9, -0.1, -0.1, -0.1, -0.1]
    )  # onto a target; from one to the other; wall; back; no action
    env.room, env.player, env.boxes = (
        env.room._replace(targets=frozenset({(2, 2)})),
        (2, 1),
        {(2, 2)},
    )
    assert env.step("Right")[1] == pytest.approx(-1.1)  # off the target
    env.room, env.player, env.boxes = (
        env.room._replace(targets=frozenset({(2, 3), (2, 1)})),
        (2, 1),
        {(2, 2)},
    )
    assert env._board().splitlines()[3] == "#SXO_#"
    env.room = env.room._replace(targets=frozenset({(2, 3)}))
    _, reward, terminated, _, info = env.step("Right")
    assert (reward, terminated, info["ending"]) == (pytest.approx(10.9), True, "success")
    assert info["suffix"].splitlines()[3] == "#_P√_#"


def test_sokoban_rewards_without_shaping_are_the_outcome():
    env = Sokoban(shaped=False)
    env.reset(seed=3)
    rewards = [env.step("nothing")[1]]
    while not env._over:
        rewards.append(env.step(env.demonstrator_action())[1])
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(5, 9),
    columns=st.integers(5, 9),
    boxes=st.integers(1, 2),
)
def test_sokoban_rooms_are_whole(seed, rows, columns, boxes):
    env = Sokoban(dim_room=(rows, columns), num_boxes=min(boxes, (rows - 2) * (columns - 2) // 6))
    env.reset(seed=seed)
    assert len(env.boxes) == len(env.room.targets) == env.num_boxes
    assert not env.boxes & env.room.targets and env.player not in env.boxes
    assert env.boxes | env.room.targets | {env.player} <= env.room.floor
    assert all(0 < row < rows - 1 and 0 < column < columns - 1 for row, column in env.room.floor)


def test_hanoi_demonstrators_solution_is_a_shortest_one():
    # The towers of disks 1, 2 and 3. Moves can be undone, so the search starts at the goal.
    distance = {("C", "C", "C"): 0}
    queue = deque(distance)
    while queue:
        state = queue.popleft()
        for disk, target in itertools.product(range(3), "ABC"):
            if target != state[disk] and not any(
                state[smaller] in (state[disk], target) for smaller in range(disk)
            ):
                after = (*state[:disk], target, *state[disk + 1 :])
                if after not in distance:
                    distance[after] = distance[state] + 1
                    queue.append(after)
    assert len(distance) == 27
    for state, moves in distance.items():
        towers = {
            tower: [disk for disk in (3, 2, 1) if state[disk - 1] == tower] for tower in "ABC"
        }
        taken = 0
        while len(towers["C"]) < 3:
            source, target = next_move(towers)
            towers[target].append(towers[source].pop())
            assert towers[target] == sorted(towers[target], reverse=True)
            taken += 1
        assert taken == moves


def test_hanoi_refuses_what_the_rules_forbid():
    env = TowerOfHanoi()
    env.reset(seed=0)
    env.towers = {"A": [3, 1], "B": [2], "C": []}
    for move, says in {
        "B A": "disk 2 is larger than disk 1",
        "C A": "tower C is empty",
        "A A": "the same",
    }.items():
        observation, reward, _, _, info = env.step(move)
        assert says in observation and reward == 0.0 and not info["metrics"]["action_is_effective"]
    assert env.step("a -> c")[4]["action"] == "A C" and env.towers == {"A": [3], "B": [2], "C": [1]}


def test_the_marks_of_a_guess():
    assert mark("about", "about") == "GGGGG"
    assert mark("abbey", "babes") == "YYGGX"
    assert mark("steel", "eerie") == "YYXXX"  # two e's, and no third
    assert mark("world", "lllll") == "XXXGX"


@given(
    secret=st.sampled_from(WORDS),
    guess=st.text("abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=5),
)
def test_marks_count_each_letter_of_the_secret_once(secret, guess):
    marks = mark(secret, guess)
    for letter in set(guess):
        marked = sum(m != "X" for m, guessed in zip(marks, guess, strict=True) if guessed == letter)
        assert marked == min(secret.count(letter), guess.count(letter))
    assert all((m == "G") == (a == b) for m, a, b in zip(marks, secret, guess, strict=True))


def test_the_word_list_is_one():
    assert len(WORDS) == len(set(WORDS)) > 300
    assert all(len(word) == 5 and word.isalpha() and word.islower() for word in WORDS)


def test_every_word_is_found_within_six_guesses():
    def worst(candidates):
        guess = best_guess(candidates)
        parts = {}
        for word in candidates:
            parts.setdefault(mark(word, guess), []).append(word)
        return 1 + max(
            (worst(tuple(part)) for marks, part in parts.items() if marks != "GGGGG"), default=0
        )

    assert worst(WORDS) <= 6


@given(low=st.integers(-1000, 1000), width=st.integers(1, 5000), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_halving_finds_every_number_in_time(low, width, seed):
    env = GuessTheNumber(min_number=low, max_number=low + width)
    env.reset(seed=seed)
    while not env._over:
        info = env.step(env.demonstrator_action())[4]
    assert info["ending"] == "success"


def test_hints_tell_the_truth():
    env = GuessTheNumber(max_turns=200)
    env.reset(seed=7)
    for guess in random.Random(0).sample(range(1, 101), 50):
        if guess == env.number:
            continue
        observation = env.step(f"<answer>{guess}</answer>")[0]
        assert observation.endswith(
            f"the number is {'lower' if env.number < guess else 'higher'} than {guess}."
        )
    assert "outside the range" in env.step("1000")[0]
    assert Wordle().max_turns == 6
