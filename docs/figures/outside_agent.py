"""The run that trains the tiny policy behind an outside agent: success by step (docs/agents.md).

python -m docs.figures.outside_agent                                         # draw
python -m docs.figures.outside_agent WORKDIR --machine="2 cores, shared"     # keep a run and draw

It draws docs/images/outside_agent.png of docs/results/outside_agent.json, which the second form
makes of a finished run: its evaluations, and of each step the share of episodes that succeeded and
its seconds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from docs.figures.collect import read_run
from docs.figures.style import BLUE, INK, MUTED, new_figure, save
from rome.train.intervals import wilson

RUN = pathlib.Path(__file__).parent.parent / "results" / "outside_agent.json"
WINDOW = 5  # steps of the moving mean


def read(workdir: pathlib.Path, machine: str) -> dict[str, Any]:
    """Return the record of a finished run with its steps.

    Raises FileNotFoundError where the directory has no report.json, and ValueError where the run
    has not reached its last step.
    """
    record = read_run(workdir, machine)
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    record["training"] = [
        {
            "step": one["step"],
            "success": one["success"],
            "seconds": round(one["seconds_collect"] + one["seconds_update"], 2),
        }
        for one in steps
        if "seconds_update" in one
    ]
    return record


def draw(record: dict[str, Any]) -> pathlib.Path:
    """Draw held-out and training success by step and return the picture's path."""
    figure, axes = new_figure(8.0, 3.4)
    training = record["training"]
    steps = np.array([one["step"] for one in training])
    success = 100 * np.array([one["success"] for one in training])
    axes.plot(steps, success, ".", color=MUTED, alpha=0.5, markersize=4)
    if len(success) >= WINDOW:
        means = np.convolve(success, np.ones(WINDOW) / WINDOW, mode="valid")
        label = f"episodes that it trains on (mean of {WINDOW} steps)"
        axes.plot(steps[WINDOW - 1 :], means, "--", color=MUTED, linewidth=1.4, label=label)
    evals = record["evals"]
    at = [one["step"] for one in evals]
    rates = np.array([one["successes"] / one["n"] for one in evals])
    bounds_2N = np.array([wilson(one["successes"], one["n"]) for one in evals]).T
    errors_2N = 100 * np.abs(bounds_2N - rates)
    axes.errorbar(
        at,
        100 * rates,
        yerr=errors_2N,
        fmt="-o",
        color=BLUE,
        linewidth=2.2,
        markersize=5,
        capsize=3,
        label=f"{evals[0]['n']} held-out tasks (95 % intervals)",
    )
    axes.set_xlabel("reinforcement learning step")
    axes.set_ylabel("tasks solved, %")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_title("IPA behind an outside agent", color=INK)
    axes.legend(loc="lower right")
    return save(figure, "outside_agent.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the kept run, or keep another one first."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.outside_agent")
    parser.add_argument("workdir", nargs="?", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--machine", default="", help="where the run was made")
    options = parser.parse_args(arguments)
    if options.workdir is not None:
        record = read(options.workdir, options.machine)
        RUN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not RUN.exists():
        print(f"no run is kept in {RUN}; give the WORKDIR of one")
        return 1
    draw(json.loads(RUN.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
