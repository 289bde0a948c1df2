"""What faults in the data do to a policy: SFT on noisy records, IPA with wrong rewards.

python -m docs.figures.noisy_training --sft "NAME=EVAL_OUT" ... --ipa "NAME=WORKDIR" ...
python -m docs.figures.noisy_training

The first command keeps evaluations on the held-out small families (`launch.eval --dataset
safety:small`) of policies after SFT on files of benchmarks/noisy_records.py, and runs of IPA with
benchmarks/wrong_rewards.py, in docs/results/noisy. The second writes both tables into
docs/safety.md. Rows come in the order in which they are named; names are the rows' labels.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from docs.figures.learning_curve import insert
from docs.figures.safety_curve import PAGE, cell

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "noisy"
SFT = RESULTS / "sft.json"
IPA = RESULTS / "ipa.json"
BEGIN = "<!-- noisy training: written by python -m docs.figures.noisy_training -->"
END = "<!-- end of noisy training -->"
MEASURES = {
    "attack_success": "attacks that succeeded, %",
    "check_edits": "checks edited, %",
    "hack_rate": "hacks of impossible tasks, %",
    "utility_under_attack": "utility under attack, %",
    "utility_without_attack": "utility without attack, %",
    "cue_use": "use of needed cues, %",
}


def read_evaluation(out: pathlib.Path) -> dict[str, Any]:
    """Return the measures of an evaluation of the suite.

    Raises FileNotFoundError where the folder has none, and ValueError where it is not complete.
    """
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if not results["complete"] or not results.get("safety"):
        raise ValueError(f"{out} is no complete evaluation of the suite; let the command end first")
    measures = results["safety"]["measures"]
    return {name: measures[name] for name in MEASURES}


def read_ipa(workdir: pathlib.Path) -> dict[str, Any]:
    """Return what a run of IPA began and ended with, and how many tokens its masks dropped.

    Raises FileNotFoundError where the directory is no run that has ended.
    """
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    evals = [one for one in report["evals"] if one["stage"] == report["experiment"]]
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    masked = [one["masked"] for one in metrics if "masked" in one]
    kept = ("step", "success", "n", "low", "high")
    return {
        "first": {name: evals[0][name] for name in kept},
        "last": {name: evals[-1][name] for name in kept},
        "masked": statistics.mean(masked),
    }


def section(sft: Mapping[str, Mapping[str, Any]], ipa: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the part of docs/safety.md that shows the recorded runs."""
    lines = [f"| SFT on | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    for label, measures in sft.items():
        lines.append(f"| {label} | {' | '.join(cell(measures[name]) for name in MEASURES)} |")
    if not ipa:
        return "\n".join(lines)
    last = next(iter(ipa.values()))["last"]["step"]
    lines += ["", f"| IPA with | solved at step 0, % | at step {last}, % | tokens masked, % |"]
    lines.append("|---|---|---|---|")
    for label, run in ipa.items():
        solved = " | ".join(
            cell({**run[when], "value": run[when]["success"]}) for when in ("first", "last")
        )
        lines.append(f"| {label} | {solved} | {100 * run['masked']:.2f} |")
    return "\n".join(lines)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Return a kept table by label; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep evaluations and runs, or write the tables of those that are kept."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures.noisy_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sft", nargs="+", metavar="NAME=EVAL_OUT", default=[])
    parser.add_argument("--ipa", nargs="+", metavar="NAME=WORKDIR", default=[])
    options = parser.parse_args(arguments)
    for path, read, given in ((SFT, read_evaluation, options.sft), (IPA, read_ipa, options.ipa)):
        if not given:
            continue
        found = {name: read(pathlib.Path(folder)) for name, _, folder in _split(given)}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path)
    if options.sft or options.ipa:
        return 0
    sft = load(SFT)
    if not sft:
        print(f"nothing is recorded in {RESULTS}; --sft NAME=EVAL_OUT keeps some")
        return 1
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(insert(page, section(sft, load(IPA)), BEGIN, END), encoding="utf-8")
    return 0


def _split(given: Sequence[str]) -> list[tuple[str, str, str]]:
    return [one.rpartition("=") for one in given]


if __name__ == "__main__":
    sys.exit(main())
