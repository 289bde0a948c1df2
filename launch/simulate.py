r"""Predict the throughput, idle time and staleness of a pod's rollouts before it is rented.

python -m launch.simulate                                           # 64 episodes of 8 turns
python -m launch.simulate --stale_samples=drop --async_ratio=1,2    # what dropping brings, costs
python -m launch.simulate --latencies=FILE --set engines=4 --set slots=128 --set token_s=0.02 \
    --set concurrency=512 --set groups_per_step=64 --set train_s=90

The scheduler that trains runs in virtual time; engines, environments and trainer are models. By
default the latency of a turn is lognormal (mean 1 s, sigma 1). FILE has recorded seconds of
environment turns, one a line. --set changes a field of `rome.rollout.simulator.pod.PodModel`;
turns, tokens, prompt_tokens and latency take NUMBER, or MEAN:SIGMA for a lognormal. A train step
takes a quarter of the synchronous rollout unless train_s is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import typing
from collections.abc import Sequence
from typing import Any

from rome.rollout.simulator.distributions import Constant, Distribution, Lognormal, Recorded
from rome.rollout.simulator.pod import PodModel, agentic_pod
from rome.rollout.simulator.simulate import Speedup, speedups, with_train_share

TRAIN_SHARE = 0.25  # of the synchronous rollout time


def main(argv: list[str] | None = None) -> int:
    """Print one row for each async_ratio; return the exit status."""
    flags = _parser().parse_args(argv)
    try:
        async_ratios = [int(ratio) for ratio in flags.async_ratio.split(",")]
        model = pod_model(flags.changes, flags.latencies, flags.stale_samples, flags.seed)
        rows = speedups(model, async_ratios, steps=flags.steps, seed=flags.seed)
    except (ValueError, OSError) as error:
        print(f"launch.simulate: {error}", file=sys.stderr)
        return 1
    print_table(model, async_ratios, rows)
    if flags.json is not None:
        documents = [_to_json(*row) for row in zip(async_ratios, rows, strict=True)]
        flags.json.write_text(json.dumps(documents, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--async_ratio", default="0,1,2,4", help="comma-separated")
    parser.add_argument(
        "--stale_samples",
        default="wait",
        help="wait, keep or drop: what happens to samples beyond the bound",
    )
    parser.add_argument("--latencies", type=pathlib.Path, help="recorded seconds, one a line")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    return parser


def pod_model(
    changes: Sequence[str], latencies: pathlib.Path | None, stale_samples: str, seed: int
) -> PodModel:
    """Return the agentic setting with these changes.

    Args:
      changes: FIELD=VALUE of PodModel.
      latencies: file of recorded seconds, in place of the lognormal latency.
      stale_samples: wait, keep or drop.
      seed: seed of the simulation that determines the default of train_s.

    Raises:
      ValueError: a change names no field, or its value does not fit.
    """
    types = typing.get_type_hints(PodModel)
    values: dict[str, Any] = {"stale_samples": stale_samples}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in types:
            known = ", ".join(types)
            raise ValueError(f"--set {change}: there is no field {name!r}; choose one of {known}")
        values[name] = _parse_value(types[name], text)
    if latencies is not None:
        values["latency"] = Recorded(tuple(map(float, latencies.read_text().split())))
    model = dataclasses.replace(agentic_pod(), **values)
    return model if "train_s" in values else with_train_share(model, TRAIN_SHARE, seed=seed)


def _parse_value(field_type: Any, text: str) -> Any:
    if field_type is Distribution:
        return _parse_distribution(text)
    if field_type in (int, float):
        return field_type(text)
    return text


def _parse_distribution(text: str) -> Distribution:
    mean, _, sigma = text.partition(":")
    return Lognormal(float(mean), float(sigma)) if sigma else Constant(float(mean))


def print_table(model: PodModel, async_ratios: Sequence[int], rows: Sequence[Speedup]) -> None:
    """Print the bound and one row for each async_ratio."""
    print(f"train step {model.train_s:.2f} s; bound of the speedup {rows[0].bound:.2f}")
    print(
        "async_ratio  s/step  trajectories/s  speedup  trainer waits  engines idle  open  short"
        " bias  staleness: trajectories"
    )
    for ratio, row in zip(async_ratios, rows, strict=True):
        found = row.asynchronous
        print(
            f"{ratio:>11}  {found.step_seconds:6.2f}  {found.trajectories_per_s:14.2f} "
            f" {row.predicted:7.2f}  {found.trainer_wait:13.0%}  {found.engine_idle:12.0%} "
            f" {found.open_episodes:4.0f}  {found.short_bias:10.1%}  {found.staleness}"
            f" {found.dropped or ''}"
        )


def _to_json(async_ratio: int, row: Speedup) -> dict[str, Any]:
    return {
        "async_ratio": async_ratio,
        "speedup": row.predicted,
        "bound": row.bound,
        **dataclasses.asdict(row.asynchronous),
    }


if __name__ == "__main__":
    sys.exit(main())
