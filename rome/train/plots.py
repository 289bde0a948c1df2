"""The curves of a run as PNG files, drawn from metrics.jsonl and report.json alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it needs no screen and leaves a notebook alone
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rome.train.intervals import wilson
from rome.train.metrics import read_metrics
from rome.train.report import EvalResult, Rate, before_and_after, read_report

BEFORE = "#9aa5b1"
AFTER = "#1f6fb2"
UNSEEN = "#d9822b"
GRID = "#e4e7eb"
LOSS = "#b91c1c"
STYLE: Any = {
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


Records = Sequence[dict[str, Any]]


def plot_curves(workdir: pathlib.Path | str) -> list[pathlib.Path]:
    """Write WORKDIR/plots/*.png, as many as the run has metrics for.

    Returns:
      Their paths, in the order to read them: rewards, families, then the others.
    """
    workdir = pathlib.Path(workdir)
    records = _records_of_run(workdir)
    report = read_report(workdir)
    evals = report["evals"]
    stages = [entry for entry in report.get("stages", ()) if entry["after"] is not None]
    policy_evals = [result for result in evals if isinstance(result, EvalResult)]
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for stage in dict.fromkeys(record["stage"] for record in records):
            of_stage = [record for record in records if record["stage"] == stage]
            of_evals = [result for result in policy_evals if result.stage == stage]
            figures |= _figures_of_stage(stage, of_stage, of_evals)
        if evals and isinstance(evals[-1], EvalResult):
            before, after = before_and_after(evals)
            if isinstance(before, EvalResult) and isinstance(after, EvalResult):
                figures["families"] = _families(before, after)
        if len(stages) > 1:
            figures["stages"] = _stages(stages)
        directory = workdir / "plots"
        directory.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png")
    paths = [directory / f"{name}.png" for name in figures]
    return sorted(
        paths, key=lambda path: (not path.stem.endswith("_reward"), path.stem != "families")
    )


def _figures_of_stage(
    stage: str, records: Records, evals: Sequence[EvalResult]
) -> dict[str, Figure]:
    if any("reward" in record for record in records):
        return {
            f"{stage}_reward": _reward(stage, records, evals),
            f"{stage}_episodes": _episodes(stage, records),
        }
    if any("loss" in record for record in records):
        return {f"{stage}_loss": _loss(stage, records)}
    return {}


def _records_of_run(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, after those of the run that it started from."""
    earlier = workdir / "init"
    before = _records_of_run(earlier) if earlier.is_dir() else []
    return before + read_metrics(workdir)


def _reward(stage: str, records: Records, evals: Sequence[EvalResult]) -> Figure:
    """Draw success in training and on held-out tasks above, the optimised reward below."""
    figure = Figure(figsize=(8.5, 6.6), layout="constrained")
    success, reward = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    points = f" {_points(evals)}" if evals else ""
    success.set_title(f"{stage}: held-out success{points}")
    _curve(success, records, "success", scale=100, colour=BEFORE, label="training episodes")
    if evals:
        _held_out(success, evals)
    success.set(ylabel="tasks solved, %", ylim=(0, 100))
    if success.get_legend_handles_labels()[0]:  # a run in its first minute may have neither curve
        success.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, fontsize=10)
    reward.set_title("Reward of training episodes")
    _curve(reward, records, "reward", colour=AFTER)
    reward.set(xlabel="training step", ylabel="mean reward")
    _whole_steps(reward, records, evals)
    return figure


def _held_out(axis: Axes, evals: Sequence[EvalResult]) -> None:
    """Draw held-out success with its intervals, and success in unseen families."""
    axis.errorbar(
        [result.step for result in evals],
        [100 * result.success for result in evals],
        yerr=(
            [100 * (result.success - result.low) for result in evals],
            [100 * (result.high - result.success) for result in evals],
        ),
        color=AFTER,
        marker="o",
        markersize=6,
        linewidth=2,
        capsize=4,
        zorder=4,
        label=f"held-out tasks (n = {evals[-1].n}, 95 % interval)",
    )
    unseen = [result for result in evals if result.unseen_families is not None]
    if not unseen:
        return
    n = sum(count for _, count in evals[-1].unseen_by_family.values())
    axis.plot(
        [result.step for result in unseen],
        [100 * (result.unseen_families or 0.0) for result in unseen],
        color=UNSEEN,
        marker="s",
        markersize=5,
        linestyle="--",
        zorder=3,
        label=f"unseen families (n = {n})",
    )


def _episodes(stage: str, records: Records) -> Figure:
    """Draw small panels of the metrics that show whether a run is healthy."""
    panels = [
        ("turns", "Turns of an episode", "mean turns"),
        ("tokens", "Length of an episode", "mean tokens"),
        ("staleness", "Staleness of the trained tokens", "weight versions behind"),
        ("mismatch", "Engine against trainer", "mean Δ log p"),
    ]
    panels = [panel for panel in panels if any(panel[0] in record for record in records)]
    if not panels:
        panels = [("loss", "Loss", "loss")]
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9.5, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axis, (name, title, unit) in zip(axes.flat, panels, strict=False):
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


def _loss(stage: str, records: Records) -> Figure:
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


class _Row(NamedTuple):
    """A family in the chart of families, and its height."""

    height: float
    family: str
    before: Rate
    after: Rate
    colour: str


def _families(before: EvalResult, after: EvalResult) -> Figure:
    """Draw two bars for each family with their intervals, the largest gain on top.

    Unseen families form a group of their own below.
    """
    rows = _family_rows(before.by_family, after.by_family, AFTER, 0.0)
    place = len(rows) + 0.6
    unseen = _family_rows(before.unseen_by_family, after.unseen_by_family, UNSEEN, place)
    rows += unseen
    place += len(unseen) + 0.6
    figure = Figure(figsize=(8.5, 1.9 + 0.5 * place), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        _family_bar(axis, row.height - 0.19, row.before, BEFORE)
        _family_bar(axis, row.height + 0.19, row.after, row.colour)
        points = f"{100 * (row.after[0] - row.before[0]):+.0f}"
        is_loss = points.startswith("-") and points != "-0"
        axis.text(103, row.height, points, va="center", color=LOSS if is_loss else "#1f2933")
    labels = [f"{row.family}  (n = {row.after[1]})" for row in rows]
    axis.set_yticks([row.height for row in rows], labels)
    axis.set(
        xlim=(0, 102), xlabel="tasks solved, %  (line: 95 % interval; right: change in points)"
    )
    axis.set_ylim(max((row.height for row in rows), default=0) + 0.6, -0.6)
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


def _family_rows(
    before: dict[str, Rate], after: dict[str, Rate], colour: str, first_height: float
) -> list[_Row]:
    families = [family for family in after if family in before]
    families.sort(key=lambda family: before[family][0] - after[family][0])
    return [
        _Row(first_height + place, family, before[family], after[family], colour)
        for place, family in enumerate(families)
    ]


def _family_bar(axis: Axes, height: float, value: Rate, colour: str) -> None:
    rate, n = value
    low, high = wilson(round(rate * n), n)
    axis.barh(height, 100 * rate, height=0.36, color=colour)
    axis.plot([100 * low, 100 * high], [height, height], color="#102a43", linewidth=1.5)


def _stages(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw held-out success after each stage of a chain, with what the stage added above it."""
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axis = figure.subplots()
    for place, entry in enumerate(entries):
        after, added = entry["after"], entry["added"]
        axis.bar(place, 100 * after["success"], width=0.55, color=AFTER)
        axis.plot([place] * 2, [100 * after["low"], 100 * after["high"]], color="#102a43")
        if added is not None:
            axis.text(
                place,
                100 * after["high"] + 2,
                f"{100 * added['points']:+.0f}",
                ha="center",
                color=LOSS if added["high"] < 0 else "#1f2933",
            )
    labels = [
        f"{entry['stage']}\n{entry['steps']} steps, {entry['seconds'] / 60:.1f} min"
        for entry in entries
    ]
    axis.set_xticks(range(len(entries)), labels)
    axis.set(ylim=(0, 108), ylabel="tasks solved, %")
    axis.grid(False, axis="x")
    n = entries[-1]["after"]["n"]
    axis.set_title(f"Held-out success after each stage (n = {n}, line: 95 % interval)")
    return figure


def _curve(
    axis: Axes,
    records: Records,
    name: str,
    colour: str,
    scale: float = 1.0,
    label: str | None = None,
) -> None:
    """Draw every step as a thin line and their running mean as a thick one."""
    measured = [record for record in records if name in record]
    if not measured:
        return
    steps = [record["step"] for record in measured]
    values = [scale * record[name] for record in measured]
    axis.plot(
        steps,
        values,
        color=colour,
        alpha=0.35,
        linewidth=1,
        marker="." if len(values) < 40 else None,
        markersize=4,
    )
    axis.plot(steps, _running_mean(values, _reach(values)), color=colour, linewidth=2, label=label)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean over up to `reach` values on both sides, fewer at the ends."""
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _reach(values: Sequence[float]) -> int:
    return len(values) // 20


def _points(evals: Sequence[EvalResult]) -> str:
    """Write the change of success over these evaluations, in percent."""
    last = f"{100 * evals[-1].success:.0f} %"
    if evals[0] is evals[-1]:
        return last
    return f"{100 * evals[0].success:.0f} % → {last}"


def _whole_steps(axis: Axes, records: Records, evals: Sequence[EvalResult]) -> None:
    """Label only whole steps on the axis, from 0 to the last one."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    steps = [record["step"] for record in records] + [result.step for result in evals]
    last = max([*steps, 1])
    axis.set_xlim(-0.02 * last, 1.02 * last)
