"""The metrics of every step: one flat JSON object a line in WORKDIR/metrics.jsonl, and TensorBoard.

Each step of a stage has one line, also after a run was killed and resumed: the lines of a lost step
are dropped before it is repeated. In a job of several processes only the leader writes; the others
check their metrics all the same, so that a run that diverges ends everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rome.files import write_atomically
from rome.train.tensorboard import TensorBoard

RESERVED = ("stage", "step")


@dataclasses.dataclass(frozen=True)
class MetricFormat:
    """How a metric is shown to a person: a label, a format for its value, and a unit.

    The unit "%" multiplies the value by 100.
    """

    label: str
    format: str
    unit: str = ""

    def text(self, value: float) -> str:
        """Write a value with its unit."""
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        number = self.format.format(value)
        return f"{number} {self.unit}" if self.unit else number


# The metrics that the display shows. All others are written to the files only.
METRIC_FORMATS = {
    "reward": MetricFormat("reward", "{:+.2f}"),
    "success": MetricFormat("success", "{:.2f}", "%"),
    "loss": MetricFormat("loss", "{:.4f}"),
    "entropy": MetricFormat("entropy", "{:.2f}"),
    "turns": MetricFormat("turns", "{:.1f}"),
    "tokens": MetricFormat("tokens", "{:.0f}"),
    "staleness": MetricFormat("staleness", "{:.2f}"),
    "mismatch": MetricFormat("mismatch", "{:.1e}"),
    "tokens_per_s": MetricFormat("speed", "{:,.0f}", "tok/s"),
    "learner_tokens_per_s": MetricFormat("learner", "{:,.0f}", "tok/s"),
    "mfu": MetricFormat("MFU", "{:.0f}", "%"),
}


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """Return all lines of WORKDIR/metrics.jsonl in the order written; [] where there are none yet.

    A last line that was cut off by a kill is left out.

    Raises:
      ValueError: where another line is not JSON.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # the last newline ends the last whole line
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} line {number} is no JSON ({error}): {line[:60]!r}. Delete that line"
                " and run again."
            ) from error
    return records


class MetricsWriter:
    """Appends the metrics of one stage's steps to the files of a workdir.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      stage: the name that every line carries.
      resume_step: the last step that the restored checkpoint holds; lines of this stage beyond it
        are dropped. -1 starts the stage anew, None keeps every line.
      tensorboard: also write TensorBoard's event files.
      writes: False touches no file and only checks the metrics.
    """

    def __init__(
        self,
        workdir: pathlib.Path | str,
        stage: str,
        resume_step: int | None = None,
        tensorboard: bool = True,
        writes: bool = True,
    ) -> None:
        self.stage = stage
        self.last_step = -1 if resume_step is None else resume_step
        self._file: Any = None
        self._tensorboard: TensorBoard | None = None
        if not writes:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.last_step = self._drop_lost_steps(workdir, resume_step)
        path = workdir / "metrics.jsonl"
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        if tensorboard:
            self._tensorboard = TensorBoard(workdir / "tensorboard" / stage, resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line for `step`.

        Args:
          step: greater than every step written before.
          metrics: numbers, or arrays of one number, by name.

        Raises:
          ValueError: where a metric is not finite, has a reserved name, or the step is written
            already.
          TypeError: where a metric is not a number.
        """
        if step <= self.last_step:
            raise ValueError(
                f"step {step} of stage {self.stage} is written already (last: {self.last_step});"
                " pass resume_step when resuming"
            )
        values = {name: _number(name, step, value) for name, value in metrics.items()}
        self.last_step = step
        if self._file is None:
            return
        record = {"stage": self.stage, "step": step, **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)

    def flush(self) -> None:
        """Force what was written to disk, so that it survives a crash of the machine."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close the files; a second call does nothing."""
        if self._file is None or self._file.closed:
            return
        self.flush()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_lost_steps(self, workdir: pathlib.Path, resume_step: int | None) -> int:
        """Drop this stage's lines beyond `resume_step` and an unfinished last line.

        Returns:
          The last step of this stage that is kept; -1 where there is none.
        """
        kept = []
        last_step = -1
        for record in read_metrics(workdir):
            is_ours = record["stage"] == self.stage
            if is_ours and resume_step is not None and record["step"] > resume_step:
                continue
            kept.append(record)
            if is_ours:
                last_step = max(last_step, record["step"])
        text = "".join(json.dumps(record) + "\n" for record in kept)
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
        return last_step


def metrics_of_updates(updates: Sequence[Mapping[str, Any]], per_epoch: int) -> dict[str, float]:
    """Combine the metrics of a step's updates, in the order that they were made.

    Args:
      updates: of each update, by name.
      per_epoch: updates of an epoch.

    Returns:
      Means over the updates of the last epoch, the maximum where the name starts with `max_`;
      `updates`, their number; `skipped_updates`, their sum over the step; and `first_kl`: kl_old of
      the first update, before which the step has changed nothing.
    """
    combined: dict[str, float] = {"updates": float(len(updates))}
    if not updates:
        return combined
    last_epoch = updates[-per_epoch:]
    for name in last_epoch[0]:
        values = [float(update[name]) for update in last_epoch]
        combine = np.max if name.startswith("max_") else np.mean
        combined[name] = float(combine(values))
    if "kl_old" in updates[0]:
        combined["first_kl"] = float(updates[0]["kl_old"])
    if "skipped_updates" in updates[0]:
        combined["skipped_updates"] = sum(float(update["skipped_updates"]) for update in updates)
    return combined


def _number(name: str, step: int, value: Any) -> float | int:
    """Return a metric as a Python number, or raise what is wrong with it."""
    if name in RESERVED:
        raise ValueError(f"no metric can be called {name!r}: that names the line itself")
    value = value.item() if hasattr(value, "item") else value  # NumPy and JAX scalars
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"metric {name!r} of step {step} is {value!r}, not a number; metrics.jsonl holds one"
            " flat number for each name"
        )
    if not math.isfinite(value):
        raise ValueError(
            f"metric {name!r} is {value} at step {step}; training has diverged or it divides by"
            " zero: look at the step before in metrics.jsonl"
        )
    return value
