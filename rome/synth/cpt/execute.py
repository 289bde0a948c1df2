"""Runs the tests of repositories in sandboxes: the only place where their code runs."""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import json
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from envs.rock import CommandResult, Sandbox, SandboxConfig, SandboxError
from rome.synth.cpt.document import Fault

MAX_TREE_BYTES = 16 << 20
MAX_TREE_FILES = 3000
MAX_RESULT_BYTES = 8 << 20
RUN_SECONDS = 900.0  # for all trees of one call
_NEEDS_PYTEST = re.compile(r"^\s*(?:import|from) pytest\b", re.MULTILINE)
_INSIDE = pathlib.Path(__file__).parent / "inside.py"


@dataclasses.dataclass(frozen=True)
class Tree:
    """A variant of a tree, and the test modules that are run on it.

    Attributes:
      changes: path -> text; None for a file that is not there.
      modules: paths of test modules.
      trace: whether to note the functions that each test runs.
      tests: names of the tests of these modules that are run; () for all.
    """

    changes: Mapping[str, str | None]
    modules: Sequence[str]
    trace: bool = False
    tests: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Traced:
    """What one tree's tests did.

    Attributes:
      outcomes: test -> passed, failed, error or skipped.
      functions: test -> (path, first line) of the functions that it ran; "" has those that ran
        while the modules were imported.
      edges: (caller, callee), each (path, first line).
    """

    outcomes: dict[str, str]
    functions: dict[str, set[tuple[str, int]]]
    edges: set[tuple[tuple[str, int], tuple[str, int]]]


class Runs:
    """Runs tests, at most so many sandboxes at once, and counts the seconds that they take.

    Args:
      isolation: of the sandboxes.
      concurrency: sandboxes at once.
      packages: a folder of Python packages, which tests can import and never change; "" for none.
        They must be made for the sandbox's python3.
      chosen: patterns of the test files that are run, such as tests/data/*; () for all.

    Attributes:
      seconds: that sandboxes have worked.
      count: of sandboxes that were started.
    """

    def __init__(
        self,
        isolation: str,
        concurrency: int = 2,
        packages: str = "",
        chosen: Sequence[str] = (),
    ) -> None:
        self._config = SandboxConfig(
            isolation=isolation,
            verifier_tools=packages,
            memory_mb=2048 if packages else 1024,
            disk_mb=256,
            pids=128,
            inodes=32_768,
            max_output_bytes=1 << 16,
            label="tests of a corpus",
        )
        self._chosen = tuple(chosen)
        self._places = asyncio.Semaphore(concurrency)
        self._asking = asyncio.Lock()
        self._has_pytest: bool | None = None
        self.seconds = 0.0
        self.count = 0

    def takes(self, path: str) -> bool:
        """Return whether the tests of a file are run."""
        return not self._chosen or any(fnmatch.fnmatch(path, one) for one in self._chosen)

    async def lacking(self, tests: Iterable[str]) -> str:
        """Return the package that tests need and the sandbox's Python does not have, or "".

        Only pytest is looked for: without it most tests cannot even be imported, and trying them
        would cost a sandbox each.
        """
        if not any(_NEEDS_PYTEST.search(text) for text in tests):
            return ""
        async with self._asking:
            if self._has_pytest is None:
                async with Sandbox(self._config) as sandbox:
                    asked = await self._execute(sandbox, "python3 -c 'import pytest'", RUN_SECONDS)
                self._has_pytest = asked.exit_code == 0
        return "" if self._has_pytest else "pytest"

    async def run(
        self, base: Mapping[str, str], trees: Sequence[Tree]
    ) -> list[dict[str, str]] | str:
        """Return the outcomes of each tree's tests, or why they could not be run."""
        traced = await self.trace(base, trees)
        return traced if isinstance(traced, str) else [one.outcomes for one in traced]

    async def trace(self, base: Mapping[str, str], trees: Sequence[Tree]) -> list[Traced] | str:
        """Return what each tree's tests did, or why they could not be run.

        Args:
          base: path -> text of all files that the trees share.
          trees: what differs, and what is run.
        """
        size = sum(map(len, base.values()))
        if len(base) > MAX_TREE_FILES or size > MAX_TREE_BYTES:
            return f"its tree has more than {MAX_TREE_FILES} files or {MAX_TREE_BYTES} bytes"
        order = [
            {
                "files": dict(tree.changes),
                "modules": list(tree.modules),
                "trace": tree.trace,
                "tests": list(tree.tests),
            }
            for tree in trees
        ]
        files: dict[str, bytes] = {f"tree/{path}": text.encode() for path, text in base.items()}
        files["inside.py"] = _INSIDE.read_bytes()
        files["order.json"] = json.dumps({"trees": order}).encode()
        async with self._places:
            began = time.monotonic()
            self.count += 1
            try:
                output = await self._run_inside(files)
            except SandboxError as error:
                return Fault(f"the sandbox failed: {str(error)[:200]}")
            finally:
                self.seconds += time.monotonic() - began
        return _read_results(output, len(trees))

    async def _run_inside(self, files: Mapping[str, Any]) -> bytes:
        async with Sandbox(self._config) as sandbox:
            await sandbox.write_files(files)
            command = "python3 inside.py order.json > results.jsonl 2> errors.txt"
            await self._execute(sandbox, command, RUN_SECONDS)
            return await sandbox.read_file("results.jsonl", limit=MAX_RESULT_BYTES)

    async def _execute(self, sandbox: Sandbox, command: str, seconds: float) -> CommandResult:
        """Run a command that finds the packages; only a sandbox's verifier sees such a folder."""
        if not self._config.verifier_tools:
            return await sandbox.execute(command, timeout=seconds)
        found = 'export PYTHONPATH="$VERIFIER_TOOLS" PYTHONNOUSERSITE=1\n'
        return await sandbox.verify(found + command, timeout=seconds, keep=True)


def _read_results(output: bytes, count: int) -> list[Traced] | str:
    """Return what the program inside printed, checked: the tests could have written it."""
    lines = output.splitlines()
    if len(lines) != count:
        return f"its tests did not end: {len(lines)} of {count} runs have results"
    try:
        return [_traced_of(json.loads(line)) for line in lines]
    except (ValueError, LookupError, TypeError, AttributeError):
        return "the results of its tests are malformed"


def _traced_of(value: Any) -> Traced:
    functions = {
        str(test): {(str(path), int(line)) for path, line in places}
        for test, places in value["functions"].items()
    }
    edges = {((str(a), int(b)), (str(c), int(d))) for (a, b), (c, d) in value["edges"]}
    outcomes = {str(test): str(outcome) for test, outcome in value["outcomes"].items()}
    return Traced(outcomes, functions, edges)
