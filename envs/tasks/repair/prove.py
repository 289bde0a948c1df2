"""The proof of repair tasks: runs a package's tests on many mutants in a sandbox.

A mutant is a task only if some test detects it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from envs.rock import Sandbox, SandboxConfig, SandboxError
from envs.tasks.harbor.errors import TaskError
from envs.tasks.judge import folder as judge_folder
from envs.tasks.judge import pytest_archive
from envs.tasks.repair.mutate import Edit
from envs.tasks.repair.package import Package

# For the tests of the unchanged package; driver.py limits mutants by the time that these took.
CPU_SECONDS = 30
WALL_SECONDS = 60.0
MAX_RESULT_BYTES = 64 << 20
SANDBOX = SandboxConfig(
    isolation="best_available",
    memory_mb=1024,
    disk_mb=128,
    pids=128,
    inodes=16_384,
    label="proof of repair tasks",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The outcomes of one run of the tests, by test id.

    `complete` is False if the tests did not finish.
    """

    outcomes: dict[str, str]
    complete: bool

    @property
    def passed(self) -> frozenset[str]:
        """Return the tests that passed."""
        return frozenset(name for name, outcome in self.outcomes.items() if outcome == "passed")


async def run_tests(package: Package, mutants: Sequence[tuple[str, Edit]]) -> list[Run]:
    """Run the tests of the package as it is, and then of each mutant (path of the file, edit).

    Raises:
      SandboxError: a fault of the machine.
    """
    jobs = []
    for path, edit in mutants:
        content, _ = package.files[path]
        jobs.append({"path": path, "text": edit.apply(content.decode())})
    order = {
        "framework": package.framework,
        "targets": package.targets,
        "jobs": jobs,
        "cpu": CPU_SECONDS,
        "wall": WALL_SECONDS,
    }
    here = pathlib.Path(__file__).parent
    files = {
        **{f"package/{path}": content for path, content in package.files.items()},
        "order.json": json.dumps(order).encode(),
        "driver.py": (here / "driver.py").read_bytes(),
        "runner.py": (judge_folder.HERE / "runner.py").read_bytes(),
    }
    if package.framework == "pytest":
        files["pytest.tar.gz"] = pytest_archive()
    async with Sandbox(SANDBOX) as sandbox:
        await sandbox.write_files(files)
        result = await sandbox.execute(
            "exec python3 -B driver.py",
            timeout=60.0 + (len(jobs) + 1) * WALL_SECONDS,
            env={"PYTHONHASHSEED": "0"},
        )
        if result.exit_code != 0:
            raise SandboxError(
                f"the tests of {package.path} could not be run: exit {result.exit_code},"
                f" {(result.stdout + result.stderr)[-500:]}"
            )
        content = await sandbox.read_file("results.jsonl", limit=MAX_RESULT_BYTES)
    rows = [json.loads(line) for line in content.splitlines()]
    if len(rows) != len(jobs) + 1:
        raise SandboxError(
            f"the tests of {package.path} gave {len(rows)} results for {len(jobs) + 1} runs"
        )
    return [Run(dict(map(tuple, row["outcomes"])), row["complete"]) for row in rows]


def check_baseline(package: Package, run: Run) -> None:
    """Check that the tests of the unchanged package finish and that some pass. Raises TaskError."""
    if run.complete and run.passed:
        return
    message = f"its own tests do not run here with {package.framework}: {len(run.passed)} pass"
    failed = sorted(set(run.outcomes) - run.passed)
    if failed:
        message += f", and {failed[0]} {run.outcomes[failed[0]]}"
    if not run.complete:
        message += f"; they did not end within {CPU_SECONDS} s of processor time"
    raise TaskError(package.path, 0, message)


def is_sound(before: Run, after: Run) -> bool:
    """Return whether a mutant is a task.

    Its tests must finish, some that passed must fail now, and some must still pass.
    """
    lost = before.passed - after.passed
    kept = before.passed & after.passed
    return after.complete and bool(lost) and bool(kept)
