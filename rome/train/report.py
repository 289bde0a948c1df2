"""What a run leaves for people and programs: evaluations, report.json and a table of both ends.

Curves are drawn by plots.py. A success rate is a share between 0 and 1 here, `n` is its number of
tasks, and its interval is Wilson's at 95 %.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rome.files import read_json, write_atomically
from rome.train.intervals import wilson

# {"task": name, "family": name, "difficulty": text, "source": spec, "success": 0 | 1,
#  "unseen_family": bool}
Task = Mapping[str, Any]
Rate = tuple[float, int]  # share of successes, number of tasks


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """One evaluation of a policy: an entry of `evals` in report.json.

    Attributes:
      stage: name of the experiment.
      step: at which it was evaluated.
      success: share of solved tasks, over unseen seeds of the trained families; over the others
        where there are no such tasks, as in the safety suite.
      n: number of these tasks.
      low: lower end of the interval of `success`.
      high: upper end of it.
      by_family: trained family -> (success, n).
      unseen_families: success over all tasks of families that training never saw; None where none
        were tried.
      unseen_by_family: the same split, as by_family.
      by_difficulty: difficulty -> (success, n), over the trained families.
      by_source: spec of the source -> (success, n), likewise.
      bits_per_token: that the model needs for a learned token of held-out trajectories; None where
        the stage does not learn from given ones.
      safety: measure of the safety suite -> {value, low, high, n, families}; {} without its tasks.
    """

    stage: str
    step: int
    success: float
    n: int
    low: float
    high: float
    by_family: dict[str, Rate]
    unseen_families: float | None
    unseen_by_family: dict[str, Rate]
    by_difficulty: dict[str, Rate] = dataclasses.field(default_factory=dict)
    by_source: dict[str, Rate] = dataclasses.field(default_factory=dict)
    bits_per_token: float | None = None
    safety: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_tasks(
        cls,
        stage: str,
        step: int,
        tasks: Iterable[Task],
        bits_per_token: float | None = None,
        safety: Mapping[str, Any] | None = None,
    ) -> EvalResult:
        """Count the outcomes of tasks.

        Args:
          stage: name of the experiment.
          step: that was evaluated.
          tasks: their outcomes.
          bits_per_token: of held-out trajectories, where there are any.
          safety: measures of the safety suite, where its tasks are among them.

        Raises:
          ValueError: where a task is listed twice.
        """
        tasks = list(tasks)
        repeated = [
            name for name, n in collections.Counter(t["task"] for t in tasks).items() if n > 1
        ]
        if repeated:
            raise ValueError(
                f"task {repeated[0]!r} is counted twice in the evaluation of {stage} at step {step}"
            )
        seen = [task for task in tasks if not task["unseen_family"]]
        unseen = [task for task in tasks if task["unseen_family"]]
        counted = seen or unseen
        low, high = wilson(sum(task["success"] for task in counted), len(counted))
        return cls(
            stage=stage,
            step=step,
            success=_rate(counted) if counted else 0.0,
            n=len(counted),
            low=low,
            high=high,
            by_family=_rates_by(seen, "family"),
            unseen_families=_rate(unseen) if unseen else None,
            unseen_by_family=_rates_by(unseen, "family"),
            by_difficulty=_rates_by(seen, "difficulty"),
            by_source=_rates_by(seen, "source"),
            bits_per_token=bits_per_token,
            safety=dict(safety or {}),
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> EvalResult:
        """Return the evaluation of an entry in report.json."""
        fields = {name: entry[name] for name in _names(cls) if name in entry}
        for name in ("by_family", "unseen_by_family", "by_difficulty", "by_source"):
            fields[name] = {group: (rate, n) for group, (rate, n) in entry.get(name, {}).items()}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json, with lists for tuples as a reader will see them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def summary(self) -> str:
        """Describe the result in one line, for the display."""
        interval = f"{percent(self.low)} to {percent(self.high)}"
        text = f"{percent(self.success)} % ({interval}) of {self.n} tasks"
        if self.unseen_families is not None:
            text += f"; {percent(self.unseen_families)} % in unseen families"
        if self.bits_per_token is not None:
            text += f"; {self.bits_per_token:.3f} bits a token of held-out trajectories"
        for name in ("attack_success", "hack_rate"):
            if name in self.safety:
                text += f"; {name.replace('_', ' ')} {percent(self.safety[name]['value'])} %"
        return text


@dataclasses.dataclass(frozen=True)
class TextEval:
    """One evaluation of a stage that learns from plain text: an entry of `evals` in report.json.

    Attributes:
      stage: name of the experiment.
      step: at which it was evaluated.
      bits_per_byte: bits that the model needs for a byte of held-out text.
      bytes: size of the held-out text.
    """

    stage: str
    step: int
    bits_per_byte: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Describe the result in one line, for the display."""
        return f"{self.bits_per_byte:.3f} bits a byte of {self.bytes:,} held-out bytes"


@dataclasses.dataclass(frozen=True)
class TrajectoryEval:
    """One evaluation of a stage that learns from given trajectories: an entry of `evals`.

    Attributes:
      stage: name of the experiment.
      step: at which it was evaluated.
      bits_per_token: bits that the model needs for a learned token of held-out trajectories.
      tokens: number of these tokens.
    """

    stage: str
    step: int
    bits_per_token: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Describe the result in one line, for the display."""
        return f"{self.bits_per_token:.3f} bits a token of {self.tokens:,} held-out tokens"


Evaluation = EvalResult | TextEval | TrajectoryEval


def evaluation_of(stage: str, step: int, outcomes: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation that these outcomes amount to."""
    if "tasks" in outcomes:
        bits_per_token = outcomes.get("bits_per_token")
        safety = outcomes.get("safety")
        return EvalResult.from_tasks(stage, step, outcomes["tasks"], bits_per_token, safety)
    kind = TrajectoryEval if "bits_per_token" in outcomes else TextEval
    return kind(stage, step, **outcomes)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def percent(rate: float) -> str:
    """Write a share as a whole percentage, without the sign."""
    return f"{100 * rate:.0f}"


def _rate(tasks: list[Task]) -> float:
    return sum(task["success"] for task in tasks) / len(tasks)


def _rates_by(tasks: list[Task], key: str) -> dict[str, Rate]:
    """Return success and number by a key; tasks that say nothing about it are left out."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        if key in task:
            groups.setdefault(task[key], []).append(task)
    return {name: (_rate(members), len(members)) for name, members in sorted(groups.items())}


# -- files
# -------------------------------------------------------------------------------------------------


def write_report(workdir: pathlib.Path | str, report: Mapping[str, Any]) -> None:
    """Write WORKDIR/report.json, whole or not at all.

    Args:
      workdir: of the run.
      report: JSON values; `evals` may hold evaluations.
    """
    entries = [
        entry.to_json() if isinstance(entry, Evaluation) else entry for entry in report["evals"]
    ]
    document = {**report, "evals": entries}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    path = pathlib.Path(workdir) / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def read_report(workdir: pathlib.Path | str) -> dict[str, Any]:
    """Return WORKDIR/report.json, with evaluations in `evals`.

    Raises:
      FileNotFoundError: before the first evaluation of a run.
    """
    path = pathlib.Path(workdir) / "report.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; a run writes it when it is evaluated: is {workdir} the run's"
            " --workdir?"
        )
    report = read_json(path, "Run the same command again; a run writes it at each evaluation.")
    report["evals"] = [_evaluation_of_entry(entry) for entry in report["evals"]]
    return report


def _evaluation_of_entry(entry: Mapping[str, Any]) -> Evaluation:
    if "success" in entry:
        return EvalResult.from_json(entry)
    return TextEval(**entry) if "bits_per_byte" in entry else TrajectoryEval(**entry)


def outcomes_path(workdir: pathlib.Path | str, stage: str, step: int) -> pathlib.Path:
    """Return the file with the outcomes of one evaluation."""
    return pathlib.Path(workdir) / "evals" / f"{stage}_{step:06d}.json"


def write_outcomes(
    workdir: pathlib.Path | str, stage: str, step: int, outcomes: Mapping[str, Any]
) -> None:
    """Write the outcomes of one evaluation.

    Args:
      workdir: of the run.
      stage: name of the experiment.
      step: that was evaluated.
      outcomes: {"tasks": the outcome of every task}, by which runs can be compared task by task;
        the fields of a TextEval; those of a TrajectoryEval; or tasks and these.
    """
    path = outcomes_path(workdir, stage, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(outcomes) + "\n")


def read_outcomes(workdir: pathlib.Path | str, stage: str, step: int) -> dict[str, Any]:
    """Return the outcomes of one evaluation.

    Raises:
      FileNotFoundError: where that step was not evaluated.
    """
    path = outcomes_path(workdir, stage, step)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; every evaluation of a run writes one: was {workdir} copied"
            " without its evals folder?"
        )
    return read_json(path, "Delete it, and a run that is resumed evaluates that step again.")


# -- the table
# -------------------------------------------------------------------------------------------------


def before_and_after(evals: Iterable[Evaluation]) -> tuple[Evaluation, Evaluation]:
    """Return the first and the last evaluation of the stage that was trained last."""
    evals = list(evals)
    if not evals:
        raise ValueError("the report holds no evaluation yet; run the experiment to its first one")
    last_stage = [result for result in evals if result.stage == evals[-1].stage]
    by_step = sorted(last_stage, key=lambda result: result.step)
    return by_step[0], by_step[-1]


def print_table(before: Evaluation, after: Evaluation, console: Console | None = None) -> None:
    """Print success by family before and after, in percent with 95 % intervals.

    Families that training never saw are listed apart. Evaluations of text or of trajectories are
    printed as one line.
    """
    console = console or Console(highlight=False)
    if isinstance(before, EvalResult) and isinstance(after, EvalResult):
        console.print(_table(before, after))
    elif not isinstance(after, EvalResult):
        console.print(
            f"{after.stage}: {before.summary()} at step {before.step}, {after.summary()} at step"
            f" {after.step}"
        )


def _table(before: EvalResult, after: EvalResult) -> Table:
    table = Table(
        title=(
            f"{after.stage}: success on held-out tasks, step {before.step} and step {after.step}"
        ),
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
            table.add_row(family, *_cells(old.get(family), new[family]))
        table.add_section()
        pooled_old = _pooled(old) if old else None
        cells = _cells(pooled_old, _pooled(new))
        table.add_row(f"all {heading}", *cells, style="bold", end_section=True)
    return table


def _cells(old: Rate | None, new: Rate) -> list[str | Text]:
    """Return the cells of a row; `old` is None where the first evaluation lacks the family."""
    tasks = str(new[1])
    if old is None:
        return [tasks, "", rate_cell(new), ""]
    points = 100 * (new[0] - old[0])
    colour = "dim"
    if points > 0:
        colour = "green"
    elif points < 0:
        colour = "red"
    return [tasks, rate_cell(old), rate_cell(new), Text(f"{points:+.0f}", style=colour)]


def rate_cell(value: Rate) -> str:
    """Write a rate in percent with its 95 % interval."""
    rate, n = value
    low, high = wilson(round(rate * n), n)
    return f"{percent(rate):>3} ({percent(low):>2} to {percent(high):>3})"


def _pooled(families: Mapping[str, Rate]) -> Rate:
    n = sum(count for _, count in families.values())
    successes = sum(rate * count for rate, count in families.values())
    return successes / n, n
