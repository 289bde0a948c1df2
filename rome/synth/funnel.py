"""The funnel of a filter: how many trajectories came to each stage, and how many it removed."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rome.files import read_json
from rome.synth.verdicts import STAGES, Item

MAX_REASONS = 5  # of each stage that are shown


def make_funnel(items: Sequence[Item], set_aside: int) -> dict[str, Any]:
    """Return the content of funnel.json.

    Returns:
      {read, set_aside, stages: [{stage, came, removed, undecided, reasons: {reason: n}}], kept}.
    """
    rest = list(items)
    stages = []
    for stage in STAGES:
        removed = [item for item in rest if item.rejected_by == stage]
        undecided = sum(
            stage in item.verdicts and item.verdicts[stage].accepted is None for item in rest
        )
        reasons = collections.Counter(
            _kind(item.verdicts[stage].reasons[0])
            for item in removed
            if item.verdicts[stage].reasons
        )
        stages.append(
            {
                "stage": stage,
                "came": len(rest),
                "removed": len(removed),
                "undecided": undecided,
                "reasons": dict(reasons.most_common(MAX_REASONS)),
            }
        )
        rest = [item for item in rest if item.rejected_by != stage]
    return {"read": len(items), "set_aside": set_aside, "stages": stages, "kept": len(rest)}


def _kind(reason: str) -> str:
    """Return a reason without what differs from one trajectory to the next."""
    return reason.partition(":")[0][:80]


def read_funnel(folder: pathlib.Path) -> dict[str, Any]:
    """Return the funnel that a filter wrote.

    Raises:
      OSError, ValueError: there is none.
    """
    return read_json(folder / "funnel.json", "Run launch.synth --filter first.")


def describe_funnel(funnel: Mapping[str, Any]) -> list[str]:
    """Return the funnel as lines for a terminal."""
    lines = [f"{funnel['read']} trajectories read, {funnel['set_aside']} files set aside"]
    for stage in funnel["stages"]:
        share = stage["removed"] / stage["came"] if stage["came"] else 0.0
        bar = "#" * round(40 * (stage["came"] - stage["removed"]) / max(funnel["read"], 1))
        lines.append(
            f"{stage['stage']:>10} {stage['came']:5} came, {stage['removed']:5} removed"
            f" ({share:4.0%}), {stage['undecided']:4} undecided  {bar}"
        )
        lines += [f"{'':>14}{count:4} {reason}" for reason, count in stage["reasons"].items()]
    return [*lines, f"{'kept':>10} {funnel['kept']:5}"]


def plot_funnel(funnel: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write a picture of the funnel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["read", *(stage["stage"] for stage in funnel["stages"])]
    left = [funnel["read"], *(one["came"] - one["removed"] for one in funnel["stages"])]
    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.barh(names[::-1], left[::-1])
    axes.set_xlabel("trajectories left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
