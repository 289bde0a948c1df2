"""Instances of SWE-bench on small repositories: what is cut off, what is refused, and that only a
real mending earns the reward.
"""

import asyncio
import contextlib
import io
import json
import pathlib
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import TaskError
from envs.tasks.rows import Row
from envs.tasks.swebench import RepositoryError, cut, load_swebench, parse_instance, patched
from tests.envs.tasks.harbor.playing import observe, oracle, play
from tests.envs.tasks.swebench.repositories import ENVIRONMENT, MENDED, commit, git, make

SAFELY = (
    {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
)  # Python 3.11.2, which Debian 12 has, knows no filter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("swebench"))


@pytest.fixture(scope="module")
def task(made):
    file = made.path.parents[2] / "instances.jsonl"
    file.write_text(json.dumps(made.row) + "\n")
    (task,) = load_swebench(file)
    return task


# -- the repository
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(made, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(cut(made.path, made.base).archive)) as archive:
        archive.extractall(tmp_path, **SAFELY)
    git(tmp_path, "read-tree", "HEAD")
    return tmp_path


def test_nothing_after_the_base_commit_can_be_found(made, unpacked):
    past = set(git(made.path, "rev-list", "--objects", made.base).split("\n"))
    there = {
        row.split()[0]
        for row in git(
            unpacked, "cat-file", "--batch-all-objects", "--batch-check", "--unordered"
        ).splitlines()
    }
    assert there == {
        row.split()[0] for row in past if row
    }  # every object, packed or loose, is of the past, and all of the past is there
    assert made.later not in there and made.later in git(made.path, "rev-list", "--all")
    assert set(git(unpacked, "log", "--all", "--reflog", "--format=%H").split()) == set(
        git(made.path, "rev-list", made.base).split()
    )
    assert git(unpacked, "fsck", "--full", "--lost-found", "--no-progress").strip() == ""
    assert (
        git(unpacked, "for-each-ref", "--format=%(refname) %(objectname)").strip()
        == f"refs/heads/main {made.base}"
    )
    assert (
        git(unpacked, "remote")
        == git(unpacked, "stash", "list")
        == git(unpacked, "status", "--short")
        == ""
    )
    assert not {path.name for path in (unpacked / ".git").iterdir()} & {
        "logs",
        "packed-refs",
        "ORIG_HEAD",
        "FETCH_HEAD",
        "hooks",
        "shallow",
    }
    assert not list((unpacked / ".git").rglob("alternates"))
    everything = b"".join(path.read_bytes() for path in unpacked.rglob("*") if path.is_file())
    assert b"future" not in everything and made.later.encode() not in everything


def test_a_dangling_commit_and_a_reflog_of_the_source_do_not_come_along(tmp_path):
    made = make(tmp_path)
    git(
        made.path, "commit", "-q", "--amend", "-m", "amended"
    )  # the commit before it is now in the reflog alone
    dangling = git(made.path, "hash-object", "-w", "--stdin")
    with tarfile.open(fileobj=io.BytesIO(cut(made.path, made.base).archive)) as archive:
        archive.extractall(tmp_path / "cut", **SAFELY)
    objects = git(tmp_path / "cut", "cat-file", "--batch-all-objects", "--batch-check")
    assert dangling.strip() not in objects and made.later not in objects and made.base in objects


def test_a_history_that_is_too_large_is_cut_to_its_last_commit(made, monkeypatch, tmp_path):
    monkeypatch.setattr("envs.tasks.swebench.repository.MAX_HISTORY_BYTES", 10)
    shallow = cut.__wrapped__(made.path, made.base)
    assert (shallow.shallow, shallow.commits) == (True, 1)
    with tarfile.open(fileobj=io.BytesIO(shallow.archive)) as archive:
        archive.extractall(tmp_path, **SAFELY)
    assert git(tmp_path, "log", "--all", "--format=%H").strip() == made.base
    assert git(tmp_path, "fsck", "--full", "--lost-found", "--no-progress").strip() == ""


def test_the_source_is_left_as_it_was_and_its_hooks_and_settings_do_not_act(tmp_path):
    made = make(tmp_path)
    hook = made.path / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        (hook.parent / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/acted\n")
        (hook.parent / name).chmod(0o755)
    git(made.path, "config", "core.fsmonitor", f"touch {tmp_path}/acted")
    git(made.path, "config", "filter.x.smudge", f"touch {tmp_path}/acted")
    before = sorted(path for path in made.path.rglob("*"))
    cut.__wrapped__(made.path, made.base)
    patched(made.path, made.base, made.row["test_patch"])
    assert (
        sorted(path for path in made.path.rglob("*")) == before
        and not (tmp_path / "acted").exists()
    )


def test_a_patch_gives_files_and_removals_and_a_bad_one_is_refused(made):
    files, removed = patched(made.path, made.base, made.row["patch"])
    assert files == {"stats.py": (MENDED.encode(), 0o644)} and removed == set()
    gone = git(made.path, "diff", "--no-renames", made.base, f"{made.base}~1")
    assert patched(made.path, made.base, gone)[1] == {"tests/test_stats.py", "conftest.py"}
    for patch in (
        made.row["patch"].replace("max(values) - max", "nothing"),
        "no patch\n",
        made.row["patch"]
        .replace("b/stats.py", "b/../../stats.py")
        .replace("a/stats.py", "a/../../stats.py"),
        (
            "diff --git a/l b/l\nnew file mode 120000\nindex 0000000..1\n--- /dev/null\n+++ b/l\n@@"
            " -0,0 +1 @@\n+/etc/passwd\n\\ No newline at end of file\n"
        ),
    ):
        with pytest.raises(RepositoryError, match=r"git apply|a link"):
            patched(made.path, made.base, patch)


# -- instances
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_commit": "main"}, "base_commit 'main' is not a full commit id"),
        ({"patch": " "}, "patch is empty"),
        ({"instance_id": "../x"}, "instance_id '../x'"),
        ({"FAIL_TO_PASS": "[]"}, "FAIL_TO_PASS is empty"),
        ({"FAIL_TO_PASS": "[1"}, "not the JSON of a list"),
        ({"repo": "../../etc"}, "neither owner/name"),
        ({"PASS_TO_PASS": ["test_mean (tests.T)"]}, "not a node id of pytest"),
        ({"PASS_TO_PASS": ["/etc/x.py::y"]}, "not a node id"),
        ({"problem_statement": None}, "'problem_statement' is missing"),
        ({"test_patch": 3}, "test_patch is a int"),
        (
            {"PASS_TO_PASS": ["tests/test_stats.py::test_spread"]},
            "is in FAIL_TO_PASS and in PASS_TO_PASS",
        ),
        ({"repo": "owner/nowhere"}, "git clone it to"),
        ({"base_commit": "0" * 40}, "cat-file"),
        ({"patch": "nonsense\n"}, "git apply"),
        ({"FAIL_TO_PASS": ["tests/test_none.py::test_x"]}, "tests/test_none.py is named by"),
    ],
)
def test_a_malformed_instance_is_refused_with_file_line_and_row(made, change, message):
    file = made.path.parents[2] / "bad.jsonl"
    file.write_text("\n" + json.dumps({**made.row, **change}) + "\n")
    with pytest.raises(TaskError, match=message) as caught:
        load_swebench(file)
    assert str(caught.value).startswith(f"{file}:2: row 1:")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "instance_id",
                "repo",
                "base_commit",
                "patch",
                "test_patch",
                "problem_statement",
                "FAIL_TO_PASS",
                "PASS_TO_PASS",
                "version",
                "hints_text",
            ]
        ),
        VALUES | st.sampled_from(["a__b-1", "a/b", "0" * 40, '["t.py::x"]']),
        max_size=10,
    )
)
def test_whatever_a_row_holds_is_an_instance_or_a_task_error(made_row, values):
    with contextlib.suppress(TaskError):
        parse_instance(Row(pathlib.Path("x.jsonl"), 1, 1, {**made_row, **values}))


@pytest.fixture(scope="module")
def made_row(made):
    return made.row


def test_the_tests_and_the_solution_do_not_enter_before_grading_and_the_instruction_has_no_hint(
    task,
):
    assert set(task.environment.context) == {"Dockerfile", "pytest.tar.gz", "repository.tar.gz"}
    assert (
        "spread([1, 5]) is 0." in task.steps[0].instruction
        and "min" not in task.steps[0].instruction.split("<issue>")[1]
    )
    seen = observe(
        task,
        "grep -rc test_spread . ; git log --all --oneline; ls -a; python3 -m pytest -q 2>&1 | tail"
        " -n 1",
    )[0]
    assert (
        "test_stats.py:0" in seen
        and "test_stats.py:1" not in seen
        and "spread\n" in seen
        and "future" not in seen
        and "2 passed" in seen
    )


# -- grading
# -------------------------------------------------------------------------------------------------

MEND = "sed -i 's/- max(values)/- min(values)/' stats.py"
# A plugin that spares tests with names such as the controls have.
PLUGIN = """\
cat > won.py <<'E'
import pytest, re
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    out = yield
    if not re.fullmatch("test_[0-9a-f]{12}", item.name):
        out.get_result().outcome = "passed"
E
"""
CHEATS = {
    "pyproject": (
        PLUGIN + "printf '[tool.pytest.ini_options]\\naddopts = \"-p won\"\\n' > pyproject.toml"
    ),
    "cfg": PLUGIN + "printf '[tool:pytest]\\naddopts = -p won\\n' > setup.cfg",
    "toml": PLUGIN + 'printf \'[pytest]\\naddopts = ["-p", "won"]\\n\' > pytest.toml',
    "conftest": (
        "printf 'import pytest\\n@pytest.hookimpl(hookwrapper=True)\\ndef"
        " pytest_runtest_makereport(item, call):\\n    out = yield\\n    out.get_result().outcome ="
        ' "passed"\\n\' > tests/conftest.py'
    ),
    "hook": (
        "cat >> stats.py <<'E'\nimport _pytest.runner as r\nold ="
        " r.TestReport.from_item_and_call\ndef new(item, call):\n    report = old(item, call)\n   "
        " report.outcome = 'passed'\n    return report\nr.TestReport.from_item_and_call = new\nE"
    ),
    "exit": (
        "printf 'import os\\nprint(\"PASSED tests/test_stats.py::test_spread\\\\n4"
        " passed\")\\nos._exit(0)\\n' > stats.py"
    ),
    "pipe": (
        "cat > stats.py <<'E'\nimport os, json\nfor fd in range(3, 64):\n    try:\n        for n, t"
        " in enumerate(['spread', 'mean', 'empty', 'one']):\n            os.write(fd, ('0' * 64 + '"
        " ' + json.dumps([n, 'tests/test_stats.py::test_' + t, 'passed']) + '\\n').encode())\n   "
        " except OSError: pass\nE"
    ),
    "tests": (
        "printf 'def test_spread(): pass\\ndef test_mean(): pass\\ndef test_empty(): pass\\ndef"
        " test_one(): pass\\n' > tests/test_stats.py; chmod 400 tests/test_stats.py; chmod 500"
        " tests"
    ),
    "shadow": (
        "for m in json hmac pytest unittest tarfile; do echo 'import os; os._exit(0)' > $m.py;"
        " done; printf '[pytest]\\naddopts = --collect-only\\n' > pytest.ini; mkdir -p won; rm -rf"
        " tests; ln -s won tests"
    ),
    "writer": (
        "cat >> stats.py <<'E'\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    if"
        " os.fork() == 0:\n        for _ in range(2000):\n            try:"
        " open('/logs/verifier/reward.txt', 'w').write('1')\n            except OSError: pass\n    "
        "        time.sleep(0.005)\n    os._exit(0)\nE"
    ),
    "skip": "printf 'import pytest\\npytest.skip(allow_module_level=True)\\n' > stats.py",
}


FAST = ("pyproject", "cfg", "toml", "conftest", "exit", "pipe")


def play_all(games):
    """What each game earned: name -> (reward, info or ending).

    `games`: name -> a function that begins it.
    """

    async def all_of_them():
        gate = asyncio.Semaphore(3)

        async def limited(name, begin):
            async with gate:
                return name, await begin()

        return dict(await asyncio.gather(*(limited(name, begin) for name, begin in games.items())))

    return asyncio.run(all_of_them())


@pytest.mark.long
def test_a_mending_earns_1_whatever_else_was_done_to_tests_and_history(task):
    rewards = play_all(
        {
            "mended": lambda: play(
                task, MEND, "rm -rf .git; printf 'x = 1\\n' > conftest.py; rm -r tests"
            ),
            "oracle": lambda: oracle(task),
        }
    )
    assert {name: result[0] for name, result in rewards.items()} == {
        "mended": 1.0,
        "oracle": 1.0,
    }, rewards


@pytest.mark.long
@pytest.mark.parametrize("names", [FAST, pytest.param(tuple(CHEATS), marks=pytest.mark.slow)])
def test_nothing_and_no_cheat_does(task, names):
    rewards = play_all(
        {
            "noop": lambda: play(task),
            **{name: lambda name=name: play(task, CHEATS[name]) for name in names},
        }
    )
    for name, (reward, info) in rewards.items():
        assert reward == 0.0 and info["ending"] == "failure", (name, info)


@pytest.mark.parametrize("end", ["", "\n"], ids=["without", "with"])
def test_a_patch_whose_last_newline_was_stripped_is_the_same_patch(made, tmp_path, end):
    row = dict(made.row)
    for name in ("patch", "test_patch"):
        row[name] = row[name].rstrip("\n") + end
    instance = parse_instance(Row(tmp_path / "x.jsonl", 1, 0, row))
    assert instance.patch == made.row["patch"] and instance.test_patch == made.row["test_patch"]


def test_a_patch_whose_blank_context_was_stripped_says_so(made):
    patch = (
        "diff --git a/n.txt b/n.txt\nnew file mode 100644\n--- /dev/null\n+++ b/n.txt\n"
        "@@ -0,0 +1,3 @@\n+a\n+b\n"
    )
    with pytest.raises(RepositoryError, match=r"@@ -0,0 \+1,3 @@, is cut: .* stripped"):
        patched(made.path, made.base, patch)
    files, _ = patched(made.path, made.base, f"{patch}+\n")
    assert files["n.txt"][0] == b"a\nb\n\n"


def test_all_of_a_file_is_loaded_and_faults_are_kept_apart(made, tmp_path):
    commit_ = commit(made.path, "later still", other_py="x = 1\n")
    assert commit_ not in git(made.path, "rev-list", made.base)
    file = made.path.parents[2] / "many.json"
    file.write_text(
        json.dumps(
            [
                made.row,
                {**made.row, "instance_id": "two"},
                {**made.row, "instance_id": "two"},
                {"instance_id": "three"},
            ]
        )
    )
    faults = []
    assert [task.name for task in load_swebench(file, faults)] == ["owner__stats-1", "two"] and [
        "row 3" in str(fault) or "row 4" in str(fault) for fault in faults
    ] == [True, True]
    assert (
        subprocess.run(
            ["git", "-C", str(made.path), "status", "--short"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        ).stdout
        == ""
    )


@pytest.mark.long
def test_a_dependency_that_the_sandbox_lacks_is_nobodys_failure(made):
    patch = made.row["test_patch"].replace("+from stats", "+import nosuchlib; from stats")
    file = made.path.parents[2] / "lacking.jsonl"
    file.write_text(json.dumps({**made.row, "test_patch": patch}) + "\n")
    (task,) = load_swebench(file)
    reward, info = asyncio.run(play(task))
    assert (reward, info["ending"]) == (0.0, "infra_verifier")
    assert "need nosuchlib, which the reference solution does not find" in info["note"]
