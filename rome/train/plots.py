"""The curves of a run as PNG files, drawn from metrics.jsonl and report.json alone."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import (
    Figure,
)  # not pyplot: no screen needed, and a notebook's own plots stay as they are
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rome.train.metrics import read_metrics
from rome.train.report import EvalResult, before_and_after, read_report, wilson

BEFORE, AFTER, UNSEEN, GRID = "#9aa5b1", "#1f6fb2", "#d9822b", "#e4e7eb"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "figure.dpi": 130,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7b8794",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}


def plot_curves(workdir: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes WORKDIR/plots/*.png, as many as the run has figures for, and returns their paths in
    reading order.
    """
    workdir = pathlib.Path(workdir)
    records, evals = _records_of_run(workdir), read_report(workdir)["evals"]
    stages = list(dict.fromkeys(record["stage"] for record in records))
    figures = {}
    with matplotlib.rc_context(STYLE):
        for stage in stages:
            of_stage = [record for record in records if record["stage"] == stage]
            of_evals = [result for result in evals if result.stage == stage]
            if any("reward" in record for record in of_stage):
                figures[f"{stage}_reward"] = _reward(stage, of_stage, of_evals)
                figures[f"{stage}_episodes"] = _episodes(stage, of_stage)
            elif any("loss" in record for record in of_stage):
                figures[f"{stage}_loss"] = _loss(stage, of_stage)
        if evals and isinstance(evals[-1], EvalResult):
            figures["families"] = _families(*before_and_after(evals))
        (workdir / "plots").mkdir(exist_ok=True)
        paths = []
        for name, figure in figures.items():
            paths.append(workdir / "plots" / f"{name}.png")
            figure.savefig(paths[-1])
    return sorted(
        paths, key=lambda path: (not path.stem.endswith("_reward"), path.stem != "families")
    )


def _records_of_run(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The figures of the run, those of the run that it started from first."""
    earlier = workdir / "init"
    return (_records_of_run(earlier) if earlier.is_dir() else []) + read_metrics(workdir)


def _reward(stage: str, records: list[dict[str, Any]], evals: list[EvalResult]) -> Figure:
    """Above: success in training and on held-out tasks. Below: the reward that is optimised."""
    figure = Figure(figsize=(8.5, 6.6), layout="constrained")
    success, reward = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    success.set_title(f"{stage}: held-out success" + (f" {_points(evals)}" if evals else ""))
    _curve(success, records, "success", scale=100, colour=BEFORE, label="training episodes")
    if evals:
        steps, rates = [result.step for result in evals], [100 * result.success for result in evals]
        below, above = (
            [100 * (r.success - r.low) for r in evals],
            [100 * (r.high - r.success) for r in evals],
        )
        label = f"held-out tasks (n = {evals[-1].n}, 95 % interval)"
        success.errorbar(
            steps,
            rates,
            yerr=(below, above),
            color=AFTER,
            marker="o",
            markersize=6,
            linewidth=2,
            capsize=4,
            zorder=4,
            label=label,
        )
        unseen = [
            (result.step, 100 * result.unseen_families)
            for result in evals
            if result.unseen_families is not None
        ]
        if unseen:
            n = sum(count for _, count in evals[-1].unseen_by_family.values())
            success.plot(
                *zip(*unseen),
                color=UNSEEN,
                marker="s",
                markersize=5,
                linestyle="--",
                zorder=3,
                label=f"unseen families (n = {n})",
            )
    success.set(ylabel="tasks solved, %", ylim=(0, 100))
    if success.get_legend_handles_labels()[0]:  # a run in its first minute may have neither curve
        success.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, fontsize=10)
    reward.set_title("Reward of training episodes")
    _curve(reward, records, "reward", colour=AFTER)
    reward.set(xlabel="training step", ylabel="mean reward")
    _whole_steps(reward, records, evals)
    return figure


def _episodes(stage: str, records: list[dict[str, Any]]) -> Figure:
    """Small panels of what tells a healthy run from a sick one."""
    panels = [
        ("turns", "Turns of an episode", "mean turns"),
        ("tokens", "Length of an episode", "mean tokens"),
        ("staleness", "Staleness of the trained tokens", "weight versions behind"),
        ("mismatch", "Engine against trainer", "mean Δ log p"),
    ]
    panels = [panel for panel in panels if any(panel[0] in record for record in records)] or [
        ("loss", "Loss", "loss")
    ]
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9.5, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axis, (name, title, unit) in zip(axes.flat, panels):
        _curve(axis, records, name, colour=AFTER)
        axis.set(title=title, ylabel=unit)
        if name == "mismatch" and all(record.get(name, 1.0) > 0 for record in records):
            axis.set_yscale("log")
        axis.xaxis.set_tick_params(labelbottom=True)
        _whole_steps(axis, records, [])
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{stage}: episodes", x=0.01, ha="left", fontweight="bold", fontsize=14)
    return figure


def _loss(stage: str, records: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axis = figure.subplots()
    losses = [record["loss"] for record in records if "loss" in record]
    last = _running_mean(losses, _reach(losses))[-1]
    axis.set(
        title=f"{stage}: training loss, {last:.3f} at the end",
        xlabel="training step",
        ylabel="loss, nats a token",
    )
    _curve(axis, records, "loss", colour=AFTER)
    axis.set_ylim(bottom=0)
    _whole_steps(axis, records, [])
    return figure


def _families(before: EvalResult, after: EvalResult) -> Figure:
    """Two bars for each family with their intervals, the largest gain on top, unseen families below
    in their own group.
    """
    groups = [
        (before.by_family, after.by_family, AFTER),
        (before.unseen_by_family, after.unseen_by_family, UNSEEN),
    ]
    rows: list[tuple[float, str, tuple[float, int], tuple[float, int], str]] = []
    place = 0.0
    for old, new, colour in groups:
        for family in sorted(
            (family for family in new if family in old),
            key=lambda family: old[family][0] - new[family][0],
        ):
            rows.append((place, family, old[family], new[family], colour))
            place += 1.0
        place += 0.6
    figure = Figure(figsize=(8.5, 1.9 + 0.5 * place), layout="constrained")
    axis = figure.subplots()
    for place, _, old, new, colour in rows:
        for offset, (rate, n), fill in ((-0.19, old, BEFORE), (0.19, new, colour)):
            low, high = wilson(round(rate * n), n)
            axis.barh(place + offset, 100 * rate, height=0.36, color=fill)
            axis.plot([100 * low, 100 * high], [place + offset] * 2, color="#102a43", linewidth=1.5)
        points = f"{100 * (new[0] - old[0]):+.0f}"
        axis.text(
            103,
            place,
            points,
            va="center",
            color="#b91c1c" if points.startswith("-") and points != "-0" else "#1f2933",
        )
    axis.set_yticks([row[0] for row in rows], [f"{row[1]}  (n = {row[3][1]})" for row in rows])
    axis.set(
        xlim=(0, 102), xlabel="tasks solved, %  (line: 95 % interval; right: change in points)"
    )
    axis.set_ylim(max((row[0] for row in rows), default=0) + 0.6, -0.6)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.set_title(f"{after.stage}: success by family, {_points([before, after])}")
    keys = [(BEFORE, f"step {before.step}"), (AFTER, f"step {after.step}")]
    if after.unseen_by_family:
        keys.append((UNSEEN, f"step {after.step}, family unseen in training"))
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in keys],
        loc="outside lower center",
        ncols=len(keys),
    )
    return figure


def _curve(
    axis: Axes,
    records: list[dict[str, Any]],
    name: str,
    colour: str,
    scale: float = 1.0,
    label: str | None = None,
) -> None:
    """Every step thin, their running mean thick: the eye gets the trend, the noise stays honest."""
    points = [(record["step"], scale * record[name]) for record in records if name in record]
    if not points:
        return
    steps, values = zip(*points)
    axis.plot(
        steps,
        values,
        color=colour,
        alpha=0.35,
        linewidth=1,
        marker="." if len(points) < 40 else None,
        markersize=4,
    )
    axis.plot(steps, _running_mean(values, _reach(values)), color=colour, linewidth=2, label=label)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` values on both sides, fewer at the ends."""
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _reach(values: Sequence[float]) -> int:
    return len(values) // 20


def _points(evals: Sequence[EvalResult]) -> str:
    first, last = evals[0], evals[-1]
    return (
        f"{100 * first.success:.0f} % → {100 * last.success:.0f} %"
        if first is not last
        else f"{100 * last.success:.0f} %"
    )


def _whole_steps(axis: Axes, records: list[dict[str, Any]], evals: list[EvalResult]) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    last = max([record["step"] for record in records] + [result.step for result in evals] + [1])
    axis.set_xlim(-0.02 * last, 1.02 * last)
