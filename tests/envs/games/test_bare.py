"""The bare forms of FrozenLake and Sokoban: the same boards and rules, shown without words."""

import random

import pytest

from envs.games import GAMES, Sokoban
from envs.gem import make
from envs.sources import load_tasks, open_source

BARE = {"game/frozen_lake-bare": "game/frozen_lake", "game/sokoban-bare": "game/sokoban"}
DIRECTIONS = ["Up", "Down", "Left", "Right"]


@pytest.mark.parametrize("name", BARE)
def test_the_bare_game_is_the_game_with_words_on_every_board(name):
    rng = random.Random(name)
    for seed in range(100):
        bare = make(name)
        full = make(BARE[name], max_turns=10, state_in="observation")
        shown, _ = bare.reset(seed)
        told, _ = full.reset(seed)
        info = {}
        while "ending" not in info:
            assert set(shown) <= set("P_OG#XS√\n")
            rows = shown.splitlines()
            if isinstance(full, Sokoban):
                rows = ["######", *(f"#{row}#" for row in rows), "######"]
            assert told.splitlines()[-len(rows) :] == rows
            turn = rng.choice([*DIRECTIONS, "fly"])
            shown, *result, info = bare.step(turn)
            told, *expected, full_info = full.step(turn)
            assert result == expected
            assert info.get("ending") == full_info.get("ending")


@pytest.mark.parametrize("name", BARE)
def test_the_demonstrator_of_a_bare_game_writes_the_direction_alone(name):
    env = make(name)
    for seed in range(20):
        env.reset(seed)
        info = {}
        while "ending" not in info:
            action = env.demonstrator_action()
            assert action in DIRECTIONS
            *_, info = env.step(action)
        assert info["ending"] == "success"


def test_bare_games_are_named_alone_and_are_no_part_of_all_games():
    assert all(name in GAMES for name in BARE)
    assert not any("bare" in family for family in open_source("games").families)
    (task,) = load_tasks("gem:game/sokoban-bare")[:1]
    assert task.has_demonstrator
    assert task.max_turns == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        (n, *r)
        for n, r in {
            "game/frozen_lake-bare": (0.20, 0.26),
            "game/sokoban-bare": (0.010, 0.035),
        }.items()
    ],
)
def test_random_moves_solve_what_the_page_of_results_says(name, low, high):
    env = make(name)
    rng = random.Random(0)
    won = 0
    for seed in range(5000):
        env.reset(seed)
        info = {}
        while "ending" not in info:
            *_, info = env.step(rng.choice(DIRECTIONS))
        won += info["ending"] == "success"
    assert low < won / 5000 < high
