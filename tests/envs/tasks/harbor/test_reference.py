"""What no agent could cause is never its 0, and no agent can pass its failure off as such."""

import asyncio
import pathlib

import pytest

from envs.rock import SandboxConfig
from envs.tasks.harbor import HarborEnv, load_task, reference
from envs.tasks.harbor.grade import Grade
from envs.tasks.harbor.reference import NETWORK, find_reference, lacks_in
from tests.envs.tasks.harbor.conftest import TB1, write
from tests.envs.tasks.harbor.playing import play

# Names are put together at run time, so that no one sees the lack before the tests run.
NEEDS_PROGRAM = """\
tool=frob
if ${tool}nicate /app/out.txt; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""
NEEDS_MODULE = """\
python3 -c '__import__("nosuch" + "lib"); print(1)' > /logs/verifier/reward.txt ||
    echo 0 > /logs/verifier/reward.txt
"""
# passes where the agent's module says so; /app/helper.py is in the image
USES_HELPER = """\
cd /app && python3 -c 'import sys; sys.path.insert(0, "/app")
import helper, answer
assert helper.double(answer.VALUE) == 8' && echo 1 > /logs/verifier/reward.txt
"""
HELPER = {
    "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /app\nCOPY helper.py /app/\n",
    "environment/helper.py": "def double(x):\n    return 2 * x\n",
    "instruction.md": "Write /app/answer.py with VALUE = 4.\n",
    "solution/solve.sh": "echo VALUE = 4 > /app/answer.py\n",
    "tests/test.sh": USES_HELPER,
}
SOLVED = "echo x > /app/out.txt"
SEPARATE = {
    "task.toml": 'artifacts = ["/app/out.txt"]\n[verifier]\nenvironment_mode = "separate"\n',
    "environment/Dockerfile": "FROM ubuntu\nWORKDIR /app\n",
    "tests/Dockerfile": "FROM ubuntu\nCOPY . /tests/\nWORKDIR /tests\n",
}


def played(run, *episodes):
    """Play (task, commands) at once, in one event loop, and return the infos."""

    async def together():
        return await asyncio.gather(*(play(task, *commands) for task, commands in episodes))

    return [info | {"reward": reward} for reward, info in run(together())]


def test_what_the_tests_need_and_the_sandbox_lacks_is_not_the_agents_failure(harbor, run):
    scripts = {
        NEEDS_PROGRAM: "frobnicate",
        NEEDS_MODULE: "nosuchlib",
        "set -e\ntool=frob\n${tool}nicate\necho 1 > /logs/verifier/reward.txt\n": "frobnicate",
        "env frob''nicate || echo 0 > /logs/verifier/reward.txt\n": "frobnicate",
    }
    episodes = []
    for number, script in enumerate(scripts):
        task = load_task(harbor({"tests/test.sh": script}, name=f"task{number}"))
        episodes += [(task, [SOLVED]), (task, [])]
    names = [name for name in scripts.values() for _ in range(2)]
    for info, name in zip(played(run, *episodes), names, strict=True):
        assert info["ending"] == "infra_verifier" and info["permanent"], info
        assert f"need {name}, which the reference solution does not find" in info["note"]


def test_a_missing_test_runner_of_terminal_bench_1_is_named(tmp_path, run):
    folder = write(
        tmp_path / "tb1",
        {**TB1, "run-tests.sh": "name=nosuch\npython3 -m ${name}runner -rA $TEST_DIR\n"},
    )
    _, info = run(play(folder, SOLVED))
    assert info["ending"] == "infra_verifier" and "nosuchrunner" in info["note"]


def test_an_agents_failure_stays_its_own_whatever_it_deletes_kills_or_prints(harbor, run):
    tricks = [
        "true",  # the module that is missing is its own to write
        "echo VALUE = 4 > answer.py; rm helper.py",  # deletes what was there
        "echo import nosuchlib > answer.py",
        "echo 'print(\"frobnicate: command not found\"); VALUE = 5' > answer.py",
        "echo 'import os; os.kill(os.getppid(), 9)' > answer.py",
        "echo 'import os; os.kill(-1, 9)' > answer.py",
        "echo 'print(\"curl: (6) Could not resolve host: x\"); exit(1)' > answer.py",
    ]
    task = load_task(harbor(HELPER))
    right, *infos = played(
        run, (task, ["echo VALUE = 4 > answer.py"]), *((task, [trick]) for trick in tricks)
    )
    assert right["reward"] == 1.0
    for trick, info in zip(tricks, infos, strict=True):
        assert (info["reward"], info["ending"]) == (0.0, "failure"), (trick, info)


def test_without_a_reference_only_what_the_instruction_does_not_ask_for_counts(harbor, run):
    files = {"tests/test.sh": NEEDS_PROGRAM, "solution/solve.sh": None}
    told = {"instruction.md": "Install a program frobnicate in PATH.\n"}
    unasked, asked = played(
        run, (harbor(files), [SOLVED]), (harbor({**files, **told}, name="asked"), [SOLVED])
    )
    assert (unasked["ending"], asked["ending"]) == ("infra_verifier", "failure")
    assert "an untouched environment does not find" in unasked["note"]


def test_tests_that_give_nobody_a_verdict_are_at_fault(harbor, run):
    reports = "echo 'VERIFIER ERROR, not scoring'; exit 3\n"
    apart = {**SEPARATE, "tests/test.sh": f"#!/bin/bash\n{reports}"}
    shared = harbor({"tests/test.sh": reports})
    for info in played(run, (shared, [SOLVED]), (harbor(apart, name="apart"), [SOLVED])):
        assert info["ending"] == "infra_verifier"
        assert "no verdict here either: task: the tests left neither" in info["note"]


def test_a_separate_verifier_that_an_agents_file_breaks_is_the_agents_failure(harbor, run):
    script = "#!/bin/bash\nset -e\ngrep -q x /app/out.txt\necho 1 > /logs/verifier/reward.txt\n"
    folder = harbor({**SEPARATE, "tests/test.sh": script})
    task = load_task(folder)
    infos = played(run, (task, [SOLVED]), (task, ["true"]), (task, ["echo y > /app/out.txt"]))
    assert [info["ending"] for info in infos] == ["success", "failure", "failure"]


def test_the_reference_is_played_once_for_all_episodes_of_a_task(harbor, run, monkeypatch):
    played = []
    real = HarborEnv._play_reference

    async def counted(self):
        played.append(self.name)
        return await real(self)

    monkeypatch.setattr(HarborEnv, "_play_reference", counted)
    task = load_task(harbor(HELPER))

    async def episodes():
        return [(await play(task))[1]["ending"] for _ in range(3)]

    assert run(episodes()) == ["failure"] * 3 and len(played) == 1


@pytest.mark.parametrize(
    ("reward", "may_change", "plays"), [(1.0, False, 1), (1.0, True, 2), (0.0, False, 2)]
)
def test_a_reference_that_failed_or_may_change_is_played_again_later(
    harbor, run, monkeypatch, reward, may_change, plays
):
    task = load_task(harbor())
    played = []

    async def play():
        played.append(1)
        return [Grade(reward, {})], True

    async def asked_twice():
        await find_reference(task, "", may_change, play)
        await find_reference(task, "", may_change, play)
        monkeypatch.setattr(reference, "RECENT_SECONDS", -1.0)
        await find_reference(task, "", may_change, play)

    run(asked_twice())
    assert len(played) == plays


def test_a_fault_ends_a_task_of_several_steps(harbor, run):
    steps = {
        "task.toml": 'version = "1.0"\n[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n',
        "instruction.md": None,
        "tests/test.sh": None,
        "solution/solve.sh": None,
    }
    for step, script in (("one", NEEDS_PROGRAM), ("two", "true\n")):
        steps[f"steps/{step}/instruction.md"] = "Make /app/out.txt.\n"
        steps[f"steps/{step}/tests/test.sh"] = script
        steps[f"steps/{step}/solution/solve.sh"] = f"{SOLVED}\n"
    _, info = run(play(harbor(steps), SOLVED))
    assert info["ending"] == "infra_verifier" and "tests of one need frobnicate" in info["note"]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("/tests/test.sh: line 3: uvx: command not found", {"uvx"}),
        ("sh: 1: pytest: not found", {"pytest"}),
        ("bash: line 1: x86_64-linux-gnu-gcc: command not found", {"x86_64-linux-gnu-gcc"}),
        ("/usr/bin/env: 'node': No such file or directory", {"node"}),
        ("/usr/bin/env: \u2018node\u2019: No such file or directory", {"node"}),
        ("/usr/bin/python3: No module named pytest", {"pytest"}),
        ("E   ModuleNotFoundError: No module named 'pandas.core'", {"pandas"}),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'git'", {"git"}),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/app/out.txt'", set()),
        ("Error: Cannot find module '@scope/left-pad'", {"@scope/left-pad"}),
        ("Error: Cannot find module './mine'", set()),
        ("curl: (6) Could not resolve host: astral.sh", {NETWORK}),
        ("E: Unable to locate package curl", {NETWORK}),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'out.txt'", set()),
        ("the file was not found anywhere", set()),
        ("a" * 1_000_000, set()),  # in linear time: the suite's time limit
        ("1 passed", set()),
    ],
)
def test_what_an_output_reports_as_missing(output, names):
    assert lacks_in(f"before\n{output}\nafter") == names


@pytest.mark.slow
@pytest.mark.docker
def test_in_containers_too(harbor, run, engine):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    programs = {  # which grading needs
        f"environment/{name}": pathlib.Path(f"/usr/bin/{name}").read_bytes()
        for name in ("mktemp", "base64")
    }
    dockerfile = (
        f"FROM {engine.image}\nCOPY mktemp base64 /usr/bin/\n"
        "RUN chmod 755 /usr/bin/mktemp /usr/bin/base64\nWORKDIR /app\n"
    )
    files = {**programs, "environment/Dockerfile": dockerfile}
    lacking = load_task(harbor({**files, "tests/test.sh": NEEDS_PROGRAM}))
    for commands in ((SOLVED,), ()):
        _, info = run(play(lacking, *commands, config=config))
        assert info["ending"] == "infra_verifier" and "frobnicate" in info["note"], info
    fine = harbor(files, name="fine")
    lie = "echo 'frobnicate: command not found'"
    assert run(play(fine, lie, config=config))[1]["ending"] == "failure"
