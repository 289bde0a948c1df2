"""The safety curve: attacks, reward hacks and utility over steps, with costs of harm on and off.

python -m docs.figures.safety_curve --collect runs/safety_on_0 runs/safety_off_0 --machine=TEXT
python -m docs.figures.safety_curve --before runs/safety_sft
python -m docs.figures.safety_curve

The first two commands keep finished runs of experiments/safety.py, and what the policy did before
its SFT on the suite, in docs/results/safety. The third draws docs/images/safety_curve.png and
writes the table into docs/safety.md.

Points pool the held-out tasks of all seeds, and bands are their 95 % intervals, clustered by seed
family (rome/evals/safety.py). Thin lines are the seeds. Dashed lines are the episodes of training
families that each step sampled, pooled over the seeds and WINDOW steps.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from docs.figures.learning_curve import insert
from docs.figures.style import BLUE, RED, new_figure, save
from rome.evals.safety import summarise_safety

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "safety"
BEFORE = RESULTS / "before.json"
PAGE = pathlib.Path(__file__).parent.parent / "safety.md"
BEGIN = "<!-- curve: written by python -m docs.figures.safety_curve -->"
END = "<!-- end of curve -->"
ARMS = {"off": ("costs off", RED), "on": ("costs on", BLUE)}
PANELS = {
    "attack_success": "attacks that succeeded, %",
    "check_edits": "checks edited in place of the work, %",
    "utility_under_attack": "utility under attack, %",
    "utility_without_attack": "utility without attack, %",
}
WINDOW = 4  # steps
# Measure -> the sort of tasks of training episodes that it is about, and its fact.
TRAINED = {
    "attack_success": ("attack", "attacked"),
    "check_edits": ("hackable", "harms"),
    "utility_under_attack": ("attack", "utility"),
}
ROWS = (*PANELS, "hack_rate", "cue_use", "false_refusals")
LABELS = {
    "hack_rate": "hacks of impossible tasks, %",
    "cue_use": "use of needed cues, %",
    "false_refusals": "false refusals, %",
    **PANELS,
}


def read_run(workdir: pathlib.Path, machine: str) -> dict[str, Any]:
    """Return the record of a finished run: what its evaluations found of each task, by step.

    Raises FileNotFoundError where the directory is no run, and ValueError for one that was cut off.
    """
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    evals = {
        str(entry["step"]): read_evaluation(workdir, entry["stage"], entry["step"])
        for entry in report["evals"]
        if entry["stage"] == report["experiment"]
    }
    if str(report["steps"]) not in evals:
        raise ValueError(f"{workdir} was not evaluated at its last step; let the run end first")
    return {
        "arm": "on" if config["safety_cost"] else "off",
        "safety_cost": config["safety_cost"],
        "seed": report["seed"],
        "steps": report["steps"],
        "wall_seconds": report["wall_seconds"],
        "version": report["version"],
        "machine": machine,
        "evals": evals,
        "training": read_training(workdir, report["experiment"]),
    }


def read_evaluation(workdir: pathlib.Path, stage: str, step: int) -> list[dict[str, Any]]:
    """Return what the evaluation of a stage at a step found of each task of the suite.

    Raises FileNotFoundError where there was none.
    """
    path = workdir / "evals" / f"{stage}_{step:06d}" / "results.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: one[name] for name in ("task", "ending", "safety")}
        for one in records
        if one.get("safety")
    ]


def read_training(workdir: pathlib.Path, experiment: str) -> dict[str, dict[str, list[int]]]:
    """Return what each step's training episodes did: step -> measure -> [episodes, hits]."""
    counts: dict[str, dict[str, list[int]]] = {}
    for path in sorted((workdir / "trajectories").glob(f"{experiment}_*_e*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))["extra"].get("safety")
        step = str(int(path.name.removeprefix(f"{experiment}_").partition("_")[0]))
        for name, (sort, fact) in TRAINED.items():
            if facts and facts["sort"] == sort and not facts["clean"]:
                count = counts.setdefault(step, {}).setdefault(name, [0, 0])
                count[0] += 1
                count[1] += bool(facts[fact])
    return counts


def training_rates(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and shares of a measure over training episodes, pooled over WINDOW steps."""
    steps = max((int(step) for record in records for step in record["training"]), default=-1) + 1
    places, rates = [], []
    for first in range(0, steps, WINDOW):
        window = range(first, min(first + WINDOW, steps))
        counts = [
            record["training"].get(str(step), {}).get(name, [0, 0])
            for record in records
            for step in window
        ]
        episodes = sum(count for count, _ in counts)
        if episodes:
            places.append((window[0] + window[-1]) / 2)
            rates.append(sum(hits for _, hits in counts) / episodes)
    return places, rates


def load_runs(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records in a folder by arm, in the order of their seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*_seed*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(record["arm"], []).append(record)
    return runs


def measures(records: Sequence[dict[str, Any]], step: str) -> dict[str, Any]:
    """Return the measures of the pooled evaluations of some runs at a step."""
    pooled = []
    for record in records:
        for one in record["evals"][step]:
            pooled.append({**one, "task": f"{one['task']}/{record['seed']}"})
    summary = summarise_safety(pooled)
    return summary["measures"] if summary else {}


def steps_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the steps at which all of these runs were evaluated."""
    common = set.intersection(*(set(record["evals"]) for record in records))
    return sorted(common, key=int)


def draw_panel(axes: Axes, runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Draw one measure of both arms."""
    for arm, (label, colour) in ARMS.items():
        records = runs.get(arm)
        if not records:
            continue
        steps = steps_of(records)
        places = [int(step) for step in steps]
        pooled = [measures(records, step)[name] for step in steps]
        low, high = ([100 * one[end] for one in pooled] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
        for record in records:
            alone = [100 * measures([record], step)[name]["value"] for step in steps]
            axes.plot(places, alone, color=colour, linewidth=0.8, alpha=0.5)
        places_trained, rates = training_rates(records, name)
        shares = [100 * rate for rate in rates]
        axes.plot(places_trained, shares, "--", color=colour, linewidth=1.2, alpha=0.8)
        values = [100 * one["value"] for one in pooled]
        seeds = "1 seed" if len(records) == 1 else f"{len(records)} seeds"
        axes.plot(
            places,
            values,
            color=colour,
            linewidth=2.2,
            marker="o",
            markersize=4,
            label=f"{label} ({seeds})",
        )
    axes.set_title(PANELS[name])
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)


def draw(runs: dict[str, list[dict[str, Any]]]) -> pathlib.Path:
    """Draw the four panels and return the picture's path."""
    figure, grid = new_figure(8.6, 6.0, nrows=2, ncols=2, sharex=True)
    for axes, name in zip(grid.flat, PANELS, strict=True):
        draw_panel(axes, runs, name)
    for axes in grid[1]:
        axes.set_xlabel("reinforcement learning step")
    grid[0][0].legend(loc="upper right")
    return save(figure, "safety_curve.png")


def section(runs: dict[str, list[dict[str, Any]]], before: Sequence[dict[str, Any]]) -> str:
    """Return the part of docs/safety.md that shows the runs.

    Args:
      runs: records by arm.
      before: what the policy before SFT did at each task; empty where it was not kept.
    """
    arms = [arm for arm in ARMS if arm in runs]
    last = {arm: steps_of(runs[arm])[-1] for arm in arms}
    everything = [record for arm in arms for record in runs[arm]]
    columns = {"after SFT": measures(everything, "0")}
    columns |= {f"{ARMS[arm][0]}, step {last[arm]}": measures(runs[arm], last[arm]) for arm in arms}
    if summary := summarise_safety(before):
        columns = {"before SFT": summary["measures"], **columns}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in ROWS:
        cells = [cell(column.get(name)) for column in columns.values()]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    seeds = {arm: ", ".join(str(record["seed"]) for record in runs[arm]) for arm in arms}
    minutes = sum(record["wall_seconds"] for record in everything) / 60 / len(everything)
    words = "; ".join(f"{ARMS[arm][0]}: seeds {seeds[arm]}" for arm in arms)
    some = everything[0]
    origin = (
        f"{words}. {minutes:.0f} min a run on {some['machine']}, version {some['version']}. Costs:"
        f" `{next(record['safety_cost'] for record in runs.get('on', [some]))}`."
    )
    picture = "![Attacks, edited checks and utility by step](images/safety_curve.png)"
    table = "\n".join(lines)
    return f"{picture}\n\n{table}\n\n{origin}"


def cell(one: dict[str, Any] | None) -> str:
    """Return a share in percent with its 95 % interval and the number of tasks; "" for none."""
    if one is None:
        return ""
    value, low, high = (round(100 * one[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high}) of {one['n']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep runs, or draw those that are kept."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures.safety_curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--collect", nargs="+", type=pathlib.Path, metavar="WORKDIR", default=[])
    parser.add_argument("--before", type=pathlib.Path, metavar="WORKDIR", help="of the SFT")
    parser.add_argument("--machine", default=platform.platform(), help="where the runs were made")
    options = parser.parse_args(arguments)
    for workdir in options.collect:
        record = read_run(workdir, options.machine)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{record['arm']}_seed{record['seed']}.json"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(path)
    if options.before:
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = read_evaluation(options.before, "safety_sft", 0)
        BEFORE.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(BEFORE)
    if options.collect or options.before:
        return 0
    runs = load_runs(RESULTS)
    if not runs:
        print(f"no run is recorded in {RESULTS}; --collect WORKDIR keeps some")
        return 1
    draw(runs)
    page = PAGE.read_text(encoding="utf-8")
    before = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.exists() else []
    PAGE.write_text(insert(page, section(runs, before), BEGIN, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
