r"""Compare several seeds of one experiment: does training help on each, does any family get worse.

python -m benchmarks.seeds runs/seed0 runs/seed1 runs/seed2 --json seeds.json

Reads each run's report.json and evals/, compares the first with the last evaluation of the stage
trained last. By family, the same task before and after makes a pair (pooled over seeds); the pairs
that changed are tested by McNemar's exact test, two-sided, and Holm's method corrects over the
families. Success is in percent, gains are in points.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rome.files import write_atomically
from rome.train.report import before_and_after, read_outcomes, read_report

LEVEL = 0.05
MIN_PAIRS = 50  # fewer in a family say little: a loss of ten points would pass unseen


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided exact p-value of McNemar's test.

    Args:
      better: pairs that went from failure to success.
      worse: pairs that went from success to failure. Unchanged pairs do not count.
    """
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**changed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given.

    Those below a level have together no more than that chance of a false alarm.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    by_size = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(by_size):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def read_run(directory: pathlib.Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the run's gain, and a pair for each task of its first and last evaluation.

    Raises ValueError where the run has one evaluation only, or the two have other tasks.
    """
    report = read_report(directory)
    before, after = before_and_after(report["evals"])
    if before.step == after.step:
        raise ValueError(
            f"{directory} has one evaluation of stage {after.stage} only (step {after.step}); let"
            " the run end first"
        )
    first = {
        task["task"]: task for task in read_outcomes(directory, before.stage, before.step)["tasks"]
    }
    last = {
        task["task"]: task for task in read_outcomes(directory, after.stage, after.step)["tasks"]
    }
    if first.keys() != last.keys():
        odd = sorted(first.keys() ^ last.keys())
        raise ValueError(
            f"{directory}: {len(odd)} tasks stand in only one of its two evaluations ({odd[0]},"
            " ...); pairs need the same tasks in both"
        )
    pairs = [
        {
            "family": task["family"],
            "unseen_family": bool(task["unseen_family"]),
            "before": int(first[name]["success"]),
            "after": int(task["success"]),
        }
        for name, task in last.items()
    ]
    seen = [pair for pair in pairs if not pair["unseen_family"]]
    start, end = _percent(seen, "before"), _percent(seen, "after")
    return {
        "run": str(directory),
        "seed": report["seed"],
        "stage": after.stage,
        "before": start,
        "after": end,
        "gain": end - start,
        "n": len(seen),
    }, pairs


def compare(directories: Iterable[pathlib.Path | str]) -> dict[str, Any]:
    """Return what --json writes: gains by seed, and tests by family with p and p_holm."""
    runs = [read_run(directory) for directory in directories]
    seeds = [seed for seed, _ in runs]
    numbers = [seed["seed"] for seed in seeds]
    if len(set(numbers)) != len(numbers):
        raise ValueError(
            f"the runs have the seeds {numbers}; the same seed twice adds no evidence: give one run"
            " of each seed"
        )
    pairs = [pair for _, run_pairs in runs for pair in run_pairs]
    families = []
    for unseen, name in sorted({(pair["unseen_family"], pair["family"]) for pair in pairs}):
        own = [pair for pair in pairs if pair["family"] == name and pair["unseen_family"] == unseen]
        better = sum(pair["after"] > pair["before"] for pair in own)
        worse = sum(pair["after"] < pair["before"] for pair in own)
        families.append(
            {
                "family": name,
                "unseen_family": unseen,
                "pairs": len(own),
                "before": _percent(own, "before"),
                "after": _percent(own, "after"),
                "better": better,
                "worse": worse,
                "p": mcnemar(better, worse),
            }
        )
    for family, adjusted in zip(families, holm([family["p"] for family in families]), strict=True):
        family["p_holm"] = adjusted
        family["significantly_worse"] = family["worse"] > family["better"] and adjusted < LEVEL
    return {
        "seeds": seeds,
        "families": families,
        "smallest_gain": min(seed["gain"] for seed in seeds),
        "significantly_worse": [
            family["family"] for family in families if family["significantly_worse"]
        ],
        "too_few_pairs": [family["family"] for family in families if family["pairs"] < MIN_PAIRS],
    }


def print_comparison(result: dict[str, Any], console: Console) -> None:
    """Print the two tables and the verdicts."""
    seeds = Table(title="Held-out success by seed, %", title_justify="left", title_style="bold")
    for name in ("run", "seed", "before", "after", "gain"):
        seeds.add_column(name, justify="left" if name == "run" else "right")
    for seed in result["seeds"]:
        seeds.add_row(
            seed["run"],
            str(seed["seed"]),
            f"{seed['before']:.1f}",
            f"{seed['after']:.1f}",
            f"{seed['gain']:+.1f}",
        )
    console.print(seeds)
    title = f"By family, pooled over {len(result['seeds'])} seeds (* unseen in training)"
    families = Table(title=title, title_justify="left", title_style="bold")
    for name in ("family", "pairs", "before", "after", "better", "worse", "p (Holm)"):
        families.add_column(name, justify="left" if name == "family" else "right")
    for family in result["families"]:
        families.add_row(
            family["family"] + "*" * family["unseen_family"],
            str(family["pairs"]),
            f"{family['before']:.0f}",
            f"{family['after']:.0f}",
            str(family["better"]),
            str(family["worse"]),
            f"{family['p_holm']:.2g}",
            style="red" if family["significantly_worse"] else None,
        )
    console.print(families)
    say = functools.partial(console.print, soft_wrap=True)
    say(f"Smallest gain of a seed: {result['smallest_gain']:+.1f} points.")
    worse = result["significantly_worse"]
    say(
        f"Significantly worse: {', '.join(worse)}."
        if worse
        else f"No family is significantly worse (Holm-corrected p below {LEVEL})."
    )
    if result["too_few_pairs"]:
        say(f"Too few tasks to tell (under {MIN_PAIRS}): {', '.join(result['too_few_pairs'])}.")


def _percent(pairs: Sequence[dict[str, Any]], when: str) -> float:
    return 100 * sum(pair[when] for pair in pairs) / len(pairs) if pairs else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds",
        description="Compares several seeds of one experiment, before and after.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run's workdir")
    parser.add_argument("--json", metavar="FILE", help="write the comparison here")
    options = parser.parse_args(arguments)
    try:
        result = compare(options.runs)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print_comparison(result, Console(highlight=False))
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
