"""What a run leaves for people and programs: evaluation results, report.json and the table of
before and after.

Curves: plots.py.

A success rate is always a share between 0 and 1 here; `n` says of how many tasks; the interval is
Wilson's at 95 %.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rome.train.metrics import write_atomically

Z_95 = 1.959963984540054
Task = Mapping[
    str, Any
]  # {"task": "family/seed", "family": name, "success": 0 | 1, "unseen_family": bool}


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a success rate; (0, 1) of nothing tried."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} tasks is impossible")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (
        1.0 if successes == n else centre + half
    )  # exact where rounding would miss by 1e-17


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """One evaluation: an entry of `evals` in report.json.

    Args:
      success: over unseen seeds of the trained families, `n` tasks, with its interval from `low` to
        `high`.
      by_family: trained family -> (success, n).
      unseen_families: success over all tasks of families that training never saw; None where none
        were tried.
      unseen_by_family: the same split, as by_family.
    """

    stage: str
    step: int
    success: float
    n: int
    low: float
    high: float
    by_family: dict[str, tuple[float, int]]
    unseen_families: float | None
    unseen_by_family: dict[str, tuple[float, int]]

    @classmethod
    def from_tasks(cls, stage: str, step: int, tasks: Iterable[Task]) -> EvalResult:
        """Counts outcomes; a task may stand there once."""
        tasks = list(tasks)
        names = [task["task"] for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(
                f"task {next(name for name in names if names.count(name) > 1)!r} is counted twice"
                f" in the evaluation of {stage} at step {step}"
            )
        seen = [task for task in tasks if not task["unseen_family"]]
        unseen = [task for task in tasks if task["unseen_family"]]
        low, high = wilson(sum(task["success"] for task in seen), len(seen))
        return cls(
            stage,
            step,
            _rate(seen) or 0.0,
            len(seen),
            low,
            high,
            _by_family(seen),
            _rate(unseen),
            _by_family(unseen),
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> EvalResult:
        fields = {field.name: entry[field.name] for field in dataclasses.fields(cls)}
        for name in ("by_family", "unseen_by_family"):
            fields[name] = {family: (rate, n) for family, (rate, n) in entry[name].items()}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return json.loads(
            json.dumps(dataclasses.asdict(self))
        )  # tuples become the lists that a reader will see

    def summary(self) -> str:
        """One line, for the display."""
        text = (
            f"{percent(self.success)} % ({percent(self.low)} to {percent(self.high)}) of {self.n}"
            " tasks"
        )
        return (
            text
            if self.unseen_families is None
            else f"{text}; {percent(self.unseen_families)} % in unseen families"
        )


@dataclasses.dataclass(frozen=True)
class TextEval:
    """One evaluation of a stage that learns from plain text: the bits that the model takes for a
    byte of `bytes` held-out bytes.
    """

    stage: str
    step: int
    bits_per_byte: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        return f"{self.bits_per_byte:.3f} bits a byte of {self.bytes:,} held-out bytes"


Evaluation = EvalResult | TextEval


def evaluation_of(stage: str, step: int, outcomes: Mapping[str, Any]) -> Evaluation:
    """What an evaluation's outcomes come to."""
    return (
        EvalResult.from_tasks(stage, step, outcomes["tasks"])
        if "tasks" in outcomes
        else TextEval(stage, step, **outcomes)
    )


def _rate(tasks: list[Task]) -> float | None:
    return sum(task["success"] for task in tasks) / len(tasks) if tasks else None


def _by_family(tasks: list[Task]) -> dict[str, tuple[float, int]]:
    families = sorted({task["family"] for task in tasks})
    members = {family: [task for task in tasks if task["family"] == family] for family in families}
    return {family: (_rate(members[family]), len(members[family])) for family in families}


def percent(rate: float) -> str:
    return f"{100 * rate:.0f}"


def write_report(workdir: pathlib.Path | str, report: Mapping[str, Any]) -> None:
    """WORKDIR/report.json, whole or not at all.

    Evaluations in `evals` are written as the entries they are.
    """
    entries = [
        entry.to_json() if isinstance(entry, Evaluation) else entry for entry in report["evals"]
    ]
    write_atomically(
        pathlib.Path(workdir) / "report.json",
        json.dumps({**report, "evals": entries}, indent=1, allow_nan=False) + "\n",
    )


def read_report(workdir: pathlib.Path | str) -> dict[str, Any]:
    """report.json with its evals as what they were."""
    path = pathlib.Path(workdir) / "report.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; a run writes it when it is evaluated: is {workdir} the run's"
            " --workdir?"
        )
    report = json.loads(path.read_text(encoding="utf-8"))
    return {
        **report,
        "evals": [
            EvalResult.from_json(entry) if "success" in entry else TextEval(**entry)
            for entry in report["evals"]
        ],
    }


def outcomes_path(workdir: pathlib.Path | str, stage: str, step: int) -> pathlib.Path:
    return pathlib.Path(workdir) / "evals" / f"{stage}_{step:06d}.json"


def write_outcomes(
    workdir: pathlib.Path | str, stage: str, step: int, outcomes: Mapping[str, Any]
) -> None:
    """What one evaluation found: {"tasks": every task's outcome}, from which runs are compared task
    by task, or the figures of a TextEval.
    """
    write_atomically(outcomes_path(workdir, stage, step), json.dumps(outcomes) + "\n")


def read_outcomes(workdir: pathlib.Path | str, stage: str, step: int) -> dict[str, Any]:
    path = outcomes_path(workdir, stage, step)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; every evaluation of a run writes one: was {workdir} copied"
            " without its evals folder?"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def before_and_after(evals: Iterable[Evaluation]) -> tuple[Evaluation, Evaluation]:
    """First and last evaluation of the stage that was trained last."""
    evals = list(evals)
    if not evals:
        raise ValueError("the report holds no evaluation yet; run the experiment to its first one")
    stage = [result for result in evals if result.stage == evals[-1].stage]
    return min(stage, key=lambda result: result.step), max(stage, key=lambda result: result.step)


def print_table(before: Evaluation, after: Evaluation, console: Console | None = None) -> None:
    """Success by family, before and after, in percent with 95 % intervals; families that training
    never saw stand apart.

    A line for text.
    """
    if isinstance(after, TextEval):
        (console or Console(highlight=False)).print(
            f"{after.stage}: {before.summary()} at step {before.step}, {after.bits_per_byte:.3f} at"
            f" step {after.step}"
        )
        return
    title = f"{after.stage}: success on held-out tasks, step {before.step} and step {after.step}"
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        caption="% of tasks solved (95 % interval)",
        caption_justify="left",
    )
    table.add_column("family", no_wrap=True)
    for name in ("tasks", "before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for heading, old, new in (
        ("trained families", before.by_family, after.by_family),
        ("unseen families", before.unseen_by_family, after.unseen_by_family),
    ):
        if not new:
            continue
        for family in sorted(new):
            table.add_row(f"{family}", *_cells(old.get(family), new[family]))
        table.add_section()
        table.add_row(
            f"all {heading}", *_cells(_pooled(old), _pooled(new)), style="bold", end_section=True
        )
    (console or Console(highlight=False)).print(table)


def _cells(old: tuple[float, int] | None, new: tuple[float, int]) -> list[str | Text]:
    def cell(rate: float, n: int) -> str:
        low, high = wilson(round(rate * n), n)
        return f"{percent(rate):>3} ({percent(low):>2} to {percent(high):>3})"

    if old is None:  # a family that the first evaluation did not have
        return [str(new[1]), "", cell(*new), ""]
    points = 100 * (new[0] - old[0])
    colour = "green" if points > 0 else "red" if points < 0 else "dim"
    return [str(new[1]), cell(*old), cell(*new), Text(f"{points:+.0f}", style=colour)]


def _pooled(families: Mapping[str, tuple[float, int]]) -> tuple[float, int] | None:
    n = sum(count for _, count in families.values())
    return (sum(rate * count for rate, count in families.values()) / n, n) if n else None
