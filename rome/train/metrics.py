"""The figures of every step: one flat JSON object a line in WORKDIR/metrics.jsonl, and the same in
TensorBoard.

A step stands there once for each stage, also after a run was killed and resumed: what a lost step
had written is dropped before it is redone. Of several processes only the leader writes; the others
check their figures all the same, so that a run that diverges ends everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

RESERVED = ("stage", "step")


@dataclasses.dataclass(frozen=True)
class Figure:
    """How a person reads one figure: its label, a format for its value and the unit behind it."""

    label: str
    format: str
    unit: str = ""

    def text(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        return self.format.format(value) + (f" {self.unit}" if self.unit else "")


# The figures that the display and the plots know by name; all others are written all the same.
FIGURES = {
    "reward": Figure("reward", "{:+.2f}"),
    "success": Figure("success", "{:.2f}", "%"),
    "loss": Figure("loss", "{:.4f}"),
    "turns": Figure("turns", "{:.1f}"),
    "tokens": Figure("tokens", "{:.0f}"),
    "staleness": Figure("staleness", "{:.2f}"),
    "mismatch": Figure("mismatch", "{:.1e}"),
    "tokens_per_s": Figure("speed", "{:,.0f}", "tok/s"),
}


def write_atomically(path: pathlib.Path | str, text: str) -> None:
    """Writes a whole file or leaves the old one: a reader, or a kill, never meets half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """All lines in the order they were written; [] where there are none yet.

    A last line cut off by a kill is left out.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split(
        "\n"
    )  # what follows the last newline was never finished
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number} is no JSON ({error.msg}): {line[:60]!r}. Delete that line"
                " and run again."
            ) from error
    return records


class MetricsWriter:
    """Appends the figures of one stage's steps.

    Args:
      resume_step: the last step that the restored checkpoint holds; lines of this stage beyond it
        are dropped. -1 starts the stage anew, None keeps every line.
      writes: False touches no file.
    """

    def __init__(
        self,
        workdir: pathlib.Path | str,
        stage: str,
        resume_step: int | None = None,
        tensorboard: bool = True,
        writes: bool = True,
    ) -> None:
        if not writes:
            self.stage, self.last_step, self._file, self._tensorboard = (
                stage,
                -1 if resume_step is None else resume_step,
                None,
                None,
            )
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self.last_step = self._keep_until(workdir, resume_step)
        self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import (
                SummaryWriter,
            )  # costs a third of a second; readers of metrics.jsonl do without

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard" / stage), purge_step=purge
            )

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """One line. Figures are numbers (or arrays of one number); steps rise."""
        if step <= self.last_step:
            raise ValueError(
                f"step {step} of stage {self.stage} is written already (last: {self.last_step});"
                " pass resume_step when resuming"
            )
        values = {name: _number(name, step, value) for name, value in figures.items()}
        self.last_step = step
        if self._file is None:
            return
        self._file.write(
            json.dumps({"stage": self.stage, "step": step, **values}, allow_nan=False) + "\n"
        )
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes what was written survive a crash of the machine."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
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

    def _keep_until(self, workdir: pathlib.Path, resume_step: int | None) -> int:
        """Drops this stage's lines beyond resume_step and an unfinished last line; returns the
        stage's last step, -1 without one.
        """
        records = read_metrics(workdir)
        kept = [
            record
            for record in records
            if record["stage"] != self.stage or resume_step is None or record["step"] <= resume_step
        ]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
        return max((record["step"] for record in kept if record["stage"] == self.stage), default=-1)


def _number(name: str, step: int, value: Any) -> float | int:
    if name in RESERVED:
        raise ValueError(f"no figure can be called {name!r}: that names the line itself")
    value = value.item() if hasattr(value, "item") else value  # NumPy and JAX scalars
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"figure {name!r} of step {step} is {value!r}, no number; metrics.jsonl holds one flat"
            " number for each name"
        )
    if not math.isfinite(value):
        raise ValueError(
            f"figure {name!r} is {value} at step {step}; training has diverged or it divides by"
            " zero: look at the step before in metrics.jsonl"
        )
    return value
