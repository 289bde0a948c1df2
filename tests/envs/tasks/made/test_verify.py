"""The verifier of made tasks, played in real sandboxes: what earns a reward, and what cannot."""

import asyncio
import dataclasses
import json
import pathlib

import pytest

from envs.gem import format_tool_call
from envs.rock import SandboxConfig
from envs.tasks.harbor import HarborEnv
from envs.tasks.harbor.errors import TaskError
from envs.tasks.made import Case, Draft, score_mutants, verify, write_draft
from envs.tasks.made.draft import run_program
from envs.tasks.made.pro import load_pro

CONFIG = SandboxConfig(isolation="best_available")
ORACLE = "while read a b; do\n  if [ $a -gt 3 ]; then echo $(( $a + $b )); fi\ndone\n"


def small(cases=((("1 2\n", ""), ("5 6\n", "11")))):
    return Draft(
        name="small/sum",
        domain="text",
        family="small",
        language="shell",
        instruction="Write /app/sum.sh.",
        program="sum.sh",
        oracle=ORACLE,
        cases=[
            Case(run_program("shell", "sum.sh"), stdin=given, stdout=wanted)
            for given, wanted in cases
        ],
    )


async def play(folder: pathlib.Path, command: str) -> float:
    env = HarborEnv(folder, CONFIG)
    try:
        await env.areset()
        await env.astep(format_tool_call("bash", {"command": command}))
        _, reward, _, _, _ = await env.astep("done")
        return reward
    finally:
        await env.aclose()


def deliver(text: str) -> str:
    return f"cat > /app/sum.sh << 'END'\n{text}\nEND"


def test_a_python_program_finds_its_own_modules_and_not_the_verifiers(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "of_tests.py").write_text("")
    (tmp_path / "helper.py").write_text("answer = 42\n")
    (tmp_path / "program.py").write_text(
        "import importlib.util\nfrom helper import answer\n"
        "print(answer, importlib.util.find_spec('of_tests'))\n"
    )
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as graders set them for themselves
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tests"))
    found = verify.run(["python3", "program.py"], tmp_path, "", 10.0)
    assert found == (0, "42 None\n")


@pytest.mark.long
@pytest.mark.parametrize(
    ("program", "reward"),
    [
        (ORACLE, 1.0),
        # Nothing on the disk of the verifier tells what is expected.
        ("grep -rl 11 /tests ../tests 2> /dev/null; cat /tests/* ; echo 11", 0.0),
        # A process that lives on cannot overwrite the reward.
        (
            "setsid sh -c 'while :; do echo 1 > /logs/verifier/reward.txt; sleep .01; done' &"
            "\necho 1 > /logs/verifier/reward.txt",
            0.0,
        ),
        ("kill -9 $PPID; kill -9 -1", 0.0),
    ],
)
def test_only_the_work_earns_the_reward(tmp_path, program, reward):
    write_draft(small(), tmp_path / "task")
    assert asyncio.run(play(tmp_path / "task", deliver(program))) == reward


def test_weak_cases_let_mutants_through_and_strong_ones_do_not():
    weak = asyncio.run(score_mutants(small((("5 6\n", "11"),)), 12, 0))
    cases = (("3 2\n4 1\n", "5"), ("5 6\n", "11"), ("2 9\n", ""), ("10 1\n", "11"))
    strong = asyncio.run(score_mutants(small(cases), 12, 0))
    assert weak.score < 0.9 < strong.score and weak.survivors
    assert weak.fakes == ("constant",) and strong.fakes == ()


def test_a_reference_solution_that_fails_has_no_score():
    wrong = dataclasses.replace(small(), oracle="echo 7\n")
    with pytest.raises(ValueError, match="reference solution fails"):
        asyncio.run(score_mutants(wrong, 4, 0))


def test_a_generator_that_makes_another_task_than_the_proven_one_is_noticed(tmp_path):
    index = tmp_path / "pro.json"
    entry = {"family": "logs", "seed": 1, "digest": "0" * 16}
    index.write_text(json.dumps({"tasks": [entry]}))
    with pytest.raises(TaskError, match="was proven"):
        load_pro(index)
    index.write_text("{}")
    with pytest.raises(TaskError, match="not an index"):
        load_pro(index)


# Its own text holds the answer in two parts, so that it does not find itself.
SNOOPER = """\
python3 -c '
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid(): continue
    try:
        maps, mem = open(f"/proc/{pid}/maps").read(), open(f"/proc/{pid}/mem", "rb")
        for row in maps.splitlines():
            start, end = (int(part, 16) for part in row.split()[0].split("-"))
            mem.seek(start)
            if b"secret-ans" + b"wer-7c" in mem.read(end - start):
                print("secret-ans" + "wer-7c")
                raise SystemExit
    except (OSError, ValueError, OverflowError):
        pass
'
for place in /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/fd/*; do
  timeout 1 head -c 100000 $place 2> /dev/null | grep -a -o secret-ans''wer-7c && break
done
"""


@pytest.mark.slow
def test_a_program_cannot_read_what_is_expected_from_another_process(tmp_path):
    wanted = "secret-answer-7c"
    write_draft(small((("5 6\n", wanted),)), tmp_path / "told")
    assert asyncio.run(play(tmp_path / "told", deliver(f"echo {wanted}"))) == 1.0
    write_draft(small((("5 6\n", wanted),)), tmp_path / "task")
    assert asyncio.run(play(tmp_path / "task", deliver(SNOOPER))) == 0.0


def test_a_program_that_waits_longer_than_it_may_compute_ends_in_time(tmp_path):
    waits = verify.run(["bash", "-c", "sleep 1.5; echo done"], tmp_path, "", 1.0)
    assert waits == (0, "done\n")
    assert verify.run(["bash", "-c", "while :; do :; done"], tmp_path, "", 0.3) == (None, "")


def test_cases_after_one_that_did_not_end_are_not_waited_for(tmp_path):
    (tmp_path / "p.sh").write_text("while :; do :; done\n")
    case = {"argv": ["bash", "{app}/p.sh"], "expect": {"stdout": ""}}
    order = {"program": "p.sh", "seconds": 0.3, "cases": [case] * 9}
    assert verify.judge(order, str(tmp_path)) == [f"case 1: {verify.TOO_SLOW}"]
