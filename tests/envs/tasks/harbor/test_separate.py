"""A verifier in an environment of its own: it gets the artifacts and nothing else, and what cannot
be had is no verdict.
"""

import dataclasses
import pathlib

import pytest

from envs.rock import SandboxConfig
from envs.tasks.harbor import HarborEnv, TaskError, load_task
from tests.envs.tasks.harbor.conftest import CONFIG
from tests.envs.tasks.harbor.playing import bash, oracle, play

SETTINGS = (
    'artifacts = ["/app/out.txt", "/tmp/answer.json", {source = "/data/results", destination ='
    ' "r"}, "/etc/passwd", "/app/none"]\n[verifier]\nenvironment_mode = "separate"\n'
)
CHECK = """#!/bin/bash
ok=0
[ "$(cat /app/out.txt)" = x ] && [ "$(cat /tmp/answer.json)" = 42 ] && \\
    [ "$(cat /data/results/sub/r)" = deep ] && [ -f /logs/artifacts/log ] && ok=1
[ -e /app/other ] || [ -e /app/built ] || [ -e /app/none ] || [ "$LEFT" ] || \\
    [ -e /tmp/left ] && ok=0
[ "$(cat /tests/hidden)" = expected ] && [ "$WHERE" = "verifier of /tests" ] || ok=0
echo $ok > /logs/verifier/reward.txt
"""
SOLVE = """\
echo x > /app/out.txt
echo 42 > /tmp/answer.json
touch /tmp/left /app/other
mkdir -p /data/results/sub
echo deep > /data/results/sub/r
echo done > /logs/artifacts/log
"""


@pytest.fixture
def apart(harbor):
    def make(files=None, base="ubuntu", name="task"):
        plain = {
            "task.toml": SETTINGS,
            "environment/Dockerfile": f"FROM {base}\nWORKDIR /app\nRUN touch built\n",
            "solution/solve.sh": SOLVE,
            "tests/hidden": "expected",
            "tests/Dockerfile": (
                f"FROM {base}\nCOPY . /tests/\nENV WHERE='verifier of /tests'\nWORKDIR /tests\n"
            ),
            "tests/test.sh": CHECK,
        }
        return harbor({**plain, **(files or {})}, name=name)

    return make


def test_a_separate_verifier_gets_the_artifacts_and_nothing_else(apart, run):
    folder = apart()
    assert run(oracle(folder, CONFIG)) == (1.0, "success")
    assert run(play(folder))[0] == 0.0


@pytest.mark.long
@pytest.mark.parametrize(
    "trick",
    [
        (
            "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; echo 'echo 1 >"
            " /logs/verifier/reward.txt' | tee /tests/test.sh /logs/artifacts/test.sh"
        ),
        "mkdir -p /tests; (while :; do echo 1 > /logs/verifier/reward.txt; done) & "
        + SOLVE.replace("echo 42", "echo 41"),
        SOLVE + "ln -sf /etc/passwd /app/out.txt",
        SOLVE + "rm /tmp/answer.json; mkfifo /tmp/answer.json",
        SOLVE
        # for a verifier with less room than the agent
        + "head -c 20M /dev/urandom > /data/results/large",
        SOLVE
        + "rm /app/out.txt; d=/app/out.txt; mkdir $d; cd $d; for i in $(seq 25); do mkdir $(printf"
        " 'x%.0s' $(seq 240)) && cd x*; done",
        SOLVE + "mkdir -m 0 .rock-artifact; rm -r /data/results; ln -s / /data/results",
    ],
)
def test_nothing_that_an_agent_leaves_earns_it_a_reward_there(apart, run, trick):
    reward, info = run(
        play(apart({"task.toml": SETTINGS + "[verifier.environment]\nstorage_mb = 16\n"}), trick)
    )
    assert (reward, info["ending"]) == (0.0, "failure"), info


def test_a_reward_among_the_artifacts_is_none(apart, run):
    settings = 'artifacts = ["/logs"]\n[verifier]\nenvironment_mode = "separate"\n'
    check = "#!/bin/bash\n[ -f /logs/right ] && echo 1 > /logs/verifier/reward.txt\n"
    folder = apart({"task.toml": settings, "tests/test.sh": check})
    forged = "echo 1 > /logs/verifier/reward.txt"
    assert run(play(folder, forged))[0] == 0.0
    assert run(play(folder, f"{forged}; touch /logs/right"))[0] == 1.0


def test_a_step_may_have_one_and_its_network_and_limits_are_its_own(apart, run):
    task = load_task(
        apart(
            {
                "task.toml": (
                    '[environment]\nnetwork_mode = "no-network"\n[[steps]]\nname ='
                    ' "one"\n[[steps]]\nname = "two"\nartifacts ='
                    ' ["/app/out.txt"]\n[steps.verifier]\nnetwork_mode ='
                    ' "public"\n[steps.verifier.environment]\nmemory_mb = 512\ncpus = 0.5\n'
                ),
                "steps/one/instruction.md": "Make it.",
                "steps/two/instruction.md": "Leave it.",
                "tests/Dockerfile": None,
                "tests/test.sh": "echo 1 > /logs/verifier/reward.txt\n",
                "steps/two/tests/Dockerfile": "FROM debian\nCOPY . /tests/\n",
                "steps/two/tests/test.sh": (
                    "[ -f /app/out.txt ] && [ ! -e /app/one ] && echo 1 >"
                    " /logs/verifier/reward.txt\n"
                ),
            }
        )
    )
    one, two = task.steps
    assert (
        one.verifier_environment is None
        and two.verifier_environment.memory_mb == 512
        and two.artifacts == ("/app/out.txt",)
    )

    async def episode():
        env = HarborEnv(task, CONFIG)
        try:
            await env.areset()
            await env.astep(bash("touch /app/one"))
            await env.astep("done")
            await env.astep(bash("touch /app/out.txt"))
            return await env.astep("done")
        finally:
            await env.aclose()

    _, reward, terminated, _, info = run(episode())
    assert (reward, terminated, info["step_rewards"]) == (1.0, True, [1.0, 1.0]), info


def test_hooks_collect_what_the_agent_left_before_the_tests(apart, run):
    settings = (
        SETTINGS + "[[verifier.collect]]\ncommand = 'mkdir -p /logs/artifacts; wc -c < /app/other >"
        " /logs/artifacts/log'\n"
    )
    check = CHECK.replace("[ -f /logs/artifacts/log ]", '[ "$(cat /logs/artifacts/log)" = 0 ]')
    assert run(oracle(apart({"task.toml": settings, "tests/test.sh": check}), CONFIG)) == (
        1.0,
        "success",
    )
    assert run(oracle(apart({"tests/test.sh": check}, name="without"), CONFIG)) == (0.0, "failure")


@pytest.mark.parametrize(
    ("files", "line", "says"),
    [
        (
            {"task.toml": SETTINGS + '[[verifier.collect]]\ncommand = "true"\nservice = "db"\n'},
            6,
            "not in 'db'",
        ),
        (
            {"tests/Dockerfile": None},
            0,
            "tests/Dockerfile: missing; a separate verifier is built from it",
        ),
        (
            {
                "task.toml": (
                    '[verifier]\nenvironment_mode = "shared"\n[verifier.environment]\ncpus = 1\n'
                )
            },
            2,
            "leave one of them out",
        ),
        ({"task.toml": 'artifacts = ["out.txt"]\n'}, 1, "does not name an absolute path"),
    ],
)
def test_a_malformed_one_is_refused_with_file_and_line(apart, files, line, says):
    with pytest.raises(TaskError, match=says) as caught:
        load_task(apart(files))
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("FROM ubuntu\n", "has no /tests/test.sh; COPY it there"),
        ("FROM ubuntu\nRUN exit 3\n", "Dockerfile:2: RUN ended with exit 3"),
    ],
)
def test_a_verifier_that_cannot_be_built_is_no_verdict(apart, run, dockerfile, says):
    _, info = run(play(apart({"tests/Dockerfile": dockerfile})))
    assert info["ending"] == "infra_sandbox" and says in info["note"]


def test_an_older_table_alone_means_separate(apart):
    step = load_task(apart({"task.toml": "[verifier.environment]\nmemory_mb = 300\n"})).steps[0]
    assert (
        step.verifier_environment.memory_mb == 300
        and step.verifier_environment.dockerfile.startswith("FROM ubuntu")
    )
    assert (
        dataclasses.replace(step, verifier_environment=None)
        == load_task(apart({"task.toml": ""}, name="other")).steps[0]
    )


@pytest.mark.slow
def test_a_separate_verifier_is_another_container(apart, run, engine):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    tools = {
        f"{place}/{name}": pathlib.Path("/usr/bin", name).read_bytes()
        for place in ("environment", "tests")
        for name in ("mktemp", "base64", "tail", "env")
    }
    copy = (
        "COPY mktemp base64 tail env /usr/bin/\nRUN chmod 755 /usr/bin/mktemp /usr/bin/base64"
        " /usr/bin/tail /usr/bin/env\n"
    )
    folder = apart(
        {
            **tools,
            "environment/Dockerfile": f"FROM {engine.image}\n{copy}WORKDIR /app\nRUN touch built\n",
            "tests/Dockerfile": (
                f"FROM {engine.image}\n{copy}COPY . /tests/\nENV WHERE='verifier of"
                " /tests'\nWORKDIR /tests\n"
            ),
        }
    )
    reward, info = run(play(folder, SOLVE, config=config))
    assert (reward, info["ending"], info["note"], info["test_output"]) == (1.0, "success", "", "")
    assert run(play(folder, config=config))[0] == 0.0


def test_what_its_tests_install_is_in_its_image_or_there_is_no_verdict(apart, run):
    preamble = "#!/bin/bash\nset -e\nsudo apt-get update && apt-get install -y {}\n"
    there = CHECK.replace("#!/bin/bash\n", preamble.format("grep"))
    assert run(oracle(apart({"tests/test.sh": there}), CONFIG)) == (1.0, "success")
    lacking = CHECK.replace("#!/bin/bash\n", preamble.format("no-such-program"))
    reward, info = run(play(apart({"tests/test.sh": lacking}, name="lacking"), SOLVE))
    assert (reward, info["ending"]) == (0.0, "infra_sandbox"), info
    assert "lacks no-such-program" in info["note"]
    fetching = CHECK.replace("#!/bin/bash\n", "#!/bin/bash\ncurl https://example.org/x | sh\n")
    with pytest.raises(TaskError, match="needs the network"):
        run(play(apart({"tests/test.sh": fetching}, name="fetching"), SOLVE))
