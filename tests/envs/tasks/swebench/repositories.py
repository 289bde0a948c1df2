"""A small git repository with a bug, its mending and a later commit that must never be seen; and
the instance of it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess

STATS = (
    "def mean(values):\n    return sum(values) / len(values) if values else 0\n\n\ndef"
    " spread(values):\n    return max(values) - max(values)\n"
)
MENDED = STATS.replace("- max(values)", "- min(values)")
TESTS = (
    "from stats import mean\n\n\ndef test_mean():\n    assert mean([1, 3]) == 2\n\n\ndef"
    " test_empty():\n    assert mean([]) == 0\n"
)
MORE = (
    TESTS.replace("import mean", "import mean, spread")
    + "\n\ndef test_spread():\n    assert spread([1, 5]) == 4\n\n\ndef test_one():\n    assert"
    " spread([3]) == 0\n"
)
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
} | {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "a"), ("EMAIL", "a@example.org"), ("DATE", "2020-01-01T00:00:00Z"))
}


@dataclasses.dataclass
class Made:
    path: pathlib.Path
    base: str
    later: str
    row: dict


def git(path: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(path), *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(path: pathlib.Path, message: str, **files: str) -> str:
    for name, text in files.items():
        place = path / name.replace("__", "/").replace("_py", ".py")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", message)
    return git(path, "rev-parse", "HEAD").strip()


def make(folder: pathlib.Path) -> Made:
    """folder/repos/owner/stats, and its instance."""
    path = folder / "repos" / "owner" / "stats"
    path.mkdir(parents=True)
    git(path, "init", "-q", "-b", "trunk")
    commit(
        path,
        "begin",
        stats_py="def mean(values):\n    return sum(values) / len(values)\n",
        README="Statistics.\n",
    )
    base = commit(
        path,
        "spread",
        stats_py=STATS,
        tests__test_stats_py=TESTS,
        conftest_py="import sys, os\nsys.path.insert(0, os.path.dirname(__file__))\n",
    )
    later = commit(path, "the mending, from the future", stats_py=MENDED, tests__test_stats_py=MORE)
    git(path, "tag", "-a", "v2", "-m", "future")
    git(path, "branch", "future")
    git(path, "gc", "-q")
    row = {
        "instance_id": "owner__stats-1",
        "repo": "owner/stats",
        "base_commit": base,
        "patch": git(path, "diff", base, later, "--", "stats.py"),
        "test_patch": git(path, "diff", base, later, "--", "tests"),
        "problem_statement": "spread([1, 5]) is 0.",
        "hints_text": "min",
        "version": "1",
        "FAIL_TO_PASS": '["tests/test_stats.py::test_spread"]',
        "PASS_TO_PASS": [
            "tests/test_stats.py::test_mean",
            "tests/test_stats.py::test_empty",
            "tests/test_stats.py::test_one",
        ],
        "environment_setup_commit": base,
    }
    return Made(path, base, later, row)
