"""What reinforcement learning adds to SFT on text games, with seeds and intervals.

python -m docs.figures.games_curve

It draws docs/images/games_curve.png and writes the table of the runs into docs/results.md. The runs
are the files of docs/results/games:

python -m docs.figures.collect RUN... --out=docs/results/games
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from docs.figures import learning_curve
from docs.figures.learning_curve import PAGE, insert, load_runs, origin
from docs.figures.style import BLUE, MUTED, new_figure, save
from rome.train.intervals import wilson

RUNS = PAGE.parent / "results" / "games"
BEGIN = "<!-- games: written by python -m docs.figures.games_curve -->"
END = "<!-- end of games -->"
GAMES = {"game/frozen_lake-bare": "FrozenLake", "game/sokoban-bare": "Sokoban"}
Counts = dict[str, list[int]]  # family -> [solved, boards]
# Success of uniformly random moves, of 1,000 boards each; the slow test of
# tests/envs/games/test_bare.py plays 5,000
RANDOM = {"game/frozen_lake-bare": 0.23, "game/sokoban-bare": 0.02}


def rate_of(by_family: Counts, game: str) -> tuple[int, int]:
    """Return successes and boards of a game in an evaluation."""
    (counts,) = [counts for name, counts in by_family.items() if name.rpartition("#")[2] == game]
    return counts[0], counts[1]


def draw_game(axes: Axes, records: Sequence[dict[str, Any]], game: str) -> None:
    """Draw the seeds of a game, their mean, and the 95 % interval of all their boards together."""
    steps = [entry["step"] for entry in records[0]["evals"]]
    counts_SN2 = np.array(
        [[rate_of(e["by_family"], game) for e in record["evals"]] for record in records]
    )
    rates_SN = counts_SN2[..., 0] / counts_SN2[..., 1]
    for rates_N in rates_SN:
        axes.plot(steps, 100 * rates_N, color=BLUE, linewidth=0.9, alpha=0.6)
    intervals_N2 = np.array([wilson(int(won), int(n)) for won, n in counts_SN2.sum(axis=0)])
    low_N, high_N = 100 * intervals_N2.T
    axes.fill_between(steps, low_N, high_N, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(steps, 100 * rates_SN.mean(axis=0), color=BLUE, linewidth=2.4, marker="o", ms=4)
    axes.axhline(100 * RANDOM[game], color=MUTED, linestyle=":", linewidth=1.2)
    axes.text(steps[-1], 100 * RANDOM[game] + 1, "random moves", color=MUTED, ha="right")
    axes.set_title(GAMES[game])
    axes.set_xticks(steps)
    axes.set_xlabel("reinforcement learning step")


def draw(records: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Draw both games and return the picture's path."""
    figure, panels = new_figure(8.0, 3.4, ncols=len(GAMES), sharey=True)
    for axes, game in zip(panels, GAMES, strict=True):
        draw_game(axes, records, game)
    panels[0].set_ylabel("held-out boards solved, %")
    panels[0].set_ylim(0, 100)
    return save(figure, "games_curve.png")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of the runs: each game before and after, gain, time, command."""
    head = " | ".join(f"{title}, SFT | after IPA | gain" for title in GAMES.values())
    lines = [f"| run | {head} | minutes |", "|---|" + "---|" * (3 * len(GAMES) + 1)]
    for record in records:
        seconds = record["wall_seconds"] + (record["start_wall_seconds"] or 0)
        lines.append(f"| seed {record['seed']} | {_cells([_ends(record)])} | {seconds / 60:.0f} |")
    if len(records) > 1:
        lines.append(f"| all seeds | {_cells([_ends(record) for record in records])} | |")
    if all("new_boards" in record for record in records):  # of docs/figures/games_boards.py
        new = [tuple(record["new_boards"].values()) for record in records]
        cells = _cells([(counts[0], counts[-1]) for counts in new])
        lines.append(f"| all seeds, boards never trained on | {cells} | |")
    lines.append("")
    lines += [origin(record) for record in records]
    return "\n".join(lines)


def _ends(record: dict[str, Any]) -> tuple[Counts, Counts]:
    """Return the counts of a run's first and last evaluation."""
    return record["evals"][0]["by_family"], record["evals"][-1]["by_family"]


def _cells(pairs: Sequence[tuple[Counts, Counts]]) -> str:
    """Return the cells of some runs' (first, last) counts, taken together."""
    cells = []
    for game in GAMES:
        rates = []
        for by_family in zip(*pairs, strict=True):
            counts = [rate_of(one, game) for one in by_family]
            won = sum(count[0] for count in counts)
            boards = sum(count[1] for count in counts)
            low, high = wilson(won, boards)
            rates.append(won / boards)
            cells.append(f"{100 * won / boards:.0f} % ({100 * low:.0f} to {100 * high:.0f})")
        cells.append(f"{100 * (rates[1] - rates[0]):+.0f}")
    return " | ".join(cells)


def section(records: Sequence[dict[str, Any]]) -> str:
    """Return the part of docs/results.md that shows the recorded runs."""
    if not records:
        return "No run has been recorded yet."
    words = (
        "*Thin lines are seeds, the thick line their mean, the band the 95 % interval (Wilson) of"
        " all seeds' boards together. Held-out boards at temperature 1.*"
    )
    picture = "![Held-out success on FrozenLake and Sokoban by step](images/games_curve.png)"
    return f"{picture}\n\n{words}\n\n{table(records)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture and write the table into the page of results."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.games_curve")
    parser.add_argument("--runs", type=pathlib.Path, default=RUNS, help="folder of the records")
    options = parser.parse_args(arguments)
    records = load_runs(options.runs).get("ipa", [])
    if not records:
        print(f"no run is recorded in {options.runs}; python -m docs.figures.collect makes them")
        return 1
    draw(records)
    page = learning_curve.PAGE.read_text(encoding="utf-8")
    text = insert(page, section(records), BEGIN, END)
    learning_curve.PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
