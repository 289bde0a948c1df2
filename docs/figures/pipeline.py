"""What each stage of the whole pipeline added: docs/images/pipeline.png and a table.

python -m docs.figures.pipeline                                   # draws what is recorded
python -m docs.figures.pipeline runs/rome0 --machine="2 cores"    # records a run first

A record is docs/results/pipeline/seedN.json: the table `stages` of report.json, and successes and
tasks of each evaluation. The table is written into docs/pipeline.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

from docs.figures.learning_curve import insert
from docs.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, new_figure, save
from rome.train.intervals import wilson
from rome.version import describe

PAGE = pathlib.Path(__file__).parent.parent / "pipeline.md"
RUNS = pathlib.Path(__file__).parent.parent / "results" / "pipeline"
BEGIN = "<!-- runs: written by python -m docs.figures.pipeline -->"
END = "<!-- end of runs -->"
NAMES = {"cpt": "CPT", "sft_stage1": "SFT 1", "sft_stage2": "SFT 2", "rome": "IPA"}
PLAYING = ("sft_stage1", "sft_stage2", "rome")
COLOURS = (BLUE, ORANGE, GREEN)


def read_run(workdir: pathlib.Path, machine: str) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
      workdir: of the whole pipeline.
      machine: where it ran, in words.

    Raises:
      ValueError: its report has no table of stages, so it did not end.
    """
    path = workdir / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    if len(report.get("stages", ())) < len(NAMES):
        raise ValueError(f"{path} has no table of all stages; let the same command end first")
    finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return {
        "seed": report["seed"],
        "stages": report["stages"],
        "evals": [
            {
                "stage": entry["stage"],
                "step": entry["step"],
                "successes": round(entry["success"] * entry["n"]),
                "n": entry["n"],
            }
            for entry in report["evals"]
            if "success" in entry
        ],
        "commit": report.get("version") or describe(),
        "date": finished.date().isoformat(),
        "machine": machine,
    }


def load_runs(folder: pathlib.Path = RUNS) -> list[dict[str, Any]]:
    """Return the records in a folder, in the order of their seeds."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def draw(runs: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Draw held-out success through the stages, a line for each seed; return the picture's path."""
    figure, axes = new_figure(8.0, 3.7)
    for run, colour in zip(runs, COLOURS, strict=False):
        steps = {entry["stage"]: entry["steps"] for entry in run["stages"]}
        evals = [entry for entry in run["evals"] if entry["stage"] in PLAYING]
        places = [
            PLAYING.index(entry["stage"]) + entry["step"] / steps[entry["stage"]] for entry in evals
        ]
        rates = [100 * entry["successes"] / entry["n"] for entry in evals]
        bounds = [wilson(entry["successes"], entry["n"]) for entry in evals]
        below = [rate - 100 * low for rate, (low, _) in zip(rates, bounds, strict=True)]
        above = [100 * high - rate for rate, (_, high) in zip(rates, bounds, strict=True)]
        label = f"seed {run['seed']}"
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 2, "capsize": 2}
        axes.errorbar(places, rates, yerr=(below, above), label=label, **style)
    names = [NAMES[stage] for stage in PLAYING]
    axes.set_xticks([place + 0.5 for place in range(len(names))], names)
    axes.tick_params(axis="x", length=0)
    for place in range(1, len(names)):
        axes.axvline(place, color=MUTED, linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.03, len(names) + 0.03)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("held-out tasks solved, %")
    tasks = runs[0]["evals"][0]["n"]
    axes.set_title(f"Held-out success through the stages after CPT, {tasks} tasks", color=INK)
    axes.legend(loc="upper left")
    return save(figure, "pipeline.png")


def section(runs: Sequence[dict[str, Any]]) -> str:
    """Return the part of docs/pipeline.md that shows the recorded runs."""
    if not runs:
        return "No whole run of the tiny preset has been recorded yet."
    lines = [
        "![Held-out success through the stages](images/pipeline.png)",
        "",
        "*Held-out tasks at temperature 1; bars and parentheses are 95 % intervals (Wilson's, of"
        " differences Newcombe's). A stage's width says nothing about its time.*",
        "",
        "| seed | stage | steps | minutes | solved after it | added, points | bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines += [_row(run["seed"], entry) for entry in run["stages"]]
    lines.append("")
    for run in runs:
        minutes = sum(entry["seconds"] for entry in run["stages"]) / 60
        lines.append(
            "- `make train CONFIG=experiments/rome.py"
            f' ARGS="--config.seed={run["seed"]}"`: {minutes:.0f} minutes, commit'
            f" {run['commit']}, {run['date']}, {run['machine']}."
        )
    return "\n".join(lines)


def _row(seed: int, entry: dict[str, Any]) -> str:
    after, added = entry["after"], entry["added"]
    solved = gained = bits = ""
    if after is not None:
        solved = f"{_percent(after['success'])} % ({_range(after)})"
    if added is not None:
        gained = f"{100 * added['points']:+.0f} ({_range(added)})"
    if entry["bits_after"] is not None:
        bits = f"{entry['bits_before']:.2f} to {entry['bits_after']:.2f} a {entry['bits_of']}"
    name = NAMES.get(entry["stage"], entry["stage"])
    minutes = f"{entry['seconds'] / 60:.1f}"
    return f"| {seed} | {name} | {entry['steps']} | {minutes} | {solved} | {gained} | {bits} |"


def _range(bounds: dict[str, Any]) -> str:
    return f"{_percent(bounds['low'])} to {_percent(bounds['high'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the runs that are named, draw the picture and write the table into the page."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.pipeline")
    parser.add_argument("workdirs", nargs="*", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--machine", default=platform.platform(), help="where the runs were made")
    options = parser.parse_args(arguments)
    RUNS.mkdir(parents=True, exist_ok=True)
    for workdir in options.workdirs:
        record = read_run(workdir, options.machine)
        path = RUNS / f"seed{record['seed']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    runs = load_runs()
    if runs:
        draw(runs)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(insert(page, section(runs), BEGIN, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
