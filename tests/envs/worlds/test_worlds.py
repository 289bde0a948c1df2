"""Every world: solvable by its demonstration, not by doing nothing, claiming or guessing;
deterministic; deaf to no text; a failed call changes nothing.
"""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem import ToolCall, format_tool_call, make, make_vec, parse_tool_calls
from envs.worlds import WORLD_IDS
from envs.worlds.scenario import format_call
from envs.worlds.tools import ToolRefusal, digest
from tests.envs.worlds.playing import demonstrate, play
from tests.paths import ROOT

STATUSES = {"ok", "tool_error", "malformed"}
ENDINGS = {"success", "failure", "truncated_turns", "malformed"}


def check_seed(env, seed):
    """What makes a scenario sound."""
    reward, info, _ = demonstrate(env, seed)
    assert (reward, info["ending"]) == (1.0, "success"), (env.task, info["note"])
    reward, info, _ = play(env, [], seed)
    assert (reward, info["ending"]) == (0.0, "failure"), env.task
    for trick, actions in env.cheats().items():
        assert play(env, actions, seed)[0] == 0.0, (env.task, trick)


@pytest.mark.parametrize("name", WORLD_IDS)
def test_the_demonstrator_earns_1_and_nothing_and_cheats_earn_0(name):
    env = make(name)
    for seed in range(4):
        check_seed(env, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLD_IDS)
def test_hundreds_of_scenarios_are_sound(name):
    env = make(name)
    for seed in range(1000, 1300):
        check_seed(env, seed)


@pytest.mark.parametrize("name", WORLD_IDS)
def test_the_demonstrator_writes_only_with_ids_it_has_seen_and_words_it_was_told(name):
    env = make(name)
    for seed in range(8):
        seen, _ = env.reset(seed)
        seen += json.dumps(env.tools)
        for action in env.scenario.demonstration:
            for call in parse_tool_calls(action):
                for value in (
                    one
                    for argument in call.arguments.values()
                    for one in (argument if isinstance(argument, list) else [argument])
                ):
                    assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", seen), (
                        env.task,
                        call,
                    )
            observation = env.step(action)[0]
            seen += f"\n{observation}"


@pytest.mark.parametrize("name", WORLD_IDS)
def test_one_golden_action_less_or_one_write_more_is_a_failure(name):
    env = make(name)
    for seed in range(4):
        env.reset(seed)
        scenario = env.scenario
        writes = [format_call(call) for call in scenario.golden]
        talk = [
            action
            for action in scenario.demonstration
            if not parse_tool_calls(action) and "?" not in action
        ]
        if writes and "gui" not in name:  # a click left out may be one too many
            for left_out in range(len(writes)):
                assert play(env, writes[:left_out] + writes[left_out + 1 :] + talk, seed)[0] == 0.0
        if "gui" not in name:
            assert play(env, writes + talk, seed)[0] == 1.0
            assert play(env, [*writes, format_call(_valid_write(env, seed)), *talk], seed)[0] == 0.0


def _valid_write(env, seed):
    """A write that succeeds and changes what counts after the golden actions."""
    env.reset(seed)
    after = copy.deepcopy(env.database)
    env.toolbox.replay(after, env.scenario.golden)
    while True:
        state, call = copy.deepcopy(after), env.world.random_write(env._random_actions, after)
        try:
            env.toolbox.call(state, call)
        except ToolRefusal:
            continue
        if digest(state) != digest(after):
            return call


def test_another_process_with_another_hash_seed_draws_the_same_scenarios():
    script = (
        "import hashlib\nfrom envs.gem import make\nfrom envs.worlds import WORLD_IDS\nwhole ="
        " hashlib.sha256()\nfor name in WORLD_IDS:\n    env = make(name)\n    for seed in (0, 7,"
        " 123456789):\n        env.reset(seed)\n        whole.update(env.definition().encode() +"
        " repr(env.scenario.demonstration).encode())\nprint(whole.hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process has another one
    seen = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    whole = hashlib.sha256()
    for name in WORLD_IDS:
        env = make(name)
        for seed in (0, 7, 123456789):
            env.reset(seed)
            whole.update(env.definition().encode() + repr(env.scenario.demonstration).encode())
    assert seen == f"{whole.hexdigest()}\n"


@pytest.mark.parametrize("name", WORLD_IDS)
def test_seeds_differ_and_resets_without_one_begin_with_the_constructors(name):
    env, other = make(name, seed=3), make(name, seed=3)
    assert len({(env.reset(seed), env.definition())[1] for seed in range(60)}) == 60
    first = [other.reset()[1]["seed"] for _ in range(3)]
    assert first[0] == 3 and len(set(first)) == 3


def values():
    return st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=8),
            st.just("9" * 5000),
            st.just("\ud800"),
            st.sampled_from(["e1", "e2", "2031-06-30", "T123", "[]", "true", "NaN"]),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
        ),
        max_leaves=4,
    )


@st.composite
def turn(draw, env):
    """A call of a tool with its arguments or others, a call of chance that is valid, markup, or
    speech.
    """
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(
            st.one_of(
                st.text(max_size=30),
                st.sampled_from(
                    [
                        "<tool_call>",
                        "</tool_call>",
                        "<tool_call>{}</tool_call>",
                        "<think>?</think>",
                        "",
                        "?" * 3000,
                        "<function=look>",
                        '<tool_call>{"name": "look", "arguments": ' + "[" * 5000 + "}</tool_call>",
                    ]
                ),
            )
        )
    if kind < 3:
        tool = draw(st.sampled_from(env.world.tools))
        return format_call(
            ToolCall(
                tool.name, draw(st.fixed_dictionaries({name: values() for name in tool.parameters}))
            )
        )
    if kind == 3:
        return format_call(
            ToolCall(
                draw(st.sampled_from(["look", "rm", "get_product", "select"])),
                draw(st.dictionaries(st.sampled_from(["ref", "x", "email"]), values())),
            )
        )
    return env.sample_random_action()


@pytest.mark.long
@pytest.mark.parametrize("name", ["rome:travel/hard", "rome:shop/hard", "rome:gui/hard"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_text_is_an_action_and_a_failed_call_changes_nothing(name, data):
    env = make(name, max_malformed=100)
    env.reset(seed=data.draw(st.integers(0, 5)))
    over = False
    while not over and env._turns < 8:
        before = json.dumps(env.database)
        observation, reward, terminated, truncated, info = env.step(data.draw(turn(env)))
        over = terminated or truncated
        observation.encode()
        assert (
            info["status"] in STATUSES
            and reward in (0.0, 1.0)
            and (not over or info["ending"] in ENDINGS)
        )
        if info["status"] != "ok":
            assert json.dumps(env.database) == before and (over or observation.startswith("Error"))
        json.dumps(env.database, allow_nan=False)
        json.dumps(copy.deepcopy(info), allow_nan=False)


@pytest.mark.parametrize("name", ["rome:travel/medium", "rome:shop/hard", "rome:gui/medium"])
def test_a_copy_in_the_middle_goes_on_alike_and_apart(name):
    env = make(name)
    env.reset(seed=2)
    script = env.scenario.demonstration
    for action in script[:3]:
        env.step(action)
    for twin in (copy.deepcopy(env), env.spawn(same_state=True)):
        results = [twin.step(action) for action in script[3:]]
        assert results[-1][1] == 1.0
    assert [env.step(action) for action in script[3:]] == results


def test_ends_are_typed():
    env = make("rome:shop/easy", max_turns=3, max_malformed=2)
    assert play(env, ["Why?"] * 3)[1]["ending"] == "truncated_turns"
    reward, info, _ = play(env, ["<tool_call>{", "<tool_call>}"])
    assert (reward, info["ending"], info["status"]) == (0.0, "malformed", "malformed")
    with pytest.raises(RuntimeError, match="reset"):
        env.step("again")


def test_several_calls_in_a_turn_are_answered_in_order_and_too_many_refused():
    env = make("rome:shop/easy")
    env.reset(seed=0)
    both = format_tool_call("list_products", {}) + format_tool_call(
        "list_orders", {"customer_id": "C1"}
    )
    observation, *_, info = env.step(both)
    assert (
        observation.startswith("{")
        and 'Error: customer "C1" does not exist' in observation
        and info["status"] == "tool_error"
        and info["tool_use_counter"] == 2
    )
    assert "at most 8" in env.step(format_tool_call("list_products", {}) * 9)[0]


def test_vectors_and_gymnasium_take_them():
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from envs.gem.gymnasium import ToGymnasium

    vector = make_vec(["rome:gui/easy", "rome:travel/easy"], seed=5)
    observations, _ = vector.reset()
    assert (
        observations[0] == make("rome:gui/easy", seed=5).reset()[0]
        and observations[1] == make("rome:travel/easy", seed=6).reset()[0]
    )
    assert vector.step(["Hello?", "Hello?"])[1].tolist() == [0.0, 0.0]
    vector.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec")
        check_env(ToGymnasium(make("rome:shop/medium")))


def test_the_rest_service_serves_them():
    from envs.gem.remote import RemoteEnv
    from tests.envs.gem.test_server import TOKEN, serving

    with serving() as (url, _):
        remote, here = (
            RemoteEnv(url, "rome:travel/easy", token=TOKEN, seed=4),
            make("rome:travel/easy", seed=4),
        )
        assert remote.reset()[0] == here.reset()[0]
        for action in here.scenario.demonstration:
            theirs, ours = remote.step(action), here.step(action)
            assert theirs[:4] == ours[:4]
        assert theirs[1] == 1.0
        remote.close()


@pytest.mark.parametrize(
    "arguments", [{"level": "extreme"}, {"max_turns": 0}, {"max_malformed": 0}]
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make("rome:shop/easy", **arguments)
