"""Task folders made for one test."""

import asyncio
import pathlib

import pytest

from envs.rock import SandboxConfig
from tests.envs.rock.engine import engine

__all__ = ["CHECK", "CONFIG", "PASSES", "TB1", "engine", "harbor", "run", "tb1", "write"]

CONFIG = SandboxConfig(isolation="best_available")
PASSES = (
    "#!/bin/bash\nif [ -f /app/out.txt ]; then echo 1 > /logs/verifier/reward.txt; else echo 0 >"
    " /logs/verifier/reward.txt; fi\n"
)
# What pytest runs in a task, of either form.
CHECK = """\
import pathlib, subprocess, sys

def test_the_file_is_there():
    assert pathlib.Path("/app/out.txt").read_text() == "x\\n"

def test_python_is_python3():
    assert subprocess.run(["python", "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
"""

# A task of Terminal-Bench 1.
TB1 = {
    "task.yaml": (
        "instruction: |-\n  Make /app/out.txt.\nauthor_name: x\ndifficulty: easy\ncategory:"
        " files\ntags:\n  - a\nparser_name: pytest\nmax_agent_timeout_sec:"
        " 120\nmax_test_timeout_sec: 30\nrun_tests_in_same_shell: false\n"
    ),
    "Dockerfile": (
        "FROM ghcr.io/laude-institute/t-bench/ubuntu-24-04:latest\nWORKDIR /app\nCOPY . .\n"
    ),
    "docker-compose.yaml": "services:\n  client:\n    build: .\n",
    "run-tests.sh": "true\n",
    "solution.sh": "echo x > out.txt\n",
    "tests/test_outputs.py": "def test_it(): pass\n",
    "data.txt": "d\n",
}


def write(folder: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tb1(folder, run_tests, **files):
    """A task of Terminal-Bench 1 on an image with Python, which CHECK verifies."""
    plain = {
        **TB1,
        "Dockerfile": "FROM ghcr.io/laude-institute/t-bench/python-3-13:20250620\n",
        "run-tests.sh": run_tests,
        "tests/test_outputs.py": CHECK,
    }
    return write(folder, {**plain, **files})


@pytest.fixture
def harbor(tmp_path):
    """Writes a task that is passed by making /app/out.txt; keyword arguments replace or add files
    (None: leave out).
    """

    def make(
        files: dict[str, str | bytes | None] | None = None, name: str = "task"
    ) -> pathlib.Path:
        plain = {
            "task.toml": 'version = "1.0"\n',
            "instruction.md": "Make /app/out.txt.\n",
            "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /app\n",
            "tests/test.sh": PASSES,
            "solution/solve.sh": "echo x > /app/out.txt\n",
        }
        return write(
            tmp_path / name,
            {key: value for key, value in {**plain, **(files or {})}.items() if value is not None},
        )

    return make


@pytest.fixture
def run():
    return asyncio.run
