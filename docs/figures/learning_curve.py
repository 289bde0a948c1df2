"""The learning curve: held-out success by step over the seeds of IPA, beside GRPO.

python -m docs.figures.learning_curve

It draws docs/images/learning_curve.png and writes the table of the runs into docs/results.md. The
runs are the files of docs/results/runs, which `python -m docs.figures.collect` makes. The files of
docs/results/older_runs, of an earlier SFT schedule, become older_learning_curve.png.

A thick line is the mean of the seeds, thin lines are the seeds. IPA's band is the mean of the
seeds' 95 % intervals (Wilson): it shows what the number of held-out tasks can resolve.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from docs.figures.collect import RUNS
from docs.figures.style import BLUE, INK, MUTED, new_figure, save
from rome.train.intervals import wilson

PAGE = pathlib.Path(__file__).parent.parent / "results.md"
OLDER_RUNS = RUNS.with_name("older_runs")  # of an earlier SFT schedule, read off older documents
BEGIN = "<!-- runs: written by python -m docs.figures.learning_curve -->"
END = "<!-- end of runs -->"
LOSSES = {"ipa": ("IPA", BLUE), "grpo": ("GRPO", MUTED)}


def load_runs(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records in a folder by loss, in the order of their seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*_seed*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(record["loss"], []).append(record)
    return runs


def draw_loss(axes: Axes, records: list[dict[str, Any]], loss: str) -> None:
    """Draw the mean, the seeds and, for IPA, the interval over the steps that all seeds have."""
    label, colour = LOSSES[loss]
    by_seed = [{entry["step"]: entry for entry in record["evals"]} for record in records]
    steps = sorted(set.intersection(*(set(evals) for evals in by_seed)))
    rates_SN = np.array(
        [[evals[step]["successes"] / evals[step]["n"] for step in steps] for evals in by_seed]
    )
    if loss == "ipa":
        intervals_SN2 = np.array(
            [
                [wilson(evals[step]["successes"], evals[step]["n"]) for step in steps]
                for evals in by_seed
            ]
        )
        low_N, high_N = intervals_SN2.mean(axis=0).T
        axes.fill_between(steps, 100 * low_N, 100 * high_N, color=colour, alpha=0.15, linewidth=0)
    style = "-" if loss == "ipa" else "--"
    for rates_N in rates_SN:
        axes.plot(steps, 100 * rates_N, style, color=colour, linewidth=0.9, alpha=0.6)
    seeds = "1 seed" if len(records) == 1 else f"{len(records)} seeds"
    axes.plot(
        steps,
        100 * rates_SN.mean(axis=0),
        style,
        color=colour,
        linewidth=2.4,
        marker="o",
        markersize=4,
        label=f"{label} ({seeds})",
    )
    axes.set_xticks(steps)


def draw(runs: dict[str, list[dict[str, Any]]], name: str = "learning_curve.png") -> pathlib.Path:
    """Draw all losses of `runs` and return the picture's path."""
    figure, axes = new_figure(8.0, 3.7)
    for loss in reversed(list(LOSSES)):
        if loss in runs:
            draw_loss(axes, runs[loss], loss)
    some = next(iter(runs.values()))[0]
    tasks = some["evals"][0]["n"]
    families = some["evals"][0]["families"]
    axes.set_xlabel("reinforcement learning step")
    axes.set_ylabel("held-out tasks solved, %")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_xlim(left=0)
    title = f"Held-out success, {tasks} tasks of {families} families"
    if "note" in some:
        title += f"\n({some['note'].partition(';')[0]})"
    axes.set_title(title, color=INK)
    axes.legend(loc="upper left")
    axes.annotate(
        "start: the SFT policy",
        xy=(0, 100 * some["evals"][0]["successes"] / tasks),
        xytext=(0.06, 0.1),
        textcoords="axes fraction",
        fontsize=8.5,
        color=MUTED,
        arrowprops={"arrowstyle": "-|>", "color": MUTED},
    )
    return save(figure, name)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table of all runs: success by step, time, and what made them."""
    every = [record for loss in LOSSES for record in runs.get(loss, [])]
    steps = sorted({entry["step"] for record in every for entry in record["evals"]})
    heading = " | ".join("SFT start" if step == 0 else f"step {step}" for step in steps)
    lines = [f"| run | {heading} | minutes |", "|---|" + "---|" * (len(steps) + 1)]
    lines += [_row(record, steps) for record in every]
    lines.append("")
    lines += [_origin(record) for record in every]
    return "\n".join(lines)


def _row(record: dict[str, Any], steps: list[int]) -> str:
    evals = {entry["step"]: entry for entry in record["evals"]}
    cells = [_percent(evals[step]) if step in evals else "" for step in steps]
    label, _ = LOSSES[record["loss"]]
    seconds = record["wall_seconds"] + (record["start_wall_seconds"] or 0)
    cells.append(f"{seconds / 60:.0f}")
    return f"| {label}, seed {record['seed']} | {' | '.join(cells)} |"


def _origin(record: dict[str, Any]) -> str:
    made = f"commit {record['commit']}, {record['date']}, {record['machine']}"
    return f"- `{record['command']}`: {made}."


def _percent(entry: dict[str, Any]) -> str:
    low, high = wilson(entry["successes"], entry["n"])
    rate = entry["successes"] / entry["n"]
    return f"{100 * rate:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def section(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the part of docs/results.md that shows the recorded runs."""
    if not runs:
        return "No run of the current configuration has been recorded yet."
    picture = "![Held-out success by step, IPA and GRPO](images/learning_curve.png)"
    words = (
        "*Thick lines are means over seeds, thin lines are seeds. The band is the mean of the 95 %"
        " intervals of the seeds. Held-out tasks at temperature 1; intervals are Wilson's.*"
    )
    return f"{picture}\n\n{words}\n\n{table(runs)}"


def insert(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a page with `text` between its two marks.

    Raises ValueError where the page has no marks.
    """
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page has no {begin} before an {end}; put the two lines into it")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture and write the table into the page of results."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.learning_curve")
    parser.add_argument("--runs", type=pathlib.Path, default=RUNS, help="folder of the records")
    options = parser.parse_args(arguments)
    draw(load_runs(OLDER_RUNS), "older_learning_curve.png")
    runs = load_runs(options.runs)
    if not runs:
        print(f"no run is recorded in {options.runs}; python -m docs.figures.collect makes them")
        return 1
    draw(runs)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(insert(page, section(runs)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
