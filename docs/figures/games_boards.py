"""Count success on held-out boards that no training episode began with.

python -m docs.figures.games_boards RUN... --before=SFT_RUN

Other seeds of a game may make the same board: about half of the held-out Sokoban rooms are the room
of some training task, too. This adds to the record of each run in docs/results/games what the
policy solved of the others, at each evaluation; docs/figures/games_curve.py shows it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from docs.figures.games_curve import RUNS
from envs.sources import open_source


def trained_boards(workdirs: Sequence[pathlib.Path]) -> set[str]:
    """Return the first observations of all training episodes and demonstrations of some runs."""
    boards = set()
    for workdir in workdirs:
        for path in (workdir / "trajectories").glob("*.json"):
            boards.add(json.loads(path.read_text(encoding="utf-8"))["steps"][0]["message"])
    return boards


def count_new(workdir: pathlib.Path, trained: set[str]) -> dict[str, dict[str, list[int]]]:
    """Return step -> {family: [solved, boards]} of the held-out boards that are not trained on."""
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    source = open_source(config["task"], seed=report["seed"])
    counts: dict[str, dict[str, list[int]]] = {}
    for folder in sorted((workdir / "evals").glob(f"{report['experiment']}_*/")):
        of_step: dict[str, list[int]] = {}
        for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if source.task(record["task"]).content.opening in trained:
                continue
            solved_and_boards = of_step.setdefault(record["family"], [0, 0])
            solved_and_boards[0] += int(record["success"])
            solved_and_boards[1] += 1
        counts[str(int(folder.name.rpartition("_")[2]))] = of_step
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Add the counts to the records of the runs."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.games_boards")
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--before", type=pathlib.Path, help="the SFT run that they started from")
    options = parser.parse_args(arguments)
    for workdir in options.workdirs:
        before = options.before or workdir / "init"
        seed = json.loads((workdir / "report.json").read_text(encoding="utf-8"))["seed"]
        path = RUNS / f"ipa_seed{seed}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["new_boards"] = count_new(workdir, trained_boards([workdir, before]))
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(path, record["new_boards"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
