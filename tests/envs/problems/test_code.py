"""Programming, in real sandboxes: the reference passes, and no code passes that does not compute
the values.
"""

import asyncio

import pytest

from envs.gem import make
from envs.problems import LEVELS, CodeEnv
from envs.problems import code as code_module
from envs.problems.code import read_code, same
from envs.problems.code_families import FAMILIES
from envs.rock import Sandbox, SandboxConfig, SandboxError

CONFIG = SandboxConfig(isolation="best_available")


def submit_all(jobs):
    """(reward, ending, note) of each (family, level, seed, turn or a function of the environment),
    four sandboxes at once.
    """

    async def everything():
        gate = asyncio.Semaphore(4)

        async def one(family, level, seed, action):
            async with gate:
                env = CodeEnv(family, level, seed, CONFIG)
                env.reset()
                _, reward, _, _, info = await env.astep(action(env) if callable(action) else action)
                return reward, info["ending"], info["note"]

        return await asyncio.gather(*(one(*job) for job in jobs))

    return asyncio.run(everything())


def demonstrator(env):
    return env.demonstrator_action()


def test_every_reference_passes_its_hidden_inputs():
    assert {
        one[:2] for one in submit_all([(family, "hard", 1, demonstrator) for family in FAMILIES])
    } == {(1.0, "success")}


@pytest.mark.slow
def test_hundreds_of_references_pass_and_cheats_do_not():
    jobs = [
        (family, level, seed, demonstrator)
        for family in FAMILIES
        for level in LEVELS
        for seed in range(10)
    ]
    assert {one[:2] for one in submit_all(jobs)} == {(1.0, "success")}
    tricks = [
        (family, level, seed, lambda env, number=number: list(env.cheats().values())[number][0])
        for family, level, seed, _ in jobs
        for number in range(4)
    ]
    assert {one[:2] for one in submit_all(tricks)} == {(0.0, "failure")}


HACKS = {
    "exits": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "equals all": (
        "class E(int):\n    __eq__ = lambda a, b: True\n    __hash__ = int.__hash__\ndef"
        " inversions(values):\n    return E(7)"
    ),
    "reports": (
        "import os\nfor fd in range(1, 9):\n    try:\n        os.write(fd, b'{\"value\": 0}\\n' *"
        " 20)\n    except OSError:\n        pass\nos._exit(0)"
    ),
    "replaces json": (
        'import json\njson.dumps = lambda *a, **k: \'{"value": 0, "passed": true}\'\ndef'
        " inversions(values):\n    return 0"
    ),
    "reads the grader": (
        "import gc, inspect, sys\ndef inversions(values):\n    for frame in inspect.stack():\n     "
        "   for name in ('truths', 'truth', 'expected'):\n            if name in"
        " frame.frame.f_globals:\n                return frame.frame.f_globals[name]\n    return 0"
    ),
    "looks for files": (
        "import glob\ndef inversions(values):\n    found = [one for one in glob.glob('**',"
        " recursive=True) if 'truth' in one or 'expected' in one]\n    return len(found)"
    ),
    "not a number": "def inversions(values):\n    return float('nan')",
    "deep": (
        "def inversions(values):\n    import os, sys\n    os.write(3, b'[' * 5000 + b'\\n')\n   "
        " os._exit(0)"
    ),
    "another name": "def other(values):\n    return 0",
    "truth as bool": "def inversions(values):\n    return True",
    "raises": "def inversions(values):\n    raise BaseException('x')",
}


def test_hacks_earn_nothing_and_the_note_says_why():
    outcomes = dict(
        zip(
            HACKS,
            submit_all(
                [("inversions", "medium", 2, f"```python\n{code}\n```") for code in HACKS.values()]
            ),
            strict=True,
        )
    )
    assert {outcome[:2] for outcome in outcomes.values()} == {(0.0, "failure")}, outcomes
    assert (
        "0 results instead of 20" in outcomes["exits"][2]
        and "hidden inputs give another result" in outcomes["reads the grader"][2]
    )


def test_a_run_past_its_time_is_a_timeout_and_a_lost_sandbox_no_ones_failure(monkeypatch):
    monkeypatch.setattr(code_module, "TIMEOUT_SECONDS", 0.5)
    (outcome,) = submit_all([("inversions", "easy", 0, "```python\nwhile True: pass\n```")])
    assert outcome[:2] == (0.0, "timeout")

    class Lost:
        def __init__(self, *_):
            pass

        async def __aenter__(self):
            raise SandboxError("no sandbox")

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(code_module, "Sandbox", Lost)
    (outcome,) = submit_all([("inversions", "easy", 0, demonstrator)])
    assert outcome == (0.0, "infra_sandbox", "SandboxError: no sandbox")


def test_a_sandbox_without_python_is_named_and_code_cannot_pretend_it(monkeypatch):
    pretending = "```python\nimport os\nos.write(2, b'python3: not found')\nos._exit(127)\n```"
    (outcome,) = submit_all([("inversions", "easy", 0, pretending)])
    assert outcome[:2] == (0.0, "failure")

    class WithoutPrograms(Sandbox):
        async def execute(self, command, **options):
            return await super().execute(f"PATH=/nowhere\n{command}", **options)

    monkeypatch.setattr(code_module, "Sandbox", WithoutPrograms)
    (outcome,) = submit_all([("inversions", "easy", 0, demonstrator)])
    assert outcome[:2] == (0.0, "infra_verifier") and "need python3" in outcome[2]


def test_a_value_counts_with_its_type():
    assert same({"value": [1, "a", None]}, [1, "a", None]) and same({"value": [1, 2]}, (1, 2))
    assert not any(
        same(one, 1)
        for one in (
            {"value": True},
            {"value": 1.0},
            {"value": "1"},
            {"error": "x"},
            {"value": 1, "error": "x"},
            {},
            {"value": float("nan")},
        )
    )


def test_where_the_code_stands():
    assert (
        read_code("so\n```python\na = 1\n```\nor\n```python\nb = 2\n```") == "b = 2\n"
        and read_code("```\nx\n```") == "x\n"
        and read_code("```python\nb = 2\n```\nIt prints\n```\n2\n```") == "b = 2\n"
        and read_code("def f(): pass") == "def f(): pass"
    )
    assert (
        read_code("done") is None
        and read_code("```python\nx") is None
        and read_code("```") is None
        and read_code("``````") is None
    )
    assert read_code("<think>```python\nx\n```</think>done") is None


@pytest.mark.parametrize(
    "action, note",
    [
        ("done", "no ```python"),
        (f"```python\n{'x' * 100_001}\n```", "100000 bytes"),
        ("```python\n\0\n```", "NUL"),
    ],
)
def test_what_is_no_code_is_malformed(action, note):
    env = make("rome:code/postfix-easy")
    env.reset(seed=1)
    *_, info = env.step(action)
    assert info["ending"] == "malformed" and note in info["note"]


def test_a_seed_decides_the_problem_and_its_inputs_are_hidden():
    for family in FAMILIES:
        env, twin = CodeEnv(family, "medium"), CodeEnv(family, "medium")
        assert (
            env.reset(3)[0] == twin.reset(3)[0]
            and env.inputs == twin.inputs
            and env.reset(4)[0] != twin.problem
        )
        assert len(env.inputs) == 20 and not any(shown in env.inputs for shown, _ in env.shown)
