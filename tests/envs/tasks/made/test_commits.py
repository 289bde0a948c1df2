"""Tasks from commits: fails before, passes after, and never by the repository's own settings."""

import asyncio
import subprocess

import pytest

from envs.tasks.made.commits import commit_draft
from envs.tasks.made.draft import Draft
from envs.tasks.made.packages import package_drafts, record_package
from envs.tasks.made.prove import judge_programs, score_mutants

BROKEN = "def clamp(x, low, high):\n    return max(low, x)\n"
WHOLE = "def clamp(x, low, high):\n    return max(low, min(x, high))\n"
TESTS = """\
import unittest

from calc.core import clamp


class T(unittest.TestCase):
    def test_low(self):
        self.assertEqual(clamp(-3, 1, 5), 1)
"""
MORE = TESTS + "\n    def test_high(self):\n        self.assertEqual(clamp(9, 1, 5), 5)\n"
SETTINGS = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *SETTINGS, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Make a repository whose second commit mends a function; return (folder, commit by name)."""
    folder = tmp_path / "calc-repo"
    for name in ("calc", "tests"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    git(folder, "init", "-q", "-b", "main")
    commits = {}
    steps = {
        "first": {"calc/core.py": BROKEN, "tests/test_core.py": TESTS},
        "mend": {"calc/core.py": WHOLE, "tests/test_core.py": MORE},
        "words": {"calc/core.py": WHOLE + "# done\n", "tests/test_core.py": MORE + "# done\n"},
        "notes": {"NOTES": "none\n"},
    }
    for name, files in steps.items():
        for path, text in files.items():
            (folder / path).write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", f"Do the {name}")
        commits[name] = git(folder, "rev-parse", "HEAD")
    return folder, commits


@pytest.mark.long
def test_a_commit_that_its_tests_tell_apart_is_a_task(repository, tmp_path):
    folder, commits = repository
    marker = tmp_path / "ran"
    with open(folder / ".git" / "config", "a") as file:
        file.write(
            f'[core]\n\tfsmonitor = touch {marker}\n[filter "x"]\n\tsmudge = touch {marker}\n'
        )
    draft = asyncio.run(commit_draft(folder, commits["mend"], "best_available", "MIT"))
    assert isinstance(draft, Draft) and not marker.exists()
    assert draft.files["calc/core.py"] == BROKEN and draft.oracle == WHOLE
    assert "tests/test_core.py" not in draft.files and "Do the mend" in draft.instruction
    forged = "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + BROKEN
    forged_run = "import unittest\nunittest.TestCase.run = lambda *a: None\n" + BROKEN
    programs = [WHOLE, BROKEN, forged, forged_run, ""]
    outcomes = asyncio.run(judge_programs(draft, programs))
    assert [not faults for faults in outcomes] == [True, False, False, False, False]
    assert asyncio.run(score_mutants(draft, 6, 0)).score >= 0.8


def test_other_commits_are_refused_with_the_reason(repository):
    folder, commits = repository
    words = asyncio.run(commit_draft(folder, commits["words"], "best_available"))
    assert words == "its tests pass before the commit, too"
    notes = asyncio.run(commit_draft(folder, commits["notes"], "best_available"))
    assert isinstance(notes, str) and "0 sources" in notes


@pytest.mark.slow
def test_a_package_without_tests_gives_tasks_that_its_recording_proves(tmp_path):
    package = tmp_path / "shapes"
    package.mkdir()
    (package / "__init__.py").write_text("from shapes.area import area, perimeter\n")
    (package / "area.py").write_text(
        '"""Rectangles."""\n\n\n'
        "def area(width, height=2):\n"
        '    """Return the area.\n\n    >>> area(3, 4)\n    12\n    """\n'
        "    if width < 0:\n        raise ValueError(width)\n    return width * height\n\n\n"
        "def perimeter(width, height):\n"
        '    """Return the perimeter.\n\n    >>> perimeter(3, 4)\n    14\n    """\n'
        "    return 2 * (width + height)\n"
    )
    recording = asyncio.run(record_package(package, 0, "best_available"))
    drafts = asyncio.run(package_drafts(recording, 3, 0, "best_available"))
    assert len(drafts) == 3 and len({draft.digest for draft in drafts}) == 3
    draft = drafts[0]
    outcomes = asyncio.run(judge_programs(draft, [draft.oracle, draft.files[draft.program]]))
    assert outcomes[0] == [] and outcomes[1] != []
