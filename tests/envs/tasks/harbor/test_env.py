"""Tasks played in real sandboxes: the oracle earns 1, nobody else does, and what the embedded
backend cannot do is refused before anyone plays.
"""

import asyncio
import copy
import dataclasses
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem import format_tool_call, make
from envs.rock import SandboxError
from envs.tasks.harbor import (
    EXAMPLES,
    BuildError,
    HarborEnv,
    RewardError,
    TaskError,
    UnsupportedError,
    combine,
    load_task,
)
from envs.tasks.harbor.dockerfile import KEYWORDS
from envs.tasks.harbor.grade import pick, read_rewards
from envs.tasks.harbor.task import Environment, HarborTask, Step
from tests.envs.tasks.harbor.conftest import CONFIG, write
from tests.envs.tasks.harbor.test_load import TB1

NAMES = sorted(folder.name for folder in EXAMPLES.iterdir())


def bash(command):
    return format_tool_call("bash", {"command": command})


async def play(task, *commands, images=None, config=CONFIG, **settings):
    """(reward, info) of an agent that sends these commands and hands in."""
    env = HarborEnv(task, config, images=images, **settings)
    try:
        await env.areset()
        result = None
        for command in commands:
            result = await env.astep(bash(command))
            if result[2] or result[3]:
                return result[1], result[4]
        result = await env.astep("done")
        return result[1], result[4]
    finally:
        await env.aclose()


async def oracle(task, config=CONFIG):
    env = HarborEnv(task, config)
    try:
        await env.areset()
        result = await env.asolve()
        return result[1], result[4]["ending"]
    finally:
        await env.aclose()


def observe(task, *commands):
    """What the commands show."""

    async def episode():
        env = HarborEnv(task, CONFIG)
        try:
            await env.areset()
            return [(await env.astep(bash(command)))[0] for command in commands]
        finally:
            await env.aclose()

    return asyncio.run(episode())


# -- the examples
# -------------------------------------------------------------------------------------------------


CHEAT = (
    "mkdir -p /logs/verifier /tests /app/tests; echo 1 | tee /logs/verifier/reward.txt"
    " /app/reward.txt; echo '{\"reward\": 1}' > /logs/verifier/reward.json; echo 'echo 1 >"
    " /logs/verifier/reward.txt' > /tests/test.sh;cd /app; for m in unittest json pathlib"
    " subprocess sqlite3 tarfile sitecustomize usercustomize conftest; do echo 'import os;"
    " os._exit(0)' > $m.py; done; for n in python3 cmp git env rm; do printf '#!/bin/sh\\nexit"
    " 0\\n' > $n; chmod +x $n; done;export PATH=/app:$PATH; (while :; do echo 1 >"
    " /logs/verifier/reward.txt; sleep 0.01; done) > /dev/null 2>&1 & setsid sh -c 'while :; do"
    " echo 1 > /logs/verifier/reward.txt; sleep 0.01; done' > /dev/null 2>&1 & echo"
)


@pytest.fixture(scope="module")
def played():
    """Example -> what its oracle, a no-op and a cheat got."""

    async def all_of_them():
        gate = asyncio.Semaphore(4)

        async def limited(coroutine):
            async with gate:
                return await coroutine

        return await asyncio.gather(
            *(
                limited(one)
                for name in NAMES
                for one in (
                    oracle(EXAMPLES / name),
                    play(EXAMPLES / name),
                    play(EXAMPLES / name, CHEAT),
                )
            )
        )

    results = iter(asyncio.run(all_of_them()))
    return {name: [next(results) for _ in range(3)] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_solution_earns_1(played, name):
    assert played[name][0] == (1.0, "success")


@pytest.mark.parametrize("name", NAMES)
def test_doing_nothing_and_tampering_with_the_grader_earn_0(played, name):
    for reward, info in played[name][1:]:
        assert (reward, info["ending"]) == (0.0, "failure"), info


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_solution_earns_1_again_and_again_and_in_the_landlock_tier(run, name):
    weak = dataclasses.replace(CONFIG, tier="landlock")
    assert [
        run(oracle(EXAMPLES / name, config)) for config in (CONFIG, CONFIG, CONFIG, weak, weak)
    ] == [(1.0, "success")] * 5
    assert run(play(EXAMPLES / name, config=weak))[0] == 0.0


# -- what agent and task see
# -------------------------------------------------------------------------------------------------


def test_the_agent_works_among_the_tasks_files_under_the_tasks_paths(harbor):
    folder = harbor(
        {
            "environment/Dockerfile": (
                "FROM python:3.12\nARG WHERE=/srv/data\nENV GREETING='hello you'"
                " TOOLS=/opt/tools\nENV PATH=$TOOLS:$PATH\nWORKDIR $WHERE\nWORKDIR inner\nCOPY"
                ' a*.txt sub/ ./\nCOPY --chmod=700 b.txt c\nADD b.txt /opt/tools/\nRUN ["sh", "-c",'
                ' "echo made > made.txt"]\nSHELL ["/bin/bash", "-c"]\nRUN echo {1..3} > seen.txt &&'
                " \\\n    printf '#!/bin/sh\\necho tool\\n' > $TOOLS/tool && chmod +x"
                " /opt/tools/tool\n"
            ),
            "environment/a1.txt": "1\n",
            "environment/a2.txt": "2\n",
            "environment/b.txt": "b\n",
            "environment/sub/deep/x.sh": "echo /app /opt/tools\n",
            "environment/sub/data.csv": "/app,/opt\n",
        }
    )
    seen = observe(
        folder,
        "pwd; ls",
        "stat -c %a c; cat made.txt seen.txt",
        "echo $GREETING; tool; cat /opt/tools/b.txt",
        "bash deep/x.sh; cat data.csv",
        "ls /tests /solution /logs/verifier; cat /srv/data/none",
        "cd /app || echo no; echo $HOME",
    )
    assert seen[0] == "/srv/data/inner\na1.txt\na2.txt\nc\ndata.csv\ndeep\nmade.txt\nseen.txt"
    assert seen[1] == "700\nmade\n1 2 3" and seen[2] == "hello you\ntool\nb"
    assert (
        seen[3] == "/app /opt/tools\n/app,/opt"
    )  # code has its paths rewritten, data has not: it already says what it says
    assert (
        "test.sh" not in seen[4]
        and "solve.sh" not in seen[4]
        and "/srv/data/none: No such file" in seen[4]
        and "/workspace" not in seen[4]
    )
    assert seen[5].startswith("no\n/root\n") and "cd: /app: No such file" in seen[5]


def test_an_archive_is_unpacked_by_add_and_a_docker_ignored_file_is_not_there(harbor, tmp_path):
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("inner/x.txt")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    folder = harbor(
        {
            "environment/Dockerfile": (
                "FROM debian\nWORKDIR /app\nADD pack.tgz /app/un/\nCOPY . .\n"
            ),
            "environment/pack.tgz": buffer.getvalue(),
            "environment/secret.txt": "s",
            "environment/.dockerignore": "# no\nsecret*\nDockerfile\n",
        }
    )
    assert observe(folder, "cat un/inner/x.txt; ls")[0] == "xpack.tgz\nun"


def test_a_health_check_a_settings_file_and_env_hold_in_the_world(harbor):
    folder = harbor(
        {
            "task.toml": (
                '[environment]\nworkdir = "/work"\n[environment.env]\nWHERE ='
                ' "/work/x"\n[environment.healthcheck]\ncommand = "test -d /work && test -n'
                ' $WHERE"\ninterval_sec = 0.01\n'
            )
        }
    )
    assert observe(folder, "pwd; echo $WHERE")[0] == "/work\n/work/x"
    with pytest.raises(BuildError, match="task.toml:2: the health check failed 2 times"):
        observe(
            harbor(
                {
                    "task.toml": (
                        '[environment.healthcheck]\ncommand = "false"\ninterval_sec = 0.01\nretries'
                        " = 1\n"
                    )
                },
                name="sick",
            )
        )


# -- what is refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "line", "says"),
    [
        ({"environment/Dockerfile": "FROM nvidia/cuda:12\n"}, 1, "the image 'nvidia/cuda:12'"),
        ({"environment/Dockerfile": "FROM ubuntu AS a\nFROM a\n"}, 2, "in stages"),
        (
            {
                "environment/Dockerfile": (
                    "FROM ubuntu\nRUN true && \\\n  apt-get install -y libfoo-dev\n"
                )
            },
            3,
            "`apt-get install` needs the network",
        ),
        (
            {
                "environment/Dockerfile": (
                    "FROM ubuntu\nRUN apt-get update && apt-get install -y \\\n  git \\\n "
                    " no-such-program\n"
                )
            },
            4,
            "lacks no-such-program",
        ),
        (
            {"environment/Dockerfile": "FROM python:3.12\nRUN pip install numpy\n"},
            2,
            "`pip install` needs the network",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nRUN useradd me\n"}, 2, "one unprivileged user"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nADD https://a.b/c /app/\n"},
            2,
            "needs the network",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nCOPY --from=x a b\n"}, 2, "COPY --from"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nCOPY Dockerfile /usr/local/bin/x\n"},
            2,
            "read-only",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nWORKDIR /etc/x\n"}, 2, "read-only"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nRUN --mount=type=secret,id=x true\n"},
            2,
            "RUN --mount",
        ),
        (
            {"environment/docker-compose.yaml": "services: {main: {}, db: {}}\n"},
            1,
            "several containers",
        ),
        ({"task.toml": "[environment]\ngpus = 1\n"}, 2, "no GPU"),
        ({"task.toml": '[[environment.mcp_servers]]\nname = "x"\n'}, 1, "mcp_servers"),
        (
            {
                "task.toml": (
                    '[environment]\nnetwork_mode = "no-network"\n[agent]\nnetwork_mode = "public"\n'
                )
            },
            4,
            "one network policy",
        ),
        (
            {
                "task.toml": '[environment]\ndocker_image = "org/private"\n',
                "environment/Dockerfile": None,
            },
            1,
            "the image 'org/private'",
        ),
        (
            {
                "tests/test.sh": (
                    "#!/bin/bash\n\ncurl -LsSf https://astral.sh/uv/install.sh | sh\nuvx pytest\n"
                )
            },
            3,
            "needs the network",
        ),
    ],
)
def test_what_the_embedded_backend_cannot_do_is_said_by_name_with_file_and_line(
    harbor, files, line, says
):
    folder = harbor(files)
    with pytest.raises(UnsupportedError, match=says) as caught:
        observe(folder)
    assert caught.value.line == line and str(caught.value).startswith(str(folder)), caught.value


@pytest.mark.parametrize(
    ("dockerfile", "kind", "line", "says"),
    [
        ("FROM ubuntu\nRUN true\nRUN echo bad >&2; exit 3\n", BuildError, 3, "exit 3: bad"),
        ("FROM ubuntu\nRUN cat /app/none\n", BuildError, 2, "/app/none"),
        ("FROM ubuntu\nRUN touch /opt2/x\n", BuildError, 2, "RUN ended with exit"),
        ("FROM ubuntu\nCOPY ../x y\n", TaskError, 2, "leaves the build context"),
        ("FROM ubuntu\nCOPY nothing y\n", TaskError, 2, "no such file"),
        ("FROM ubuntu\nCOPY one\n", TaskError, 2, "a source and a target"),
        ("FROM ubuntu\nENV 1=2\n", TaskError, 2, "not NAME=value"),
        ("FROM ubuntu\nENV A='x\n", TaskError, 2, "quotation"),
        ("FROM a b c d\n", TaskError, 1, "not `FROM image"),
        ("FROM ubuntu\nSHELL bash\n", TaskError, 2, "JSON"),
    ],
)
def test_a_build_that_fails_names_its_line(harbor, dockerfile, kind, line, says):
    with pytest.raises(kind, match=says) as caught:
        observe(harbor({"environment/Dockerfile": dockerfile}))
    assert caught.value.line == line


def test_an_image_can_be_given_an_alias_and_its_programs_are_checked(harbor, run):
    folder = harbor({"environment/Dockerfile": "FROM ghcr.io/org/tool:1@sha256:ab\n"})
    assert (
        run(
            play(
                folder,
                "echo x > /app/out.txt",
                images={"ghcr.io/org/tool:1": ("bash",), "ghcr.io/org/tool": ("bash",)},
            )
        )[0]
        == 1.0
    )
    with pytest.raises(UnsupportedError, match="lacks no-such-program"):
        run(
            play(
                folder,
                images={
                    "ghcr.io/org/tool:1": ("no-such-program",),
                    "ghcr.io/org/tool": ("no-such-program",),
                },
            )
        )


def test_a_build_has_its_time_limit(harbor):
    with pytest.raises(BuildError, match="build_timeout_sec"):
        observe(
            harbor(
                {
                    "task.toml": "[environment]\nbuild_timeout_sec = 0.5\n",
                    "environment/Dockerfile": "FROM ubuntu\nRUN sleep 60\n",
                }
            )
        )


ARGUMENT = st.one_of(
    st.sampled_from(
        [
            "ubuntu",
            "/app",
            "a.txt",
            "sub",
            ".",
            "..",
            "/",
            "x" * 300,
            "A=1",
            "$A",
            "${A:-/usr}",
            "'",
            '["sh", "-c", "true"]',
            "[",
            "true",
            "exit 1",
            "/tmp/x",
            "*",
            "a.txt b/ c/",
            "root",
            "kill -9 -1",
            "rm -rf /app /logs",
            "PATH=",
            "A='\n",
            "http://a/b x",
            "--chmod=9 a b",
            "--x=1 a",
            "\\",
            "mkdir /app/x",
            "LD_PRELOAD=/app/x",
        ]
    ),
    st.text(max_size=6),
)
DOCKERFILES = st.lists(
    st.tuples(
        st.sampled_from(sorted(KEYWORDS)), st.lists(ARGUMENT, min_size=1, max_size=3).map(" ".join)
    ).map(" ".join),
    max_size=6,
).map(lambda rows: "\n".join(["FROM ubuntu", *rows]))


@settings(max_examples=20, deadline=None)
@given(text=DOCKERFILES)
def test_any_dockerfile_is_built_or_refused_by_a_typed_error_with_its_line(text):
    context = {"Dockerfile": (b"", 0o644), "a.txt": (b"a", 0o644), "sub/b.txt": (b"b", 0o644)}
    step = Step("task", "Do.", {"test.sh": (b"true", 0o755)})
    task = HarborTask(
        "fuzz",
        pathlib.Path("fuzz"),
        "harbor",
        "1.0",
        Environment(
            context=context,
            dockerfile=text,
            dockerfile_path=pathlib.Path("fuzz/Dockerfile"),
            build_timeout=5.0,
        ),
        (step,),
    )
    try:
        asyncio.run(play(task, "true"))
    except TaskError as error:
        assert str(error).startswith("fuzz/") and error.line <= len(text.splitlines()) + text.count(
            "\r"
        )


# -- grading
# -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo nan > /logs/verifier/reward.txt", "finite"),
        ("echo inf > /logs/verifier/reward.txt", "finite"),
        ("echo 1e9 > /logs/verifier/reward.txt", "from 0 to 1"),
        ("echo yes > /logs/verifier/reward.txt", "not one number"),
        ("true", "neither reward.txt nor reward.json"),
        ("echo 1 > /app/one; ln -s /app/one /logs/verifier/reward.txt", "no regular file"),
        ("echo 1 > /app/one; ln /app/one /logs/verifier/reward.txt", "no regular file"),
        ("mkdir /logs/verifier/reward.json", "no regular file"),
        ("mkfifo /logs/verifier/reward.txt", "no regular file"),
        (
            (
                "rm -rf /logs/verifier; mkdir /app/v; echo 1 > /app/v/reward.txt; ln -s /app/v"
                " /logs/verifier"
            ),
            "no regular file",
        ),
        (
            (
                "echo 1 > /logs/verifier/reward.txt; echo '{\"reward\": 0}' >"
                " /logs/verifier/reward.json"
            ),
            "reward.txt says 1 and reward.json says 0",
        ),
        ('echo \'{"a": 1, "b": 1}\' > /logs/verifier/reward.json', "none is named"),
        ("echo 1 > /logs/verifier/reward.txt; kill -9 $$", "killed"),
        ("echo 1 > /logs/verifier/reward.txt; kill -TERM $$; sleep 5", "killed"),
        ("echo 1 > /logs/verifier/reward.txt; kill -9 -1", "killed"),
    ],
)
def test_what_is_no_valid_reward_is_0_with_the_reason(harbor, run, script, note):
    reward, info = run(play(harbor({"tests/test.sh": f"{script}\n"})))
    assert reward == 0.0 and info["ending"] == "failure" and note in info["note"], info


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
                    "tests/test.sh": "echo 1 > /logs/verifier/reward.txt\nsleep 60\n",
                }
            )
        )
    )
    assert (reward, info["ending"]) == (0.0, "failure") and "stopped after 0.5 s" in info["note"]


def test_a_sandbox_that_fails_while_grading_is_no_verdict(harbor, run, monkeypatch):
    async def broken(self, *args, **kwargs):
        raise SandboxError("the machine is gone")

    async def episode():
        env = HarborEnv(harbor(), CONFIG)
        await env.areset()
        monkeypatch.setattr(type(env._sandbox), "verify", broken)
        return await env.astep("done")

    _, reward, terminated, _, info = run(episode())
    assert (reward, terminated, info["ending"], info["status"]) == (
        0.0,
        True,
        "infra_sandbox",
        "infra",
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


# -- limits and steps
# -------------------------------------------------------------------------------------------------


def test_what_was_done_counts_when_the_turns_or_the_time_are_over(harbor, run):
    reward, info = run(play(harbor(), "true", "echo x > /app/out.txt", max_turns=2))
    assert (reward, info["ending"]) == (1.0, "success")
    assert (
        run(play(harbor(name="b"), "true", "true", max_turns=2))[1]["ending"] == "truncated_turns"
    )
    late = harbor({"task.toml": "[agent]\ntimeout_sec = 0.4\n"}, name="late")
    reward, info = run(play(late, "echo x > /app/out.txt; sleep 30"))
    assert (reward, info["ending"], info["status"]) == (1.0, "success", "timeout")
    assert run(play(late, "sleep 30"))[1]["ending"] == "timeout"


def test_steps_follow_each_other_in_one_world_and_tests_of_a_step_do_not_stay(run):
    async def episode():
        env = HarborEnv(EXAMPLES / "inventory-steps", CONFIG)
        first, _ = await env.areset()
        await env.astep(
            bash("awk -F, 'NR > 1 && $2 + 0 < $3 + 0 { print $1 }' $INVENTORY | sort > low.txt")
        )
        second, reward, terminated, _, info = await env.astep("done")
        seen = (await env.astep(bash("ls; ls /tests /logs/verifier /solution")))[0]
        _, last, over, _, end = await env.astep("done")
        return first, second, reward, terminated, info, seen, last, over, end

    first, second, reward, terminated, info, seen, last, over, end = run(episode())
    assert "least stock" in first and "delivery came" in second and not terminated and reward == 0.0
    assert info["step_rewards"] == [1.0] and info["step"] == "restock"
    assert (
        "deliveries-today.csv" in seen
        and "low.txt" in seen
        and "setup.sh" not in seen
        and "test.sh" not in seen
        and "reward" not in seen
    )
    assert over and last == 0.5 and end["step_rewards"] == [1.0, 0.0] and end["ending"] == "failure"


def test_a_step_below_its_least_reward_ends_the_task(run):
    reward, info = run(play(EXAMPLES / "inventory-steps"))
    assert reward == 0.0 and info["step_rewards"] == [0.0]


@pytest.mark.parametrize(
    ("rewards", "strategy", "total"),
    [
        ([1.0, 0.5], "mean", 0.75),
        ([1.0], "mean", 0.5),
        ([1.0], "final", 0.0),
        ([0.0, 1.0], "final", 1.0),
    ],
)
def test_a_step_that_was_not_reached_counts_0(rewards, strategy, total):
    assert combine(rewards, 2, strategy) == total


# -- Terminal-Bench 1
# -------------------------------------------------------------------------------------------------


RUNNER = """\
#!/bin/bash
# Stands in for `pytest -rA`, which this machine may lack: the parser reads the same lines.
python3 - <<'END'
import os, sys
sys.path.insert(0, os.environ["TEST_DIR"])
import test_outputs
lines = []
for name in sorted(vars(test_outputs)):
    if name.startswith("test_"):
        try:
            getattr(test_outputs, name)()
            lines.append(f"PASSED tests/test_outputs.py::{name}")
        except Exception as error:
            lines.append(f"FAILED tests/test_outputs.py::{name} - {error}")
print("=========================== short test summary info ============================", *lines, sep="\\n")
sys.exit(any(line.startswith("FAILED") for line in lines))
END
"""
TB1_TESTS = (
    "import pathlib\n\n\ndef test_there():\n    assert"
    " pathlib.Path('/app/out.txt').exists()\n\n\ndef test_data():\n    assert"
    " pathlib.Path('/app/data.txt').read_text() == 'd\\n'\n"
)


def test_a_terminal_bench_1_task_is_played_and_passes_when_all_its_tests_do(tmp_path, run):
    folder = write(
        tmp_path / "tb", {**TB1, "run-tests.sh": RUNNER, "tests/test_outputs.py": TB1_TESTS}
    )
    assert run(oracle(folder)) == (1.0, "success")
    assert run(play(folder))[0] == 0.0
    assert run(play(folder, "echo x > out.txt; echo other > data.txt"))[0] == 0.0
    (note,) = load_task(
        write(
            tmp_path / "same",
            {**TB1, "task.yaml": TB1["task.yaml"].replace("shell: false", "shell: true")},
        )
    ).notes
    assert "run_tests_in_same_shell" in note and load_task(folder).notes == []
    reward, info = run(
        play(write(tmp_path / "silent", {**TB1, "run-tests.sh": "echo PASSED test_x\n"}), "true")
    )
    assert reward == 0.0 and "summary is not in the output" in info["note"]


def test_a_reference_solution_that_is_not_there_is_said(harbor, run):
    with pytest.raises(TaskError, match="no reference solution"):
        run(oracle(harbor({"solution/solve.sh": None})))


# -- GEM
# -------------------------------------------------------------------------------------------------


def test_examples_are_registered_and_the_environment_is_a_gem_one():
    env = make("harbor/word-report", sandbox_config=CONFIG)
    observation, info = env.reset(seed=3)
    assert (
        observation.startswith("The folder /app/letters")
        and info["task"] == "word-report"
        and info["tools"]
    )
    copy.deepcopy((observation, info))
    json.dumps(info)
    assert env.step(bash("ls"))[0] == "letters"
    other = env.spawn()
    assert other.reset(3)[0] == observation
    other.close()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="word-report.*reset"):
        env.step("done")
    with pytest.raises(NotImplementedError):
        env.spawn(same_state=True)


def test_a_task_can_be_given_as_a_record(run):
    assert run(play(load_task(EXAMPLES / "log-triage")))[0] == 0.0
