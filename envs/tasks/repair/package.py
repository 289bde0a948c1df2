"""A Python package with its tests, as a folder.

It is split into sources and tests, and the framework that runs the tests is determined.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import read_folder
from envs.tasks.judge.inside import RUNNER_FILES
from envs.tasks.repair.mutate import MAX_SOURCE_BYTES

SHIPPED = pathlib.Path(__file__).parent / "packages"
_LEFT_OUT = """
.git .hg .tox .venv venv build dist node_modules .mypy_cache .pytest_cache .hypothesis
"""
LEFT_OUT = tuple(_LEFT_OUT.split())
NOT_SOURCE = ("docs", "doc", "examples", "benchmarks", "scripts", "tools")
_TEST_FOLDER = re.compile(r"tests?")
_TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|tests?\.py")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package.

    `files` are all files of the folder by path. `sources` may be mutated. `tests` are restored
    before they judge. `targets` are the arguments of the framework.
    """

    name: str
    path: pathlib.Path
    files: dict[str, tuple[bytes, int]] = dataclasses.field(repr=False)
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    framework: str
    targets: tuple[str, ...]
    about: str

    @property
    def control_folder(self) -> str:
        """Return the folder of the tests that gets the judge's control tests."""
        if self.framework == "unittest":
            return self.targets[0]
        return self.tests[0].rpartition("/")[0] or "."

    @property
    def command(self) -> str:
        """Return the command by which a person runs the tests."""
        if self.framework == "unittest":
            return f"python3 -m unittest discover -s {self.targets[0]} -t ."
        return "python3 -m pytest"


def shipped() -> tuple[str, ...]:
    """Return the names of the packages in this repository."""
    return tuple(sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()))


def load_package(name: str) -> Package:
    """Load a package of this repository by name, or any folder by its path.

    Raises:
      TaskError: it has no sources or no tests, or a source is not valid Python.
    """
    folder = SHIPPED / name if name in shipped() else pathlib.Path(name)
    if not folder.is_dir():
        raise TaskError(
            folder, 0, f"neither a folder nor a package that ships here ({', '.join(shipped())})"
        )
    files = {}
    for path, content in read_folder(folder, leave_out=LEFT_OUT).items():
        if "__pycache__" not in path.split("/") and not path.endswith((".pyc", ".so")):
            files[path] = content
    python = [path for path in files if path.endswith(".py")]
    tests = tuple(path for path in python if _is_test(path))
    sources = tuple(path for path in python if path not in tests and _is_source(path, files[path]))
    if not sources or not any(_TEST_FILE.fullmatch(path.split("/")[-1]) for path in tests):
        raise TaskError(
            folder,
            0,
            f"{len(sources)} Python sources and {len(tests)} files of tests; a package to be"
            " repaired needs both (tests are test_*.py, or lie in tests/)",
        )
    for path in sources:
        try:
            ast.parse(files[path][0])
        except (SyntaxError, ValueError, RecursionError) as error:
            raise TaskError(
                folder / path,
                getattr(error, "lineno", 0) or 0,
                f"not valid Python: {error}",
            ) from error
    framework, targets = _framework(files, tests)
    return Package(
        name=folder.resolve().name,
        path=folder,
        files=files,
        sources=sources,
        tests=tests,
        framework=framework,
        targets=targets,
        about=_about(files, sources),
    )


def _is_test(path: str) -> bool:
    *folders, name = path.split("/")
    in_test_folder = any(_TEST_FOLDER.fullmatch(folder) for folder in folders)
    return in_test_folder or _TEST_FILE.fullmatch(name) is not None


def _is_source(path: str, file: tuple[bytes, int]) -> bool:
    parts = path.split("/")
    return (
        parts[0] not in NOT_SOURCE
        and parts[-1] not in (*RUNNER_FILES, "setup.py", "noxfile.py")
        and len(file[0]) <= MAX_SOURCE_BYTES
    )


def _framework(
    files: dict[str, tuple[bytes, int]], tests: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """Return (framework, targets).

    unittest is used if all tests lie in one folder, are its own, and can be discovered; else
    pytest, which runs those too.
    """
    cases = [path for path in tests if _TEST_FILE.fullmatch(path.split("/")[-1])]
    folders = {path.rpartition("/")[0] for path in cases}
    has_conftest = any(path.endswith("conftest.py") for path in files)
    if len(folders) == 1 and not has_conftest and all(_is_unittest(path, files) for path in cases):
        (folder,) = folders
        if _is_package(folder, files):
            return "unittest", (folder or ".",)
    return "pytest", tuple(cases)


def _is_unittest(path: str, files: dict[str, tuple[bytes, int]]) -> bool:
    content, _ = files[path]
    has_name = path.split("/")[-1].startswith("test")
    return has_name and b"unittest" in content and b"pytest" not in content


def _is_package(folder: str, files: dict[str, tuple[bytes, int]]) -> bool:
    """Return whether a folder and those above it can be imported, as discovery needs it."""
    parts = folder.split("/") if folder else []
    for depth in range(1, len(parts) + 1):
        if "/".join([*parts[:depth], "__init__.py"]) not in files:
            return False
    return True


def _about(files: dict[str, tuple[bytes, int]], sources: tuple[str, ...]) -> str:
    """Return the first line of the package's docstring."""

    def closeness(path: str) -> tuple[bool, int, str]:
        return not path.endswith("__init__.py"), path.count("/"), path

    for path in sorted(sources, key=closeness):
        text = ast.get_docstring(ast.parse(files[path][0]))
        if text:
            return text.strip().splitlines()[0]
    return ""
