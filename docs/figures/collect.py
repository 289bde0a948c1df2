"""Keep what the documentation shows of training runs, as small JSON files in docs/results/runs.

python -m docs.figures.collect runs/ipa0 runs/ipa1 --machine="2 cores of an AMD EPYC, shared"

Each WORKDIR becomes docs/results/runs/LOSS_seedN.json: evaluations by step with successes and
tasks, the evaluation that the stage started from, seconds, command, commit, date and machine.
Runs of other presets belong into folders of their own (--out=docs/results/games).
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

from rome.version import describe

RUNS = pathlib.Path(__file__).parent.parent / "results" / "runs"


def read_run(workdir: pathlib.Path, machine: str, commit: str = "") -> dict[str, Any]:
    """Return the record of a finished run.

    The commit is the one that the run's report names; `commit` replaces it.

    Raises FileNotFoundError where the directory has no report.json, and ValueError where the run
    has not reached its last step.
    """
    path = workdir / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    stage = report["evals"][-1]["stage"]
    evals = [_counts(entry) for entry in report["evals"] if entry["stage"] == stage]
    start = [_counts(entry) for entry in report["evals"] if entry["stage"] != stage]
    if evals[-1]["step"] != report["steps"]:
        raise ValueError(
            f"{workdir} was evaluated last at step {evals[-1]['step']} of {report['steps']}; let"
            " the run end first"
        )
    finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return {
        "experiment": report["experiment"],
        "preset": report["preset"],
        "loss": report["loss"],
        "seed": report["seed"],
        "steps": report["steps"],
        "evals": evals,
        "start": start[-1] if start else None,
        "wall_seconds": report["wall_seconds"],
        "start_wall_seconds": _start_seconds(workdir),
        "isolation": report["isolation"],
        "command": command_of(report),
        "commit": commit or report.get("version") or describe(),
        "date": finished.date().isoformat(),
        "machine": machine,
    }


def _counts(entry: dict[str, Any]) -> dict[str, Any]:
    families = entry["by_family"].values()
    unseen = entry["unseen_by_family"].values()
    return {
        "stage": entry["stage"],
        "step": entry["step"],
        "successes": round(entry["success"] * entry["n"]),
        "n": entry["n"],
        "families": len(families),
        "by_family": {name: [round(rate * n), n] for name, (rate, n) in entry["by_family"].items()},
        "unseen_successes": round(sum(rate * n for rate, n in unseen)),
        "unseen_n": sum(n for _, n in unseen),
    }


def _start_seconds(workdir: pathlib.Path) -> float | None:
    """Return the seconds of the stage before this one, where it ran in the same workdir."""
    path = workdir / "init" / "report.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["wall_seconds"]


def command_of(report: dict[str, Any]) -> str:
    """Return the command that repeats the run."""
    preset = "" if report["preset"] == "tiny" else f":{report['preset']}"
    command = f"python -m launch.train --config=experiments/{report['experiment']}.py{preset}"
    if report["loss"] != report["experiment"]:
        command += f" --config.loss={report['loss']}"
    return f"{command} --config.seed={report['seed']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a record for each workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--machine", default=platform.platform(), help="where the runs were made")
    parser.add_argument("--commit", default="", help="default: what their reports name")
    parser.add_argument("--out", type=pathlib.Path, default=RUNS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for workdir in options.workdirs:
        record = read_run(workdir, options.machine, options.commit)
        path = options.out / f"{record['loss']}_seed{record['seed']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
