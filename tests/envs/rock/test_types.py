"""The README's first snippet, for a type checker."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

README = pathlib.Path(__file__).parents[3] / "README.md"
SYNCHRONOUS = """
from envs.rock import SandboxConfig, SyncSandbox

with SyncSandbox(SandboxConfig(memory_mb=512)) as synchronous:
    print(synchronous.execute("echo hi", timeout=30).stdout)
"""


def first_sandbox_snippet() -> str:
    """Return the README's first program with a sandbox, in a function as its `await` asks."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    snippet = next(block for block in blocks if "async with Sandbox(" in block)
    return "async def main() -> None:\n" + textwrap.indent(snippet, "    ")


def run_mypy(path: pathlib.Path, text: str) -> str:
    pytest.importorskip("mypy", reason="mypy is not installed")
    path.write_text(text)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports", "silent", str(path)],
        cwd=README.parent,
        capture_output=True,
        text=True,
    )
    return checked.stdout + checked.stderr


def test_a_type_checker_accepts_the_first_snippet(tmp_path):
    said = run_mypy(tmp_path / "snippet.py", first_sandbox_snippet() + SYNCHRONOUS)
    assert "Success" in said, said


def test_a_type_checker_knows_what_a_command_returns(tmp_path):
    mistake = "    print(result.no_such_field)\n"
    said = run_mypy(tmp_path / "snippet.py", first_sandbox_snippet() + mistake)
    assert '"CommandResult" has no attribute "no_such_field"' in said, said
