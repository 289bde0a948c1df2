"""The tests folder of a task that is graded by Python tests.

It holds the judge, its runner, the ids of the tests that must pass, and the tests themselves.
"""

from __future__ import annotations

import functools
import gzip
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import tarfile
from collections.abc import Iterable, Mapping, Sequence

from envs.tasks.harbor.task import Files
from envs.tasks.judge.inside import RUNNER_FILES

FRAMEWORKS = ("unittest", "pytest")
SETTINGS = (*RUNNER_FILES, "setup.cfg", "pyproject.toml")  # names of files that configure tests
HERE = pathlib.Path(__file__).parent
PYTEST_PARTS = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
_PYGMENTS_PARTS = ("__init__", "_mapping", "python", "diff", "default")
_TEST_SH = """\
#!/bin/bash
# The judge writes the reward when no process of the tests lives any more. If the judge itself died,
# every process here is killed, and with them this grading.
/usr/bin/env python3 -I /tests/judge.py || kill -9 -1
"""


def judge_files(
    framework: str,
    tests: Sequence[str],
    files: Files,
    *,
    targets: Sequence[str],
    control_folder: str,
    keep: Iterable[str] = (),
    remove: Iterable[str] = (),
    timeout: float = 120.0,
    python: Sequence[str] = ("python3",),
    bring_pytest: bool = True,
) -> dict[str, tuple[bytes, int]]:
    """Return the tests folder: test.sh and the files that it needs.

    test.sh runs in the folder of the package, which must be the task's working directory.

    Args:
      framework: one of FRAMEWORKS.
      tests: the ids of the tests that must run and pass: node ids of pytest, dotted names of
        unittest.
      files: files that replace the agent's before the tests run: the tests themselves and what
        configures them.
      targets: the arguments of the framework: folders to discover (unittest), files or node ids
        (pytest).
      control_folder: a folder of the tests, which gets the two control tests during grading.
      keep: files that configure tests (conftest.py and the like) and belong to the package; other
        such files are removed. Those of `files` are kept anyway.
      remove: paths that must not exist for the tests.
      timeout: seconds for all tests.
      python: the command that runs the tests; the judge itself runs with the first python3 of the
        image.
      bring_pytest: include the pytest of this process's environment, for an interpreter without
        one.

    Raises:
      ValueError: the framework is unknown.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework {framework!r} is not one of {', '.join(FRAMEWORKS)}")
    spec = {
        "framework": framework,
        "tests": list(tests),
        "targets": list(targets),
        "control_folder": control_folder,
        "keep": sorted({*keep, *files}),
        "remove": sorted(remove),
        "timeout": timeout,
        "python": list(python),
    }
    # Compressed, so that their paths are not rewritten on the way into a sandbox.
    found = {
        "test.sh": (_TEST_SH.encode(), 0o755),
        "judge.py": ((HERE / "inside.py").read_bytes(), 0o644),
        "runner.py": ((HERE / "runner.py").read_bytes(), 0o644),
        "spec.json.gz": (gzip.compress(json.dumps(spec).encode(), mtime=0), 0o644),
        "files.tar.gz": (pack(files), 0o644),
    }
    if framework == "pytest" and bring_pytest:
        found["pytest.tar.gz"] = (pytest_archive(), 0o644)
    return found


def settings_above(tests: Iterable[str]) -> set[str]:
    """Return the places where pytest may find its settings for tests in these files."""
    folders = {str(folder) for path in tests for folder in pathlib.PurePosixPath(path).parents}
    return {
        name if folder == "." else f"{folder}/{name}" for folder in folders for name in SETTINGS
    }


def pack(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """Return a compressed tar of the files; equal files give equal bytes."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, (content, mode) in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = mode
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@functools.cache
def pytest_archive() -> bytes:
    """Return an archive of pytest and its dependencies from this process's environment.

    All of them are pure Python.
    """
    files = {}
    for name in PYTEST_PARTS:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ValueError(
                f"{name} cannot be imported here, and tests that need pytest bring it along; pip"
                " install pytest"
            )
        for path, inner in _modules(found):
            if _is_needed(inner):
                files[inner] = (path.read_bytes(), 0o644)
    return pack(files)


def _modules(found: importlib.machinery.ModuleSpec) -> list[tuple[pathlib.Path, str]]:
    """Return the source files of a module or a package, with their paths in the archive."""
    origin = pathlib.Path(found.origin)
    if not found.submodule_search_locations:
        return [(origin, origin.name)]
    package = origin.parent
    paths = sorted(package.rglob("*.py"))
    return [(path, path.relative_to(package.parent).as_posix()) for path in paths]


def _is_needed(path: str) -> bool:
    """Leave out most of Pygments' lexers and styles, which are large."""
    if not path.startswith(("pygments/lexers/", "pygments/styles/")):
        return True
    return pathlib.PurePosixPath(path).stem in _PYGMENTS_PARTS
