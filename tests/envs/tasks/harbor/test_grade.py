"""Grading in real sandboxes: only a valid reward counts, and no agent can bring one about."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.rock import AgentFault, SandboxError
from envs.tasks.harbor import (
    EXAMPLES,
    HarborEnv,
    RewardError,
)
from envs.tasks.harbor.grade import pick, read_rewards
from tests.envs.tasks.harbor.conftest import CONFIG, PASSES
from tests.envs.tasks.harbor.playing import play


def test_tests_come_only_when_the_agent_is_dead_and_the_solution_never(harbor, run):
    folder = harbor(
        {
            "tests/test.sh": (
                "cp /tests/test.sh /app/copy; grep -l SECRET /app/* > /app/found; [ -s /app/seen ]"
                " && echo 0 > /logs/verifier/reward.txt || echo 1 > /logs/verifier/reward.txt #"
                " SECRET\n"
            )
        }
    )
    spy = (
        "(while :; do cat /tests/* /solution/* >> /app/seen 2> /dev/null; done) > /dev/null 2>&1 &"
        " setsid sh -c 'while :; do cat /tests/* >> /app/seen; done' > /dev/null 2>&1 & echo"
    )
    assert run(play(folder, spy, "sleep 0.2; ls /tests /solution"))[0] == 1.0


NO_VALID_REWARDS = [
    ("echo nan > /logs/verifier/reward.txt", "finite"),
    ("echo inf > /logs/verifier/reward.txt", "finite"),
    ("echo 1e9 > /logs/verifier/reward.txt", "from 0 to 1"),
    ("echo yes > /logs/verifier/reward.txt", "not one number"),
    ("true", "neither reward.txt nor reward.json"),
    ("echo 1 > /app/one; ln -s /app/one /logs/verifier/reward.txt", "not a regular file"),
    ("echo 1 > /app/one; ln /app/one /logs/verifier/reward.txt", "not a regular file"),
    ("mkdir /logs/verifier/reward.json", "not a regular file"),
    ("mkfifo /logs/verifier/reward.txt", "not a regular file"),
    (
        (
            "rm -rf /logs/verifier; mkdir /app/v; echo 1 > /app/v/reward.txt; ln -s /app/v"
            " /logs/verifier"
        ),
        "not a regular file",
    ),
    (
        ("echo 1 > /logs/verifier/reward.txt; echo '{\"reward\": 0}' > /logs/verifier/reward.json"),
        "reward.txt says 1 and reward.json says 0",
    ),
    ('echo \'{"a": 1, "b": 1}\' > /logs/verifier/reward.json', "none is named"),
    ("echo 1 > /logs/verifier/reward.txt; kill -9 $$", "killed"),
    ("echo 1 > /logs/verifier/reward.txt; kill -TERM $$; sleep 5", "killed"),
    ("echo 1 > /logs/verifier/reward.txt; kill -9 -1", "killed"),
]


def test_what_is_no_valid_reward_is_0_with_the_reason(harbor, run):
    """The agent made the tests do so: the reference solution has a verdict."""
    folders = []
    for number, (script, _) in enumerate(NO_VALID_REWARDS):
        tests = (
            f"if [ -f /app/out.txt ]; then echo 1 > /logs/verifier/reward.txt; else {script}; fi"
        )
        folders.append(harbor({"tests/test.sh": f"{tests}\n"}, name=f"task{number}"))

    async def together():
        return await asyncio.gather(*map(play, folders))

    for (script, note), (reward, info) in zip(NO_VALID_REWARDS, run(together()), strict=True):
        assert (reward, info["ending"]) == (0.0, "failure"), (script, info)
        assert note in info["note"], (script, info)


@pytest.mark.long
@pytest.mark.parametrize(
    "trick",
    [
        "echo 1 > /logs/verifier/reward.txt; chmod 000 /logs/verifier",
        "rm -rf /logs; ln -s /app /logs; mkdir /app/verifier; echo 1 > /app/verifier/reward.txt",
        "rm -rf /logs; echo 1 > /logs",
        "mkdir -p /tests/test.sh /tests/x; chmod 000 /tests/x",
        (
            "ln -s / /tests/root; rm -rf /logs/verifier; ln -s /app /logs/verifier; echo 1 >"
            " reward.txt"
        ),
        "mkfifo /logs/verifier/reward.txt",
        "cd /; chmod 000 /app; chmod 555 /logs",
        "mkdir /logs/verifier/reward.txt",
        "rm -rf /app /logs /root; touch /app",
        "head -c 300M /dev/zero > fill; true",
        "for i in $(seq 200); do sleep 100 & done; true",
    ],
)
def test_nothing_an_agent_leaves_in_the_way_earns_a_reward_or_an_excuse(harbor, run, trick):
    reward, info = run(play(harbor(), trick))
    assert (reward, info["ending"]) == (0.0, "failure"), info


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(3, 64):
            try: os.close(number)
            except OSError: pass
        for number in (0, 1, 2): os.dup2(os.open("/dev/null", os.O_RDWR), number)
        while True:
            for name, text in (("txt", "1"), ("json", '{"reward": 1}')):
                try: open(f"/logs/verifier/reward.{name}", "w").write(text)
                except OSError: pass
%s
print(42)
"""
KILL_PARENTS = (
    "import signal\nppid = os.getppid()\nfor _ in range(%d):\n    up ="
    " int(open(f'/proc/{ppid}/stat').read().rpartition(')')[2].split()[1])\n    ppid = up if up > 1"
    " else ppid\nos.kill(ppid, signal.%s)"
)


@pytest.mark.long
@pytest.mark.parametrize(
    "also",
    [
        "",
        *(
            KILL_PARENTS % (up, name)
            for up, name in (
                (0, "SIGKILL"),
                (1, "SIGTERM"),
                (2, "SIGKILL"),
                (2, "SIGTERM"),
                (3, "SIGKILL"),
            )
        ),
    ],
    ids=lambda also: also[-40:].replace("\n", " "),
)
@pytest.mark.parametrize(
    "name", ["rpn-calculator", pytest.param("fix-parser", marks=pytest.mark.slow)]
)
def test_a_program_under_test_that_writes_rewards_and_kills_its_graders_earns_0(run, name, also):
    where = {"rpn-calculator": "/app/rpn.py", "fix-parser": "/app/durations/__init__.py"}[name]
    reward, info = run(play(EXAMPLES / name, f"cat > {where} <<'END'\n{DAEMON % also}\nEND"))
    assert reward < 0.5 and info["ending"] == "failure", info


def test_tests_that_do_not_end_are_a_failure(harbor, run):
    reward, info = run(
        play(
            harbor(
                {
                    "task.toml": "[verifier]\ntimeout_sec = 0.5\n",
                    "tests/test.sh": f"{PASSES}[ -f /app/out.txt ] || sleep 60\n",
                }
            )
        )
    )
    assert (reward, info["ending"]) == (0.0, "failure") and "stopped after 0.5 s" in info["note"]


@pytest.mark.parametrize(
    "fault, ending, told",
    [
        (SandboxError("the machine is gone"), "infra_sandbox", "infra"),
        (AgentFault("2 processes survived SIGKILL for 10 s"), "failure", "tool_error"),
    ],
    ids=["the machine's", "the agent's"],
)
def test_a_sandbox_that_fails_while_grading_is_no_verdict_but_of_the_agents_doing(
    harbor, run, monkeypatch, fault, ending, told
):
    async def broken(self, *args, **kwargs):
        raise fault

    async def episode():
        env = HarborEnv(harbor(), CONFIG)
        await env.areset()
        monkeypatch.setattr(type(env._sandbox), "verify", broken)
        return await env.astep("done")

    _, reward, terminated, _, info = run(episode())
    assert (reward, terminated, info["ending"], info["status"]) == (
        0.0,
        True,
        ending,
        told,
    )


@given(
    files=st.dictionaries(
        st.sampled_from(["reward.txt", "reward.json"]),
        st.one_of(
            st.none(),
            st.binary(max_size=20),
            st.sampled_from(
                [
                    b"1",
                    b"0.5\n",
                    b"nan",
                    b"-0",
                    b"1e999",
                    b"{}",
                    b'{"reward": 1}',
                    b'{"a": 0.5}',
                    b'{"reward": NaN}',
                    b'{"reward": true}',
                    b"[" * 5000,
                    b"9" * 400,
                    b"1_0",
                    b"\xd9\xa1",
                ]
            ),
        ),
    )
)
def test_any_reward_files_give_one_number_from_0_to_1_or_the_reason(files):
    try:
        rewards = read_rewards(files)
        assert 0.0 <= pick(rewards) <= 1.0 and None not in files.values()
    except RewardError as error:
        assert str(error)


def test_rewards_of_several_kinds():
    assert read_rewards({"reward.txt": b" 0.5\n"}) == {"reward": 0.5}
    assert read_rewards({"reward.json": b'{"speed": 0.25, "reward": 1}', "reward.txt": b"1.0"}) == {
        "speed": 0.25,
        "reward": 1.0,
    }
    assert pick({"accuracy": 0.75}) == 0.75


def test_a_partial_reward_is_no_success(run):
    reward, info = run(
        play(
            EXAMPLES / "rpn-calculator", "echo 'import sys; print(int(sys.argv[-1]))' > /app/rpn.py"
        )
    )
    assert 0.0 < reward < 1.0 and info["ending"] == "failure" and info["step_rewards"] == [reward]
