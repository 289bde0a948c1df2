r"""Predicts a pod's rollouts before it is rented: throughput, idle time and staleness by
async_ratio, beside the bound.

python -m launch.simulate                                        # 64 episodes of 8 turns, latency lognormal (mean 1 s, sigma 1)
python -m launch.simulate --late=drop --async_ratio=0,1,2,4      # what dropping late samples would bring, and cost
python -m launch.simulate --latencies=FILE --set engines=4 --set slots=128 --set token_s=0.02 --set concurrency=512 --set groups_per_step=64 --set train_s=90

FILE has recorded seconds of environment turns, one a line. The fields of --set are those of
rome.rollout.simulator.simulate.Plan; turns, tokens, prompt_tokens and latency take NUMBER, or
MEAN:SIGMA for a lognormal. A train step takes a quarter of the synchronous rollout unless train_s
is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

from rome.rollout.simulator.simulate import (
    Constant,
    Distribution,
    Lognormal,
    Plan,
    Recorded,
    agentic,
    speedup,
    with_train_share,
)

TRAIN_SHARE = 0.25


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launch.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--async_ratio", default="0,1,2,4", help="comma-separated")
    parser.add_argument(
        "--late",
        default="wait",
        help="wait, keep or drop: what happens to samples beyond the bound",
    )
    parser.add_argument("--latencies", type=pathlib.Path, help="recorded seconds, one a line")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    flags = parser.parse_args(argv)
    try:
        plan = planned(flags.changes, flags.latencies, flags.late, flags.seed)
        rows = [
            speedup(
                dataclasses.replace(plan, async_ratio=int(ratio)),
                steps=flags.steps,
                seed=flags.seed,
            )
            for ratio in flags.async_ratio.split(",")
        ]
    except (ValueError, OSError) as error:
        print(f"launch.simulate: {error}", file=sys.stderr)
        return 1
    print(f"train step {plan.train_s:.2f} s; bound of the speedup {rows[0].bound:.2f}")
    print(
        "async_ratio  s/step  trajectories/s  speedup  trainer waits  engines idle  open  short"
        " bias  staleness: trajectories"
    )
    for ratio, row in zip(flags.async_ratio.split(","), rows):
        found = row.asynchronous
        print(
            f"{ratio:>11}  {found.step_seconds:6.2f}  {found.trajectories_per_s:14.2f} "
            f" {row.predicted:7.2f}  {found.trainer_wait:13.0%}  {found.engine_idle:12.0%} "
            f" {found.open_episodes:4.0f}  {found.short_bias:10.1%}  {found.staleness}"
            f" {found.dropped or ''}"
        )
    if flags.json:
        flags.json.write_text(
            json.dumps(
                [
                    {
                        "async_ratio": int(ratio),
                        "speedup": row.predicted,
                        "bound": row.bound,
                        **dataclasses.asdict(row.asynchronous),
                    }
                    for ratio, row in zip(flags.async_ratio.split(","), rows)
                ],
                indent=1,
            )
        )
    return 0


def planned(changes: list[str], latencies: pathlib.Path | None, late: str, seed: int) -> Plan:
    """The agentic setting with these changes. Raises ValueError naming what is wrong."""
    kinds = {field.name: field.type for field in dataclasses.fields(Plan)}
    values: dict[str, object] = {"late": late}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {change}: a plan has no {name!r}; it has {', '.join(kinds)}")
        values[name] = (
            _distribution(text)
            if kinds[name] == "Distribution"
            else (
                int(text)
                if kinds[name] == "int"
                else float(text)
                if kinds[name] == "float"
                else text
            )
        )
    if latencies is not None:
        values["latency"] = Recorded(tuple(map(float, latencies.read_text().split())))
    plan = dataclasses.replace(agentic(), **values)
    return plan if "train_s" in values else with_train_share(plan, TRAIN_SHARE, seed)


def _distribution(text: str) -> Distribution:
    mean, _, sigma = text.partition(":")
    return Lognormal(float(mean), float(sigma)) if sigma else Constant(float(mean))


if __name__ == "__main__":
    sys.exit(main())
