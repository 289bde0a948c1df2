"""Bars of measured speed for the page of benchmarks.

python -m docs.figures.speed    # train_speed.png, sandbox_speed.png and rollout_speedup.png

The numbers are in docs/results/benchmarks, each file with its command, commit, date and machine.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from docs.figures.style import BLUE, GRAY, INK, MUTED, ORANGE, new_figure, save

NUMBERS = pathlib.Path(__file__).parent.parent / "results" / "benchmarks"


def load(name: str) -> dict[str, Any]:
    """Return the record of a benchmark."""
    return json.loads((NUMBERS / f"{name}.json").read_text(encoding="utf-8"))


def write_source(axes: Axes, record: dict[str, Any]) -> None:
    """Write command, commit, date and machine under the picture."""
    axes.annotate(
        f"{record['command']}\ncommit {record['commit']}, {record['date']}, {record['machine']}",
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(0, -24),
        textcoords="offset points",
        fontsize=7,
        color=MUTED,
        va="top",
    )


def draw_train_speed() -> None:
    """Draw tokens per second of the update beside transformers."""
    record = load("train_step")
    figure, axes = new_figure(8.0, 3.0)
    rows = record["rows"]
    places = np.arange(len(rows))
    ours = [row["tokens_per_s"] for row in rows]
    rivals = [row["rival_tokens_per_s"] for row in rows]
    axes.bar(places - 0.2, ours, 0.38, color=BLUE, label="this repository")
    axes.bar(places + 0.2, rivals, 0.38, color=GRAY, label="transformers on torch")
    for place, row in zip(places, rows, strict=True):
        axes.text(
            place - 0.2,
            row["tokens_per_s"] + 120,
            f"{row['ratio']:.2f}\u00d7",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=BLUE,
        )
    axes.set_xticks(places, [f"{row['name']}, {row['precision']}" for row in rows])
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 9000)
    axes.set_title("A whole update on two CPU cores")
    axes.grid(axis="x", visible=False)
    axes.legend()
    write_source(axes, record)
    save(figure, "train_speed.png")


def draw_sandbox_speed() -> None:
    """Draw the time to the first output of a new sandbox."""
    record = load("sandbox")
    figure, axes = new_figure(8.0, 2.7)
    rows = record["rows"][::-1]
    places = np.arange(len(rows))
    times = [row["first_output_ms"] for row in rows]
    colours = [BLUE if row["ours"] else GRAY for row in rows]
    axes.barh(places, times, 0.62, color=colours)
    for place, milliseconds in zip(places, times, strict=True):
        axes.text(
            milliseconds * 1.06, place, f"{milliseconds:,} ms", va="center", fontsize=9, color=INK
        )
    axes.set_xscale("log")
    axes.set_xlim(8, 5000)
    axes.set_yticks(places, [row["name"] for row in rows], color=INK)
    axes.grid(axis="y", visible=False)
    axes.set_title("From nothing to the first output of a command (log scale)")
    write_source(axes, record)
    save(figure, "sandbox_speed.png")


def draw_rollout_speedup() -> None:
    """Draw the speed-up over synchronous training beside the simulator's prediction."""
    record = load("rollout")
    figure, axes = new_figure(8.0, 3.4)
    rows = record["rows"][::-1]
    places = np.arange(len(rows))
    axes.barh(places, [row["speedup"] for row in rows], 0.6, color=BLUE, label="measured")
    axes.plot(
        [row["predicted"] for row in rows],
        places,
        "D",
        color=ORANGE,
        markersize=5,
        label="predicted by the simulator",
    )
    axes.axvline(record["bound"], color=MUTED, linestyle="--", linewidth=1)
    axes.text(record["bound"] + 0.04, len(rows) - 0.7, "bound", color=MUTED, fontsize=8.5)
    axes.axvline(1, color=INK, linewidth=0.8)
    labels = []
    for row in rows:
        extra = f", {row['redundancy']} redundant" if row["redundancy"] else ""
        labels.append(f"alpha {row['alpha']}, {row['unit']}, {row['stale_samples']}{extra}")
    axes.set_yticks(places, labels, color=INK)
    axes.set_xlim(0, 5.6)
    axes.grid(axis="y", visible=False)
    axes.set_title("Steps per second, as a multiple of synchronous training")
    axes.legend(loc="center right", fontsize=8.5, bbox_to_anchor=(1.0, 0.62))
    write_source(axes, record)
    save(figure, "rollout_speedup.png")


def draw() -> None:
    """Draw all three pictures."""
    draw_train_speed()
    draw_sandbox_speed()
    draw_rollout_speedup()


if __name__ == "__main__":
    draw()
