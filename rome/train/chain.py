"""What each stage of a chain of runs added: the table `stages` of report.json.

A run that starts from another one continues its table. Success is on the held-out tasks, which are
the same for all stages of a chain. A stage that plays none, such as CPT, is measured by the first
evaluation of the stage after it: that plays the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rome.train.intervals import difference
from rome.train.report import EvalResult, Evaluation, TextEval, percent, rate_cell

Entry = dict[str, Any]


def stage_entry(
    stage: str, loss: str, steps: int, seconds: float, evals: Sequence[Evaluation]
) -> Entry:
    """Return the entry of one stage.

    Args:
      stage: name of its experiment.
      loss: that it was trained with.
      steps: that it has reached.
      seconds: wall time of the stage alone.
      evals: its own evaluations, the first one before its first step.

    Returns:
      {"stage", "loss", "steps", "seconds", "before", "after", "added", "bits_before", "bits_after",
      "bits_of"}. "before" and "after" are {"success", "n", "low", "high"}, "added" is {"points",
      "low", "high"} with shares between -1 and 1. "bits_of" is "byte" of held-out text or "token"
      of held-out trajectories. None stands where nothing was measured.
    """
    before, after = (_success(evals[0]), _success(evals[-1])) if evals else (None, None)
    bits_before, bits_after = (_bits(evals[0]), _bits(evals[-1])) if evals else (None, None)
    bits_of = "byte" if evals and isinstance(evals[0], TextEval) else "token"
    return {
        "stage": stage,
        "loss": loss,
        "steps": steps,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "added": _added(before, after),
        "bits_before": bits_before,
        "bits_after": bits_after,
        "bits_of": None if bits_after is None else bits_of,
    }


def join_stages(earlier: Sequence[Entry], own: Entry) -> list[Entry]:
    """Return the entries of the stages before, and the own one after them.

    A stage just before it that played no task gets its first evaluation as the success after it.
    """
    before = [dict(entry) for entry in earlier]
    if before and before[-1]["after"] is None:
        before[-1]["after"] = own["before"]
    return [*before, own]


def table_of_stages(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of what each stage added, for the terminal."""
    table = Table(
        title="what each stage added on the held-out tasks",
        title_style="bold",
        title_justify="left",
        caption="% of tasks solved (95 % interval); bits a byte of text (cpt) or a learned token",
        caption_justify="left",
    )
    table.add_column("stage", no_wrap=True)
    for name in ("steps", "min", "after it", "added", "bits"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry["stage"],
            str(entry["steps"]),
            f"{entry['seconds'] / 60:.1f}",
            _cell(entry["after"]),
            _added_cell(entry["added"]),
            _bits_cell(entry),
        )
    return table


def _success(result: Evaluation) -> Entry | None:
    if not isinstance(result, EvalResult):
        return None
    return {name: getattr(result, name) for name in ("success", "n", "low", "high")}


def _bits(result: Evaluation) -> float | None:
    if isinstance(result, TextEval):
        return result.bits_per_byte
    return result.bits_per_token


def _added(before: Entry | None, after: Entry | None) -> Entry | None:
    if before is None or after is None:
        return None
    low, high = difference(
        (before["success"] * before["n"], before["n"]), (after["success"] * after["n"], after["n"])
    )
    return {"points": after["success"] - before["success"], "low": low, "high": high}


def _cell(measured: Mapping[str, Any] | None) -> str:
    return "" if measured is None else rate_cell((measured["success"], measured["n"]))


def _added_cell(added: Mapping[str, Any] | None) -> Text | str:
    if added is None:
        return ""
    low, high = percent(added["low"]), percent(added["high"])
    colour = "dim"
    if added["low"] > 0:
        colour = "green"
    elif added["high"] < 0:
        colour = "red"
    return Text(f"{100 * added['points']:+.0f} ({low} to {high})", style=colour)


def _bits_cell(entry: Mapping[str, Any]) -> str:
    if entry["bits_after"] is None:
        return ""
    return f"{entry['bits_before']:.2f} → {entry['bits_after']:.2f}"
