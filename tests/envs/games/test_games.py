"""Every game: seeded, winnable by its demonstrator, deaf to no text, copyable in the middle."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.games import GAMES
from envs.games.base import as_answer
from envs.gem import format_tool_call, make

NAMES = sorted(GAMES)
SLOW_DEMONSTRATORS = {"game/sokoban-10x10"}  # seconds of search in the worst case
MARKUP = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "Up",
        "up",
        "42",
        "A C",
        "about",
        "<|im_end|>",
        '{"name": "move", "arguments": {"direction": "Up"}}',
        "<function=move>",
        "\ud800",
        "\0",
        "9" * 5000,
        "٣",
        "[" * 3000,
    ]
)
TURNS = st.lists(st.one_of(MARKUP, st.text(max_size=6)), max_size=8).map("".join)


def play(env, seed=None, turns=10**9):
    """(rewards, ending) of the demonstrator's episode."""
    env.reset(seed)
    rewards, info = [], {}
    while "ending" not in info and len(rewards) < turns:
        _, reward, _, _, info = env.step(env.demonstrator_action())
        rewards.append(reward)
    return rewards, info.get("ending")


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in SLOW_DEMONSTRATORS and "slippery" not in name]
)
def test_the_demonstrator_wins_every_game(name):
    env = make(name)
    assert [play(env, seed)[1] for seed in range(12)] == ["success"] * 12


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "slippery" not in name])
def test_the_demonstrator_wins_hundreds_of_games(name):
    env = make(name)
    lost = [
        seed
        for seed in range(300 if name not in SLOW_DEMONSTRATORS else 60)
        if play(env, seed)[1] != "success"
    ]
    assert lost == []


def test_the_demonstrator_wins_most_slippery_games():
    env = make("game/frozen_lake-slippery")
    assert (
        sum(play(env, seed)[1] == "success" for seed in range(30)) >= 24
    )  # 91 of 100 when measured; the ice decides the rest


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_the_episode(name):
    one, other = make(name), make(name, seed=99)
    assert one.reset(seed=5) == other.reset(5)
    actions = [one.sample_random_action() for _ in range(5)]
    assert [one.step(action) for action in actions if not one._over] == [
        other.step(action) for action in actions if not other._over
    ]
    begun = [one.reset(seed) for seed in range(20)]
    boards = {info.get("suffix", observation) for observation, info in begun}
    assert len(boards) > 5 or name in (
        "game/guess_the_number",
        "game/wordle",
    )  # those tell nothing at the beginning


@pytest.mark.parametrize("name", NAMES)
def test_resets_without_a_seed_begin_with_the_constructors_and_differ_then(name):
    one, other = make(name, seed=3), make(name, seed=3)
    first = [one.reset()[1]["seed"] for _ in range(4)]
    assert first[0] == 3 and len(set(first)) == 4
    other.reset()
    other.step("nonsense")  # what is played does not change what comes next
    assert [other.reset()[1]["seed"] for _ in range(3)] == first[1:]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=6))
def test_any_text_is_an_action(name, turns):
    env = make(name)
    env.reset(seed=1)
    for turn in turns:
        observation, reward, terminated, truncated, info = env.step(turn)
        assert isinstance(observation, str) and isinstance(reward, float)
        assert info["status"] == ("ok" if info["action"] is not None else "malformed")
        copy.deepcopy(info)
        if terminated or truncated:
            break


@pytest.mark.parametrize("name", ["game/frozen_lake", "game/wordle"])
@pytest.mark.parametrize(
    "text",
    ["<answer>" * 200_000, "\\boxed{" * 200_000, "<think>" * 200_000 + "</answer>" * 200_000],
)
def test_a_megabyte_of_markup_is_read_in_linear_time(name, text):
    env = make(name)
    env.reset()
    assert env.step(text)[4]["status"] == "malformed"  # the suite's time limit is the assertion


@pytest.mark.parametrize("name", NAMES)
def test_turns_without_an_action_end_at_max_turns_and_cost_the_penalty(name):
    env = make(name, format_penalty=-0.5)
    env.reset(seed=0)
    results = [env.step("I do not know") for _ in range(env.max_turns)]
    assert [result[3] for result in results] == [False] * (env.max_turns - 1) + [True]
    assert not any(result[2] for result in results)
    assert results[-1][4]["ending"] == "truncated_turns"
    expected = -0.6 if "sokoban" in name else -0.5
    assert all(result[1] == pytest.approx(expected) for result in results)
    assert "valid action" in results[0][0] or name.endswith("-bare")  # which says nothing
    with pytest.raises(RuntimeError, match="reset"):
        env.step("again")


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_in_the_middle_goes_on_alike_and_apart(name):
    env = make(name)
    play(env, seed=4, turns=1)
    if env._over:
        play(env, seed=6, turns=1)
    for twin in (copy.deepcopy(env), env.spawn(same_state=True)):
        original = copy.deepcopy(env)
        while True:
            action = original.sample_random_action()
            result = original.step(action)
            assert twin.step(action) == result
            if result[2] or result[3]:
                break
    assert not env._over  # the copies' ends were not its own


def test_spawn_without_state_is_a_new_game_of_the_same_settings():
    env = make("game/sokoban", num_boxes=2, dim_room=(7, 8), max_turns=33, shaped=False, seed=5)
    env.reset()
    twin = env.spawn(seed=6)
    assert twin.reset()[1]["seed"] == 6
    assert (twin.num_boxes, twin.dim_room, twin.max_turns, twin.shaped) == (2, (7, 8), 33, False)
    with pytest.raises(ValueError, match="num_boxes"):
        env.spawn(same_state=True, num_boxes=3)


def test_get_state_and_set_state_go_back():
    env = make("game/tower_of_hanoi")
    env.reset(seed=2)
    state, move = env.get_state(), env.demonstrator_action()
    first = env.step(move)
    env.set_state(state)
    assert env.step(move) == first


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("game/frozen_lake", {"size": 1}),
        ("game/frozen_lake", {"size": 33, "max_turns": 100}),
        ("game/frozen_lake", {"max_turns": 3}),
        ("game/frozen_lake", {"p": 1.5}),
        ("game/sokoban", {"num_boxes": 9}),
        ("game/sokoban", {"dim_room": (4, 4)}),
        ("game/sokoban", {"max_turns": 0}),
        ("game/guess_the_number", {"min_number": 5, "max_number": 5}),
        ("game/guess_the_number", {"max_turns": 6}),
        ("game/tower_of_hanoi", {"num_disks": 13}),
        ("game/tower_of_hanoi", {"max_turns": 6}),
        ("game/wordle", {"state_in": "nowhere"}),
    ],
)
def test_settings_that_cannot_be_won_are_refused(name, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(name, **arguments)


def test_the_forms_of_an_action():
    forms = {
        as_answer("down"): None,
        "\\boxed{Down}": None,
        "DOWN<|im_end|>": None,
        "<think>Up? <answer>Up</answer></think> so <answer>Down</answer>": None,
        format_tool_call("move", {"direction": "Down"}): "move",
        "<function=move><parameter=direction>Down</parameter></function>": "move",
    }
    for form, tool_name in forms.items():
        env = make("game/frozen_lake")
        env.reset(seed=0)
        info = env.step(form)[4]
        assert (info["action"], info["tool_type"], info["use_tool"]) == (
            "Down",
            tool_name,
            tool_name is not None,
        ), form
        assert list(info["tool_arguments"].values()) == (["Down"] if tool_name else []), form
        assert info["parsed_action"] == ("Down" if tool_name else form)
    env.reset(seed=0)
    assert env.step("<think>go Up</think><answer>Down</answer>")[4]["think_content"] == "go Up"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (format_tool_call("bash", {"command": "ls"}), "the tool is move(direction)"),
        (format_tool_call("move", {"direction": ["Up"]}), "the tool is move(direction)"),
        (format_tool_call("move", {"direction": "Up"}) * 2, "2 tool calls"),
        (format_tool_call("move", {"direction": "Up"})[: -len("</tool_call>")], "no </tool_call>"),
        ("<think>Up is right", "the turn ends within its thoughts"),
    ],
)
def test_a_wrong_tool_call_is_told_what_is_wrong(call, says):
    env = make("game/sokoban")
    env.reset()
    assert says in env.step(call)[0]


def test_the_board_stands_in_the_observation_where_that_is_asked_for():
    env = make("game/sokoban", state_in="observation")
    plain = make("game/sokoban")
    observation, info = env.reset(seed=1)
    instruction, plain_info = plain.reset(seed=1)
    assert observation == f"{instruction}\n{plain_info['suffix']}" and "suffix" not in info
    told, plain_told = env.step("<answer>Up</answer>"), plain.step("<answer>Up</answer>")
    assert told[0] == f"{plain_told[0]}\n{plain_told[4]['suffix']}" and "suffix" not in told[4]
