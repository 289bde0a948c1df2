"""Runs many programs against one task's hidden cases, in one sandbox: its mutation score.

A verifier is worth as much as it rejects. Mutants of the reference solution, each with one small
bug, must fail; so must programs that do nothing, and a program that prints the answer of one case
whatever it is given.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import shlex
from collections.abc import Sequence

from envs.rock import Sandbox, SandboxConfig, SandboxError
from envs.tasks.made.draft import Draft
from envs.tasks.made.mutate_text import choose_edits
from envs.tasks.repair.mutate import Edit

PROOF_SECONDS = 600.0
_SANDBOX = {
    "memory_mb": 512,
    "disk_mb": 128,
    "pids": 128,
    "inodes": 16_384,
    "label": "proof of a made task",
}
_DRIVER = """\
import ctypes, json, pathlib, sys
sys.path.insert(0, ".")
import verify
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans of a program become children of this process
order = json.loads(pathlib.Path("order.json").read_text())
with open("results.jsonl", "w") as results:
    for number, program in enumerate(order["programs"]):
        app = pathlib.Path(f"app{number}").resolve()
        file = app / order["program"]
        file.parent.mkdir(parents=True)
        file.write_text(program)
        faults = verify.judge(order, app, first_only=True)
        results.write(json.dumps(faults) + "\\n")
"""


@dataclasses.dataclass(frozen=True)
class Mutants:
    """The outcome of a task's mutants.

    Attributes:
      tried: number of mutants that ran.
      rejected: number that the verifier rejected.
      survivors: what each survivor changed, as text.
      fakes: kinds of fake programs that the verifier accepted; a sound one accepts none.
    """

    tried: int
    rejected: int
    survivors: tuple[str, ...] = ()
    fakes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Return the share of mutants that were rejected; 0 where there are none."""
        return self.rejected / self.tried if self.tried else 0.0


def choose_mutants(draft: Draft, count: int, seed: int) -> list[Edit]:
    """Return up to `count` mutants of the oracle, spread over the kinds of bugs.

    Args:
      draft: the task.
      count: of mutants.
      seed: of the choice.
    """
    rng = random.Random(f"mutants/{draft.digest}/{seed}")
    return choose_edits(draft.oracle, draft.language, count, rng, draft.lines)


def fakes_of(draft: Draft) -> dict[str, str]:
    """Return programs that look like work and are none, by kind."""
    fakes = {"empty": ""}
    answer = next((case.stdout for case in draft.cases if case.stdout), None)
    if answer is not None and draft.language in ("python", "javascript", "shell"):
        quoted = json.dumps(answer)
        fakes["constant"] = {
            "python": f"print({quoted})\n",
            "javascript": f"console.log({quoted})\n",
            "shell": f"printf '%s\\n' {shlex.quote(answer)}\n",
        }[draft.language]
    return fakes


async def judge_programs(
    draft: Draft, programs: Sequence[str], isolation: str = "best_available"
) -> list[list[str]]:
    """Return the faults of each program on the draft's cases, the first one only; [] if it passes.

    Raises:
      SandboxError: a fault of the machine, or a program ended the judging.
      ValueError: a program wrote to the results.
    """
    verify = pathlib.Path(__file__).with_name("verify.py").read_bytes()
    order = {**draft.order, "programs": list(programs)}
    async with Sandbox(SandboxConfig(isolation=isolation, **_SANDBOX)) as sandbox:
        await sandbox.write_files(
            {
                "verify.py": verify,
                "driver.py": _DRIVER.encode(),
                "order.json": json.dumps(order).encode(),
            }
        )
        result = await sandbox.execute("exec python3 -B driver.py", timeout=PROOF_SECONDS)
        if result.exit_code != 0:
            raise SandboxError(
                f"the programs of {draft.name} could not be judged: exit {result.exit_code},"
                f" {(result.stdout + result.stderr)[-500:]}"
            )
        content = await sandbox.read_file("results.jsonl")
    return _read_results(content, len(programs))


def _read_results(content: bytes, count: int) -> list[list[str]]:
    """Return the faults of each program. Programs run where these were written: check the form."""
    results = [json.loads(line) for line in content.splitlines()]
    is_sound = len(results) == count and all(
        isinstance(faults, list) and all(isinstance(one, str) for one in faults)
        for faults in results
    )
    if not is_sound:
        raise ValueError(f"a program changed the results: {content[:100]!r}")
    return results


async def outputs_of(draft: Draft, isolation: str = "best_available") -> list[str]:
    """Return what the oracle prints for each case; "" where it fails or is too slow.

    Raises:
      SandboxError: a fault of the machine.
    """
    verify = pathlib.Path(__file__).with_name("verify.py").read_bytes()
    driver = (
        "import json, pathlib, tempfile, verify\n"
        'order = json.loads(pathlib.Path("order.json").read_text())\n'
        'pathlib.Path("app").mkdir()\n'
        'pathlib.Path("app", order["program"]).write_text(order["oracle"])\n'
        'app = str(pathlib.Path("app").resolve())\n'
        "found = []\n"
        'for case in order["cases"]:\n'
        '    argv = [part.replace("{app}", app) for part in case["argv"]]\n'
        "    with tempfile.TemporaryDirectory() as work:\n"
        '        code, output = verify.run(argv, pathlib.Path(work), case["stdin"], 10.0)\n'
        '    found.append(output if code == 0 else "")\n'
        'pathlib.Path("outputs.json").write_text(json.dumps(found))\n'
    )
    order = {**draft.order, "oracle": draft.oracle}
    async with Sandbox(SandboxConfig(isolation=isolation, **_SANDBOX)) as sandbox:
        files = {"verify.py": verify, "driver.py": driver.encode()}
        await sandbox.write_files({**files, "order.json": json.dumps(order).encode()})
        result = await sandbox.execute("exec python3 -B driver.py", timeout=PROOF_SECONDS)
        if result.exit_code != 0:
            raise SandboxError(f"{draft.name} could not be run: {result.stderr[-300:]}")
        return json.loads(await sandbox.read_file("outputs.json"))


async def score_mutants(
    draft: Draft, count: int, seed: int, isolation: str = "best_available"
) -> Mutants:
    """Return how many mutants and fakes of the oracle the verifier rejects.

    Args:
      draft: the task; its oracle must pass, or every mutant would be rejected for nothing.
      count: of mutants.
      seed: of their choice.
      isolation: of the sandbox.

    Raises:
      ValueError: the oracle itself does not pass.
      SandboxError: a fault of the machine.
    """
    edits = choose_mutants(draft, count, seed)
    fakes = fakes_of(draft)
    mutants = [edit.apply(draft.oracle) for edit in edits]
    own, *outcomes = await judge_programs(
        draft, [draft.oracle, *mutants, *fakes.values()], isolation
    )
    if own:
        raise ValueError(f"the reference solution fails: {own[0]}")
    of_mutants, of_fakes = outcomes[: len(edits)], outcomes[len(edits) :]
    survivors = []
    for edit, faults in zip(edits, of_mutants, strict=True):
        if not faults:
            old = draft.oracle[edit.start : edit.end]
            line = draft.oracle.count("\n", 0, edit.start) + 1
            survivors.append(
                f"line {line}: {edit.operator}: {old[:40]!r} to {edit.replacement[:40]!r}"
            )
    accepted = [kind for kind, faults in zip(fakes, of_fakes, strict=True) if not faults]
    rejected = len(edits) - len(survivors)
    return Mutants(len(edits), rejected, tuple(survivors), tuple(accepted))
