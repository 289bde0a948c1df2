"""Generated program repair: every operator makes another program of the same text, only noticed
bugs are tasks, and only mending earns the reward.
"""

import ast
import asyncio
import dataclasses
import difflib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import TaskError
from envs.tasks.repair import (
    OPERATORS,
    candidates_of,
    draw,
    is_another_program,
    load_package,
    repair_tasks,
    shipped,
)
from envs.tasks.repair.prove import Run, check_baseline, is_sound, run_tests
from tests.envs.tasks.harbor.conftest import CONFIG
from tests.envs.tasks.harbor.playing import oracle, play

EVERYTHING = '''\
"""Docstring."""
__all__ = ["f"]
NAME: str = "abc"

def f(a, b=2, *, flag=True):
    """1 + 1"""
    total, rest = 0, f"{a + 1}"  # é 1 + 1
    for item in range(len(a)):
        if not flag and item > 0 or b is None:
            continue
        elif a[item:] == b:
            break
        total += g(a[item], b, key=1.5)
    try:
        total = h(a, b) * 3
    except ValueError:
        total = "x"
    if total in (1, 2):
        print(total)
    else:
        total = (b
                 - 1)
    return total
'''


def test_every_operator_finds_its_place_and_each_edit_changes_a_few_lines_of_the_program():
    edits = edits_of(EVERYTHING)
    assert {edit.operator for edit in edits} == set(OPERATORS)
    whole = ast.dump(ast.parse(EVERYTHING))
    for edit in edits:
        text = edit.apply(EVERYTHING)
        assert ast.dump(ast.parse(text)) != whole
        changed = [
            row
            for row in difflib.ndiff(EVERYTHING.splitlines(), text.splitlines())
            if row[0] in "+-"
        ]
        assert len(changed) <= 8 and "# é 1 + 1" in text  # comments and layout stay
        assert not any(word in row for row in changed for word in ("Docstring", "__all__", '"""'))


def edits_of(text):
    return [edit for edit in candidates_of(text) if is_another_program(text, edit)]


@pytest.mark.parametrize(
    "operator, text, mutants",
    [
        ("comparison", "x = a < b", ["x = a <= b"]),
        ("comparison", "x = a not in b", ["x = a in b"]),
        ("comparison", "x = a == b != c", ["x = a != b != c", "x = a == b == c"]),
        ("arithmetic", "x = a + (b)", ["x = a - (b)"]),
        ("arithmetic", "x += 1", ["x -= 1"]),
        ("connective", "x = a and b", ["x = a or b"]),
        ("negation", "if a:\n    b()\n", ["if not a:\n    b()\n"]),
        ("negation", "x = 1 if not a else 2", ["x = 1 if a else 2"]),
        ("off_by_one", "x = a[0]", ["x = a[1]"]),
        ("off_by_one", "x = a[3]", ["x = a[2]", "x = a[4]"]),
        ("wrong_constant", "x = True", ["x = False"]),
        ("wrong_constant", "x = 'ab'", ["x = 'a'"]),
        ("wrong_variable", "def f(a, b):\n    return a\n", ["def f(a, b):\n    return b\n"]),
        ("dropped_return", "def f(a):\n    return a()\n", ["def f(a):\n    a()\n"]),
        ("swapped_arguments", "f(a, b)", ["f(b, a)"]),
        ("removed_branch", "if a:\n    b()\nelse:\n    c()\n    d()\n", ["c()\nd()\n"]),
        (
            "removed_branch",
            "if a:\n    b()\nelif c:\n    d()\n",
            ["if a:\n    b()\nelse:\n    pass\n", "if c:\n    d()\n"],
        ),
        ("removed_handler", "try:\n    a()\nexcept E:\n    b()\n", ["a()\n"]),
        ("removed_statement", "a()", ["pass"]),
        ("loop_exit", "while a:\n    break\n", ["while a:\n    continue\n"]),
        ("lost_slice", "x = a[b:c]", ["x = a[:c]", "x = a[b:]"]),
        ("keyword_lost", "x = f(a, k=1)", ["x = f(a)"]),
        ("arithmetic", "x = f'{a + b}'", []),
        ("wrong_constant", "def f():\n    'doc'\n", []),
        ("comparison", "if __name__ == '__main__':\n    a()\n", []),
        ("off_by_one", "x: Literal[1] = y", []),
    ],
)
def test_what_an_operator_does(operator, text, mutants):
    assert sorted(
        edit.apply(text) for edit in edits_of(text) if edit.operator == operator
    ) == sorted(mutants)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abif elsrtun():=<>+-*/%[]0123'\"\n\t\\é,.#&", max_size=60))
def test_any_text_has_edits_or_is_no_python(text):
    try:
        edits = edits_of(text)
    except (SyntaxError, ValueError):
        return
    for edit in edits:
        assert edit.apply(text) != text


def test_the_same_seed_draws_the_same_and_another_seed_another_order_with_all_kinds_early():
    package = load_package("inifile")
    one, same, other = (list(itertools.islice(draw(package, seed), 60)) for seed in (0, 0, 1))
    assert one == same != other and len(set(one)) == 60
    assert len({edit.operator for _, edit in one[:15]}) >= 12


# -- packages
# -------------------------------------------------------------------------------------------------


def write_package(folder, name="small", **files):
    for path, text in {
        f"{name}__init__": (
            "def double(a):\n    return a * 2\n\n\ndef unused(a):\n    return a - 1\n"
        ),
        "tests__test_it": (
            f"from {name} import double\n\n\ndef test_double():\n    assert double(3) == 6\n\n\ndef"
            " test_true():\n    pass\n"
        ),
        **files,
    }.items():
        place = folder / (
            path.replace(f"{name}__init__", f"{name}/__init__").replace("tests__", "tests/") + ".py"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder


@pytest.mark.long
def test_a_package_of_ones_own_is_judged_by_pytest_and_bugs_that_nobody_notices_are_no_tasks(
    tmp_path,
):
    folder = write_package(tmp_path / "mine")
    package = load_package(str(folder))
    assert (package.framework, package.sources, package.targets) == (
        "pytest",
        ("small/__init__.py",),
        ("tests/test_it.py",),
    )
    tasks = repair_tasks([str(folder)], 1)
    assert all(
        task.metadata["line"] == 2
        and task.metadata["fail_to_pass"] == ["tests/test_it.py::test_double"]
        for task in tasks
    )  # never in `unused`
    assert asyncio.run(oracle(tasks[0])) == (1.0, "success")
    plugin = (
        "printf 'import pytest\\n@pytest.hookimpl(hookwrapper=True)\\ndef"
        " pytest_runtest_makereport(item, call):\\n    out = yield\\n    if item.name =="
        ' "test_double": out.get_result().outcome = "passed"\\n\' > won.py;'
        " printf '[tool:pytest]\\naddopts = -p won\\n' > setup.cfg"
    )
    assert asyncio.run(play(tasks[0], plugin))[0] == 0.0


@pytest.mark.slow
def test_a_package_with_fewer_bugs_than_are_asked_for_is_refused(tmp_path):
    folder = write_package(tmp_path / "mine")
    assert asyncio.run(play(repair_tasks([str(folder)], 1)[0]))[0] == 0.0
    with pytest.raises(TaskError, match=r"of its .* possible bugs are noticed"):
        repair_tasks([str(folder)], 50)


@pytest.mark.long
@pytest.mark.parametrize(
    "files, message",
    [
        ({"tests__test_it": "def test_no():\n    assert False\n"}, "own tests do not run"),
        ({"small__init__": "def f(:\n"}, "not valid Python"),
        pytest.param(
            {"tests__test_it": "import nosuch_package\n"},
            "own tests do not run",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"small__init__": "while True: pass\n"}, "own tests do not run", marks=pytest.mark.slow
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_refused_by_name(tmp_path, files, message, monkeypatch):
    monkeypatch.setattr("envs.tasks.repair.prove.CPU_SECONDS", 1)
    with pytest.raises(TaskError, match=message) as caught:
        repair_tasks([str(write_package(tmp_path / "mine", **files))], 1)
    assert str(tmp_path / "mine") in str(caught.value)


def test_a_folder_without_tests_or_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(TaskError, match="needs both"):
        load_package(str(tmp_path))
    with pytest.raises(TaskError, match="csvlite"):
        load_package(str(tmp_path / "none"))


def test_every_package_that_ships_passes_its_tests_by_unittest():
    async def all_of_them():
        packages = [load_package(name) for name in shipped()]
        return packages, await asyncio.gather(*(run_tests(package, []) for package in packages))

    packages, runs = asyncio.run(all_of_them())
    for package, (run,) in zip(packages, runs, strict=True):
        check_baseline(package, run)
        assert package.framework == "unittest" and len(run.passed) == len(run.outcomes) >= 10


FLAKY = """import os, unittest
from small import double

class T(unittest.TestCase):
    def test_double(self):
        self.assertEqual(double(3), 6)

    def test_true(self):
        pass

    def test_every_other_time(self):
        path = "/tmp/before" if os.access("/tmp", os.W_OK) else "before"
        before = os.path.exists(path)
        os.unlink(path) if before else open(path, "w").close()
        self.assertTrue(before)
"""


def test_a_test_that_fails_now_and_then_proves_nothing(tmp_path):
    package = load_package(
        str(write_package(tmp_path / "mine", tests__test_it=FLAKY, tests____init__=""))
    )
    bugs = {
        edit.apply("def double(a):\n    return a * 2\n\n\ndef unused(a):\n    return a - 1\n"): (
            path,
            edit,
        )
        for path, edit in draw(package, 0)
    }
    noticed, unnoticed = (
        next(bug for text, bug in bugs.items() if part in text) for part in ("a + 2", "a + 1")
    )
    before, one, other = asyncio.run(run_tests(package, [noticed, unnoticed]))
    assert before.outcomes == {
        "tests.test_it.T.test_double": "passed",
        "tests.test_it.T.test_every_other_time": "flaky",
        "tests.test_it.T.test_true": "passed",
    }
    assert is_sound(before, one) and not is_sound(before, other) and other.passed >= before.passed


def test_what_is_sound():
    before = Run({"a": "passed", "b": "passed", "c": "skipped"}, True)
    assert is_sound(before, Run({"a": "passed", "b": "failed", "c": "skipped"}, True)) and is_sound(
        before, Run({"a": "passed"}, True)
    )
    for after in (
        before,
        Run({"a": "passed", "b": "failed"}, False),
        Run({"a": "failed", "b": "failed"}, True),
        Run({}, True),
    ):
        assert not is_sound(before, after)


# -- tasks
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return repair_tasks(["rational", "csvlite"], 2)


@pytest.mark.long
def test_tasks_are_the_same_again_and_spread_over_packages_and_kinds(tasks):
    assert [task.name for task in repair_tasks(["rational", "csvlite"], 2)] == [
        task.name for task in tasks
    ]
    assert [task.tags[0] for task in tasks] == ["rational", "csvlite"] and len(
        {task.tags for task in tasks}
    ) == 2
    assert all(
        task.metadata["fail_to_pass"]
        and task.metadata["pass_to_pass"]
        and task.family == task.category
        for task in tasks
    )


@pytest.mark.long
def test_the_oracle_earns_1_and_nothing_or_tampering_with_the_tests_0(tasks):
    async def all_of_them():
        return await asyncio.gather(
            oracle(tasks[0]),
            oracle(tasks[1]),
            play(tasks[0]),
            play(tasks[0], "rm -r tests; mkdir tests; touch tests/__init__.py"),
            play(
                tasks[1],
                "printf 'import unittest\\nunittest.TestCase.assertEqual = lambda *a, **k:"
                " None\\nunittest.TestCase.assertRaises = None\\n' >> csvlite/__init__.py",
            ),
        )

    first, second, *others = asyncio.run(all_of_them())
    assert first == second == (1.0, "success") and [reward for reward, _ in others] == [0.0] * 3
    assert "cannot be believed" in others[2][1]["test_output"]


@pytest.mark.slow
def test_a_hundred_tasks_are_sound():
    async def prove(tasks):
        gate = asyncio.Semaphore(4)

        async def limited(coroutine):
            async with gate:
                return await coroutine

        return await asyncio.gather(
            *(limited(one) for task in tasks for one in (oracle(task), play(task)))
        )

    results = asyncio.run(prove(repair_tasks(count=100, seed=7)))
    assert [reward for reward, _ in results] == [1.0, 0.0] * 100


@pytest.mark.slow
def test_tasks_are_graded_in_the_landlock_tier_too(tasks):
    weak = dataclasses.replace(CONFIG, tier="landlock")
    assert (
        asyncio.run(oracle(tasks[0], weak)) == (1.0, "success")
        and asyncio.run(play(tasks[0], config=weak))[0] == 0.0
    )


@pytest.mark.long
def test_a_package_that_cannot_be_used_is_left_out_by_name(tmp_path):
    (tmp_path / "nothing").mkdir()
    faults = []
    tasks = repair_tasks(["intervals", str(tmp_path / "nothing")], count=2, faults=faults)
    assert [task.metadata["package"] for task in tasks] == ["intervals"]
    (fault,) = faults
    assert fault.file == tmp_path / "nothing"
