"""TerminalEnv: every text is an action, every ending has a type, and only the verifier gives
reward.
"""

import asyncio
import copy
import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.gem import format_tool_call, make
from envs.rock import SandboxConfig, SandboxError, probe
from envs.tasks.terminal import make_task
from envs.tasks.terminal.env import (
    MAX_COMMAND_BYTES,
    MissingProgramsError,
    TerminalEnv,
    read_command,
    trim,
)
from envs.tasks.terminal.reward import VerifierError, parse_reward

CONFIG = SandboxConfig(isolation="best_available")
PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '\n{"name": "bash", "arguments": {"command": "',
        '"}}\n',
        "<function=bash>",
        "</function>",
        "<parameter=command>",
        "</parameter>",
        "\\ud800",
        "\\u0000",
        "\0",
        "ls",
        "exit 3",
        "kill -9 $$",
    ]
)
TURNS = st.one_of(
    st.text(), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=10).map("".join)
)


def bash(command):
    return format_tool_call("bash", {"command": command})


@pytest.fixture
def env():
    env = TerminalEnv("count/3", CONFIG, max_observation_chars=50)
    yield env
    env.close()


# -- one turn
# -------------------------------------------------------------------------------------------------


def test_reset_gives_the_instruction(env):
    observation, info = env.reset()
    assert observation == make_task("count", 3).instruction
    assert (info["task"], info["family"], info["seed"]) == ("count/3", "count", 3)


@pytest.mark.parametrize(
    ("programs", "setup", "error", "says"),
    [
        (("no-such", "ls", "nor-this"), "true", MissingProgramsError, "no-such, nor-this in"),
        (("ls",), "no_such_command", SandboxError, "exit 127"),
        (("ls",), "false; true", SandboxError, "exit 1:"),  # it stops at the first failure
        (("ls",), "echo odd; exit 90", SandboxError, "exit 90"),
        ((), '[ -z "${p+x}${missing+x}" ]', None, ""),  # it sees no variables of the check
    ],
)
def test_a_setup_that_fails_is_told_from_programs_that_are_missing(programs, setup, error, says):
    task = dataclasses.replace(make_task("count", 3), programs=programs, setup=setup)
    env = TerminalEnv(task, CONFIG)
    try:
        if error is None:
            env.reset()
            return
        with pytest.raises(error, match=says):
            env.reset()
    finally:
        env.close()


def test_a_command_runs_among_the_tasks_files_and_its_output_is_the_observation(env):
    env.reset()
    ((path, (content, _)),) = make_task("count", 3).files.items()
    observation, reward, terminated, truncated, info = env.step(bash(f"head -n 1 {path}"))
    assert observation == content.decode().splitlines()[0]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (
        info["status"] == "ok"
        and info["exit_code"] == 0
        and info["use_tool"]
        and info["tool_type"] == "bash"
    )
    assert (
        info["parsed_action"] == f"head -n 1 {path}"
        and info["step_counter"] == 1
        and info["seconds"] > 0
    )
    assert "ending" not in info


@pytest.mark.parametrize(
    ("command", "observation", "status"),
    [
        ("true", "(no output)", "ok"),
        ("exit 3", "[exit 3]", "ok"),  # it ran: no failed call
        ("echo a; echo b >&2; false", "a\nb\n[exit 1]", "ok"),
        ("printf 'x%.0s' {1..60}", "x" * 50 + "... (10 more)", "ok"),
        ("printf '\\377\\n'", "\N{REPLACEMENT CHARACTER}", "ok"),
    ],
)
def test_what_the_model_sees_of_a_command(env, command, observation, status):
    env.reset()
    seen, _, terminated, _, info = env.step(bash(command))
    assert (seen, info["status"], terminated) == (observation, status, False)


def test_a_command_that_takes_too_long_is_an_observation(env):
    env._command_timeout = 0.3
    env.reset()
    observation, _, terminated, truncated, info = env.step(bash("echo begun; sleep 60"))
    assert (
        info["status"] == "timeout"
        and observation.endswith("[timeout]")
        and not terminated
        and not truncated
    )
    assert env.step(bash("echo still here"))[0] == "still here"


def test_files_persist_between_commands_and_the_working_directory_does_not(env):
    env.reset()
    env.step(bash("mkdir d && cd d && echo x > f"))
    assert env.step(bash("cat d/f"))[0] == "x"


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ('<tool_call>\n{"name": "bash"', "no </tool_call>"),
        (format_tool_call("python", {"command": "1"}), "unknown tool 'python'"),
        (format_tool_call("bash", {}), "one argument"),
        (format_tool_call("bash", {"command": 3}), "one argument"),
        (format_tool_call("bash", {"command": "ls", "cwd": "/"}), "one argument"),
        (bash("ls") + bash("ls"), "2 tool calls"),
        (bash("a\0b"), "NUL"),
        (bash("x" * (MAX_COMMAND_BYTES + 1)), "longer than"),
        ('<tool_call>{"name": "bash", "arguments": {"command": "\\ud800"}}</tool_call>', "Unicode"),
    ],
)
def test_a_malformed_call_is_an_observation_that_says_why(action, says):
    env = TerminalEnv("count/3", CONFIG)
    env.reset()
    observation, reward, terminated, truncated, info = env.step(action)
    assert says in observation and len(observation) < 120
    assert (info["status"], reward, terminated, truncated) == ("malformed", 0.0, False, False)
    env.close()


# -- endings
# -------------------------------------------------------------------------------------------------


def test_a_turn_without_a_call_ends_the_episode_and_the_verifier_decides(env):
    env.reset()
    (path,) = env.task.files
    env.step(bash(f"grep -c {env.task.demonstrator().send(None).split()[2]} {path} > out.txt"))
    observation, reward, terminated, truncated, info = env.step("done")
    assert (observation, reward, terminated, truncated, info["ending"]) == (
        "",
        1.0,
        True,
        False,
        "success",
    )


def test_the_turn_limit_truncates_without_reward():
    env = TerminalEnv("count/3", CONFIG, max_turns=2)
    env.reset()
    env.step(bash("true"))
    observation, reward, terminated, truncated, info = env.step(bash("echo x"))
    assert (observation, reward, terminated, truncated, info["ending"]) == (
        "x",
        0.0,
        False,
        True,
        "truncated_turns",
    )


def test_three_malformed_calls_in_a_row_end_the_episode(env):
    env.reset()
    env.step("<tool_call>")
    env.step("<tool_call>")
    env.step(bash("true"))  # a good call begins the count anew
    assert [env.step("<tool_call>")[2] for _ in range(2)] == [False, False]
    _, reward, terminated, _, info = env.step("<tool_call>")
    assert (reward, terminated, info["ending"], info["status"]) == (
        0.0,
        True,
        "malformed",
        "malformed",
    )


@pytest.mark.parametrize("printed", ["nan", "inf", "-1", "2", "1e9", "yes", ""])
def test_a_verifier_without_a_usable_reward_ends_as_infra_verifier(printed):
    task = dataclasses.replace(
        make_task("count", 17), verifier=f"echo 1; echo '{printed}'" if printed else "true"
    )
    env = TerminalEnv(task, CONFIG)
    env.reset()
    _, reward, terminated, _, info = env.step("done")
    assert (reward, terminated, info["ending"]) == (0.0, True, "infra_verifier")
    assert "count/17" in info["note"] and repr(printed) in info["note"]


def test_a_verifier_that_waits_for_the_agents_files_is_a_failure(monkeypatch):
    monkeypatch.setattr("envs.tasks.terminal.env.VERIFIER_TIMEOUT_SECONDS", 0.5)
    env = TerminalEnv(
        dataclasses.replace(make_task("count", 17), verifier="cat trap; echo 1"), CONFIG
    )
    env.reset()
    env.step(bash("mkfifo trap"))
    _, reward, _, _, info = env.step("done")
    assert (reward, info["ending"]) == (0.0, "failure") and "count/17" in info["note"]


def test_a_sandbox_that_fails_ends_the_episode_as_infra_sandbox(env, monkeypatch):
    async def broken(self, *args, **kwargs):
        raise SandboxError("the machine is gone")

    env.reset()
    monkeypatch.setattr(type(env._sandbox), "execute", broken)
    _, reward, terminated, _, info = env.step(bash("ls"))
    assert (reward, terminated, info["ending"], info["status"]) == (
        0.0,
        True,
        "infra_sandbox",
        "infra",
    )
    assert "the machine is gone" in info["note"]


@pytest.mark.parametrize(
    "command",
    [
        "kill -9 -1",
        "chmod 000 .",
        "rm -rf /workspace/* /workspace/.[!.]* /workspace",
        "yes > big",
        "exec 1>&- 2>&-",
        "setsid sleep 100 & disown",
        "(sleep 100 &) ; exit 0",
        "echo 'exit 7' > /tmp/.bashrc; kill -STOP $$",
        "mkdir -p a; chmod 000 a; cd a",
    ],
)
def test_no_command_turns_a_failure_into_infrastructure(command):
    """infra_* is masked from the loss: an agent that could cause it could hide its failures."""
    env = TerminalEnv("count/3", CONFIG, command_timeout=1.0)
    env.reset()
    _, _, terminated, _, info = env.step(bash(command))
    if not terminated:
        _, reward, _, _, info = env.step("done")
        assert reward == 0.0
    assert info["ending"] == "failure", info


@pytest.mark.parametrize(
    "command",
    [
        "cat /dev/zero > big",
        "cat /dev/zero > /dev/shm/a; cat /dev/zero > /tmp/b",
        "for i in $(seq 64); do head -c 1M /dev/zero > $i; done",
    ],
)
@pytest.mark.parametrize("verifier", [None, "x=$(head -c 9M /dev/zero | tr '\\0' x); echo $x"])
def test_memory_filled_with_files_that_starves_the_verifier_is_a_failure(command, verifier):
    config = dataclasses.replace(CONFIG, memory_mb=24, disk_mb=23)
    task = make_task("count", 3)
    if verifier:
        task = dataclasses.replace(task, verifier=verifier)
    env = TerminalEnv(task, config, command_timeout=3.0)
    if "memory" not in probe().guarantees:
        pytest.skip("memory is not limited here")
    env.reset()
    _, _, terminated, _, info = env.step(bash(command))
    if not terminated:
        _, reward, _, _, info = env.step("done")
        assert reward == 0.0
    env.close()
    assert info["ending"] == "failure", info


@pytest.mark.long
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=3))
def test_no_text_raises_out_of_step(turns):
    async def episode():
        env = TerminalEnv("count/3", CONFIG, command_timeout=2.0)
        await env.areset()
        for turn in turns:
            _, reward, terminated, truncated, info = await env.astep(turn)
            assert reward == 0.0 and info["status"] in ("ok", "tool_error", "malformed", "timeout")
            if terminated or truncated:
                assert info["ending"] in ("failure", "malformed")
                break
        await env.aclose()

    asyncio.run(episode())


# -- GEM
# -------------------------------------------------------------------------------------------------


def test_make_builds_a_family_by_its_id_and_reset_takes_other_seeds():
    env = make("terminal/count", seed=17, sandbox_config=CONFIG)
    assert env.env_id == "terminal/count"
    assert env.reset()[1]["task"] == "count/17"
    drawn = env.reset()[1]["task"]
    assert drawn not in ("count/17", env.reset()[1]["task"])
    assert env.reset(4) == env.reset(seed=4)
    assert env.task.name == "count/4"
    env.close()
    env.close()  # twice is once


def test_two_environments_of_one_seed_draw_the_same_tasks():
    one, two = (make("terminal/find", seed=5, sandbox_config=CONFIG) for _ in range(2))
    one.sample_random_action()  # draws from a stream of its own
    assert [one.reset()[1]["task"] for _ in range(3)] == [two.reset()[1]["task"] for _ in range(3)]
    one.close()
    two.close()


def test_what_reset_and_step_return_can_be_copied(env):
    assert copy.deepcopy(env.reset()) and copy.deepcopy(env.step(bash("ls")))


def test_a_spawned_environment_plays_the_same_task_on_its_own(env):
    env.reset()
    env.step(bash("echo 1 > mine"))
    other = env.spawn()
    assert other.reset()[0] == env.task.instruction
    assert "mine" not in other.step(bash("ls"))[0] and "mine" in env.step(bash("ls"))[0]
    other.close()


def test_a_random_action_is_a_good_call(env):
    assert read_command(env.sample_random_action())


def test_stepping_a_finished_episode_is_refused(env):
    with pytest.raises(RuntimeError, match="reset"):
        env.step("done")


@pytest.mark.parametrize("arguments", [{}, {"task": "count/1", "family": "count"}])
def test_exactly_one_of_task_and_family_is_needed(arguments):
    with pytest.raises(ValueError, match="exactly one"):
        TerminalEnv(**arguments)


@pytest.mark.parametrize("name", ["count", "count/", "count/x", "/3", "nothing/3"])
def test_a_wrong_task_name_is_refused(name):
    with pytest.raises(ValueError):
        TerminalEnv(name)


# -- small pieces
# -------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_a_reward_is_in_0_to_1_or_an_error_that_names_the_task(text):
    try:
        assert 0.0 <= parse_reward(text, "count/17") <= 1.0
    except VerifierError as error:
        assert str(error).startswith("verifier of count/17 printed ")


def test_the_reward_is_the_last_line_that_is_not_empty():
    assert parse_reward("0\nnoise\n 0.5 \n\n", "t") == 0.5


def test_trim_keeps_short_text_and_counts_what_it_cuts():
    assert trim("abc", 3) == "abc"
    assert trim("abcde", 3) == "abc... (2 more)"
