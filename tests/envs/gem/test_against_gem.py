"""Against gem-llm 0.1.0 itself: its wrappers, vectors and loops over our environments, and ours
over its, word for word.
"""

import asyncio
import contextlib
import copy
import io
import random

import numpy as np
import pytest

import envs.gem as ours
from envs.games import GAMES
from envs.gem import wrapper_factory as our_factory
from envs.gem.tools import BM25Index, PythonCodeTool, SearchTool, ShellTool, ToolEnvWrapper
from envs.rock import SandboxConfig
from rome.agent.loop import Limits, run_episode
from tests.envs.gem.worlds import Counter
from tests.rome.rollout.worlds import CHAT, ScriptedEngine

pytestmark = [pytest.mark.slow, pytest.mark.live]
try:
    import gem
    from gem.tools.python_code_tool import PythonCodeTool as GemPythonCodeTool
    from gem.tools.tool_env_wrapper import ToolEnvWrapper as GemToolEnvWrapper
    from gem.utils.debug import run_and_print_episode, run_and_print_episode_with_selective_step
    from gem.vector.async_vector_env import AsyncVectorEnv as GemAsyncVectorEnv
    from gem.wrappers import wrapper_factory as gem_factory
    from gem.wrappers.observation_wrapper import ObservationWrapper as GemObservationWrapper
except ImportError as missing:
    pytest.skip(
        f"gem-llm is not installed ({missing}); pip install -r tests/requirements-live.txt",
        allow_module_level=True,
    )

CONFIG = SandboxConfig(isolation="best_available")
GEM_GAMES = [
    "game:GuessTheNumber-v0-easy",
    "game:Mastermind-v0-easy",
    "game:TowerofHanoi-v0-easy",
    "game:Sokoban-v0-easy",
    "game:Minesweeper-v0-easy",
    "game:FifteenPuzzle-v0-easy",
    "game:Game2048-v0-easy",
    "rg:leg_counting",
]
OUR_GAMES = sorted(GAMES)


class Tokenizer:
    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        return (
            "".join(f"<|{message['role']}|>{message['content']}" for message in conversation)
            + "<|assistant|>"
        )


def episode(env, seed=5, turns=6):
    """Everything that a trainer sees of some turns of chance; gem's games draw from the global
    generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    seen = [copy.deepcopy(env.reset(seed=seed))]
    for turn in range(turns):
        action = random_action(env)
        seen.append(copy.deepcopy(env.step(action if turn % 3 else f"Let me think. {action}")))
        if seen[-1][2] or seen[-1][3]:
            break
    seen.append(copy.deepcopy(env.reset(seed=seed + 1)))
    return seen


def random_action(env):
    try:
        return env.unwrapped.sample_random_action()
    except NotImplementedError:  # some of gem's have none
        return "\\boxed{A C}"


def quietly(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def test_ours_are_gems_environments_and_known_to_gem():
    for name in OUR_GAMES:
        assert isinstance(ours.make(name), gem.Env)
        assert name in gem.envs.registration.ENV_REGISTRY
        assert episode(gem.make(name, seed=3)) == episode(ours.make(name, seed=3))
    with pytest.raises(ValueError):
        gem.register("game/wordle", "elsewhere:Wordle")


@pytest.mark.parametrize("name", GEM_GAMES)
def test_gems_environments_are_made_by_ours(name):
    env = ours.make(name)
    assert type(env).__module__.startswith("gem.") and env.env_id == name
    assert episode(env) == episode(gem.make(name))


@pytest.mark.parametrize(
    "wrappers",
    [
        "concat",
        "concat_with_action",
        "concat_chat",
        "concat_chat_on_reset",
        "episode_tracking",
        "concat,episode_tracking",
        "concat_chat,episode_tracking",
    ],
)
@pytest.mark.parametrize("name", [*OUR_GAMES, *GEM_GAMES])
def test_wrappers_say_word_for_word_what_gems_say(name, wrappers):
    def wrapped(factory):
        env = ours.make(name, seed=1)
        for wrapper in quietly(factory.get_wrapper_fns, wrappers, tokenizer=Tokenizer()):
            env = wrapper(env)
        return env

    assert episode(wrapped(our_factory)) == episode(wrapped(gem_factory))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_bounded_histories_are_gems(length):
    options = dict(include_chat_template=False, max_history_length=length)
    assert episode(ours.ObservationWrapper(ours.make("game/wordle"), **options)) == episode(
        GemObservationWrapper(ours.make("game/wordle"), **options)
    )


def test_our_wrappers_inside_gems_and_gems_inside_ours():
    inside = gem_factory.EpisodeTrackingWrapper(
        ours.ObservationWrapper(ours.make("game/sokoban"), include_chat_template=False)
    )
    outside = ours.EpisodeTrackingWrapper(
        GemObservationWrapper(ours.make("game/sokoban"), include_chat_template=False)
    )
    assert episode(inside) == episode(outside)
    assert (
        inside.unwrapped.family
        == outside.unwrapped.family
        == inside.family
        == outside.family
        == "sokoban"
    )


def without_finals(infos):
    return [
        {name: value for name, value in info.items() if not name.startswith("final_")}
        for info in infos
    ]


@pytest.mark.parametrize("async_mode", [False, True])
@pytest.mark.parametrize("wrappers", ["", "concat_with_action,episode_tracking"])
def test_gems_vectors_over_ours_are_our_vectors(async_mode, wrappers):
    ids = [
        "game/frozen_lake",
        "game/wordle",
        "game/sokoban",
        "game/frozen_lake",
        "game/tower_of_hanoi",
    ]
    theirs = quietly(
        gem.make_vec,
        ids,
        wrappers=quietly(gem_factory.get_wrapper_fns, wrappers),
        async_mode=async_mode,
        seed=11,
    )
    mine = ours.make_vec(
        ids, wrappers=our_factory.get_wrapper_fns(wrappers), async_mode=async_mode, seed=11
    )
    assert theirs.reset() == mine.reset()
    draw = random.Random(0)
    ended = 0
    for turn in range(40):
        actions = [env.unwrapped.sample_random_action() for env in mine.envs]
        if turn % 4 == 3:
            actions = {index: actions[index] for index in draw.sample(range(len(ids)), 3)}
        there, here = theirs.step(actions), mine.step(actions)
        assert there[0] == here[0] and without_finals(here[4]) == there[4]
        for one, other in zip(there[1:4], here[1:4], strict=True):
            assert one.dtype == other.dtype and one.tolist() == other.tolist()
        ended += sum("final_obs" in info for info in here[4])
    assert ended > 5
    assert theirs.reset(seed=3) == mine.reset(seed=3)
    mine.close()


def test_our_vectors_over_gems_environments():
    ids = ["game:TowerofHanoi-v0-easy"] * 3
    theirs, mine = quietly(gem.make_vec, ids, seed=2), ours.make_vec(ids, seed=2)
    results = []
    for vector in (theirs, mine):
        random.seed(1)
        results.append(
            [
                vector.reset(seed=4),
                *(vector.step(["\\boxed{A C}", "\\boxed{A B}", "\\boxed{B C}"]) for _ in range(4)),
            ]
        )
    assert results[0][0] == results[1][0]
    for there, here in zip(results[0][1:], results[1][1:], strict=True):
        assert (there[0], there[4]) == (here[0], without_finals(here[4])) and [
            one.tolist() for one in there[1:4]
        ] == [one.tolist() for one in here[1:4]]
    threads = ours.make_vec(ids, async_mode=True)
    threads.reset()
    assert type(threads).__name__ == "AsyncVectorEnv" and len(threads.step(["x"] * 3)[0]) == 3
    threads.close()


def test_gems_loops_play_our_environments(capsys):
    env = ours.make("game/guess_the_number", seed=4)
    run_and_print_episode(env, lambda observation: env.demonstrator_action())
    assert "terminated:  True truncated:  False" in capsys.readouterr().out
    vector = ours.make_vec(["game/frozen_lake"] * 3, seed=1)
    run_and_print_episode(
        vector, lambda observations: vector.sample_random_action(), ignore_done=True, max_steps=5
    )
    np.random.seed(0)
    run_and_print_episode_with_selective_step(
        vector, lambda observations: vector.sample_random_action(), ignore_done=True, max_steps=5
    )
    assert capsys.readouterr().out.count("Step ") == 10


@pytest.mark.parametrize(
    "code", ["print(6*7)", "print('a'); print('b')", "import math\nprint(math.pi)", "x = 1", "..."]
)
def test_python_tools_answer_alike(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # gem's tool runs here, in a process of this user
    for action in (
        f"try <python>{code}</python> rest",
        f"try ```python\n{code}\n``` rest",
        f"```\npython\n{code}```",
    ):
        assert PythonCodeTool(sandbox_config=CONFIG).execute_action(
            action
        ) == GemPythonCodeTool().execute_action(action)


def test_errors_of_python_tools_end_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in ("1/0", "print('x')\nraise KeyError('y')", "syntax error", "undefined_name"):
        action = f"<python>{code}</python>"
        mine = PythonCodeTool(sandbox_config=CONFIG, keep_error_last_line=True).execute_action(
            action
        )
        theirs = GemPythonCodeTool(keep_error_last_line=True).execute_action(action)
        assert (
            mine == theirs or code == "undefined_name"
        )  # gem's second run fails at an import of its own where pandas is missing
        assert mine[:2] == theirs[:2] == (True, True)


@pytest.mark.parametrize("max_tool_uses", [1, 3, None])
def test_tool_wrappers_are_gems(max_tool_uses):
    tools = [PythonCodeTool(sandbox_config=CONFIG)]
    turns = [
        "<python>print(1)</python>",
        "no tool",
        "<python>1/0</python>",
        "<python>print(2)</python> and words",
        "the end",
    ]
    seen = []
    for kind in (ToolEnvWrapper, GemToolEnvWrapper):
        env = kind(
            Counter(length=9),
            tools,
            tool_reward=0.05,
            tool_success_reward=0.25,
            max_tool_uses=max_tool_uses,
        )
        seen.append([env.reset(seed=1), *map(env.step, turns), env.reset(seed=2)])
    assert seen[0] == seen[1]


def test_all_our_tools_serve_gems_wrapper():
    shell = ShellTool(sandbox_config=CONFIG)
    tools = [
        SearchTool(BM25Index([("cats", "cats purr")])),
        PythonCodeTool(sandbox_config=CONFIG),
        shell,
    ]
    env = gem_factory.EpisodeTrackingWrapper(GemToolEnvWrapper(ours.make("game/wordle"), tools))
    assert "Available tools:" in env.reset(seed=1)[0]
    assert "cats purr" in env.step("<search>purr</search>")[0]
    assert env.step("<python>print(3)</python>")[0] == "Code execution result: 3\n\n"
    assert env.step("<bash>echo 4</bash>")[0] == "Command output: 4\n"
    assert env.step("<answer>about</answer>")[4]["step_counter"] == 4
    shell.close()


def test_gems_thread_pool_runs_our_sandboxes():
    import envs.tasks.terminal  # noqa: F401  (registers the terminal families)

    vector = quietly(
        gem.make_vec, ["terminal/count"] * 3, async_mode=True, seed=1, sandbox_config=CONFIG
    )
    assert isinstance(vector, GemAsyncVectorEnv)
    vector.reset()
    observations, *_, infos = vector.step(
        [ours.format_tool_call("bash", {"command": f"echo {index}"}) for index in range(3)]
    )
    assert observations == ["0", "1", "2"] and [info["status"] for info in infos] == ["ok"] * 3
    for env in vector.envs:
        env.close()


@pytest.mark.parametrize("game", GEM_GAMES)
def test_our_agent_loop_plays_its_games_to_their_end(game):
    """They have no task, no typed endings, and nothing asynchronous; some put a board into info."""
    env = gem.make(game)
    engine = ScriptedEngine([random_action(env) for _ in range(60)])
    limits = Limits(max_context=6000, max_new_tokens=200)
    trajectory = asyncio.run(run_episode(engine, env, CHAT, limits, seed=1))
    assert trajectory.ending in ("success", "failure", "truncated_turns", "truncated_tokens")
    assert trajectory.chunks and trajectory.task == game
    if trajectory.ending == "success":
        assert trajectory.succeeded
