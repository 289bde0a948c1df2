r"""What each mask of SFT is worth: the heuristic's error rate, and an ablation on the tiny scale.

python -m benchmarks.masks --json masks.json [--steps 300] [--seeds 3] [--demonstrations 880]

First part: Rel(k) (rome/data/relevance.py) on 200 labelled turns of seeds that it was not written
on (benchmarks/labelled_turns.py). `missed` are irrelevant turns that are learned, `wrong` are
relevant ones that are masked.

Second part: demonstrators of the terminal curriculum play in real sandboxes, with mistakes, and
bad turns are planted into their records: a command that was just run, a loop of three, an errand
that has nothing to do with the task. The same tiny model learns them with all masks, without one of
them, and without any. It is measured on demonstrations of other tasks:

    bits_good  bits a token of turns without a fault: less is better
    bits_bad   bits a token of planted turns and mistakes: more is better

Differences to the run with all masks have 95 % intervals by bootstrap over held-out episodes, with
the seeds' figures averaged first: they hold the choice of tasks, and not that of training seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import math
import pathlib
import random
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.labelled_turns import STRAY, labelled_turns
from envs.rock import SandboxConfig
from rome.data.batch import IMITATION
from rome.data.packing import microbatches, pack
from rome.data.relevance import ERRORS, MASKS, irrelevant_turns, mask_turns
from rome.data.sources import endless_order, sft_batches
from rome.data.trajectory import Chunk, Trajectory
from rome.files import write_atomically
from rome.losses import count_denominators
from rome.model.config import PRESETS
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.rollout.demonstrations import collect_demonstrations
from rome.stages.learner import make_learner
from rome.stages.schema import load_config
from rome.stages.tasks import tasks_of
from rome.train.step import Learner

LABEL_SEEDS = (1, 2, 3)
ROW_LENGTH = 320
ERROR_RATE = 0.3
PLANTED = ("loops", "duplicates", "off_task")  # by record; demonstrators compact nothing
VARIANTS: dict[str, tuple[str, ...]] = {
    "all masks": MASKS,
    **{
        f"without {name}": tuple(mask for mask in MASKS if mask != name)
        for name in (ERRORS, *PLANTED)
    },
    "no mask": (),
}


def error_rates() -> dict[str, Any]:
    """Return how often Rel(k) is wrong on the labelled turns, over all and by kind."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for seed in LABEL_SEEDS:
        for one in labelled_turns(200, seed):
            found = irrelevant_turns(one.trajectory).get(one.chunk, "")
            count = counts[f"{'irrelevant' if one.label else 'relevant'}: {one.kind}"]
            count[0] += bool(found) != bool(one.label)
            count[1] += 1
    wrong = sum(count for kind, (count, _) in counts.items() if kind.startswith("relevant"))
    missed = sum(count for kind, (count, _) in counts.items() if kind.startswith("irrelevant"))
    half = 100 * len(LABEL_SEEDS)
    return {
        "labelled": 2 * half,
        "missed": missed / half,
        "wrong": wrong / half,
        "by_kind": {kind: count for kind, count in sorted(counts.items())},
    }


# -- the data
# -------------------------------------------------------------------------------------------------


def play(
    config: ml_collections.ConfigDict, chat: Chat, first: int, number: int
) -> list[Trajectory]:
    """Return demonstrations of so many training tasks, families in turn, from a seed on."""
    source = tasks_of(config).train
    names = {}
    for place in range(number):
        family = source.families[place % len(source.families)]
        names[place] = source.train(family, first + place).name
    sandbox = SandboxConfig(isolation="best_available")
    with tempfile.TemporaryDirectory() as folder:
        playing = collect_demonstrations(
            names,
            lambda task: source.task(task).make_env(sandbox),
            chat,
            error_rate=ERROR_RATE,
            concurrency=4,
            record=lambda place: pathlib.Path(folder) / f"{place}.json",
            on_spoiled=lambda fault: print(fault, file=sys.stderr),
            seconds=300.0,
        )
        return list(asyncio.run(playing).values())


def plant(trajectory: Trajectory, chat: Chat, rng: random.Random) -> tuple[Trajectory, set[int]]:
    """Return a trajectory with bad turns in its middle, and the numbers of all its bad turns.

    Their tokens are what an agent's would be: an answer is read before the next turn.
    """
    chunks = list(trajectory.chunks)
    planted: set[int] = set()
    acting = [
        place
        for place, chunk in enumerate(chunks[:-1])
        if chunk.tool_call and chunk.kind == "imitation" and chunk.observation
    ]
    kind = rng.choice(["none", *PLANTED])
    if acting and kind != "none":
        place = rng.choice(acting)
        before = chunks[place]
        if kind == "off_task":
            command, answer = rng.choice(STRAY)
            name = (before.tool_call or {})["name"]
            call: dict[str, Any] | None = {"name": name, "arguments": {"command": command}}
            text = chat.say("", [(name, {"command": command})])
        else:
            call, text, answer = before.tool_call, before.text, before.observation
        ids = chat.turn(text)
        count = 3 if kind == "loops" else 1
        read = [before.observation, *[answer] * count]
        bad = [
            Chunk(
                chat.observe([read[number]]),
                ids,
                [0.0] * len(ids),
                text=text,
                tool_call=call,
                observation=answer,
                kind="imitation",
            )
            for number in range(count)
        ]
        after = dataclasses.replace(chunks[place + 1], prompt_ids=chat.observe([answer]))
        chunks[place + 1 : place + 2] = [*bad, after]
        planted = set(range(place + 1, place + 1 + count))
    mistakes = {number for number, chunk in enumerate(chunks) if chunk.kind == "context"}
    return dataclasses.replace(trajectory, chunks=chunks), planted | mistakes


def only(trajectory: Trajectory, numbers: set[int]) -> Trajectory:
    """Return a trajectory of which these turns alone are scored."""
    chunks = [
        dataclasses.replace(
            chunk, kind="imitation" if number in numbers else "context", status="ok"
        )
        for number, chunk in enumerate(trajectory.chunks)
    ]
    return dataclasses.replace(trajectory, chunks=chunks)


# -- the runs
# -------------------------------------------------------------------------------------------------


def train(
    learner: Learner,
    config: ml_collections.ConfigDict,
    trajectories: Sequence[Trajectory],
    masks: Sequence[str],
    seed: int,
) -> Any:
    """Return the parameters after `config.steps` steps on these trajectories."""
    masked = [mask_turns(one, masks, is_demonstration=True) for one in trajectories]
    stream = sft_batches(
        endless_order([(masked, 1.0)], seed),
        rows=config.rows,
        row_length=ROW_LENGTH,
        chunks_per_row=config.chunks_per_row,
    )
    state = learner.init(seed)
    for _ in range(config.steps):
        batch = next(stream)
        state, _ = learner.update(state, [batch], count_denominators([batch]))
    return state.params


def bits(
    learner: Learner,
    params: Any,
    trajectories: Sequence[Trajectory],
    config: ml_collections.ConfigDict,
) -> np.ndarray:
    """Return (bits, tokens) of the turns that are scored, of each trajectory: [N, 2]."""
    found = []
    for trajectory in trajectories:
        rows = pack(
            [trajectory],
            row_length=ROW_LENGTH,
            chunks_per_row=config.chunks_per_row,
            gamma=1.0,
            failure_reward=0.0,
            purpose="sft",
        )
        [batch] = microbatches(rows, 1)
        [logp_BT] = learner.score(params, [batch])
        scored_BT = batch.kind_BT() == IMITATION
        nats = -float(np.sum(logp_BT, where=scored_BT, dtype=np.float64))
        found.append((nats / math.log(2), np.count_nonzero(scored_BT)))
    return np.array(found, float)


def difference(one_N2: np.ndarray, other_N2: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return by how many bits a token the first is above the other, with a 95 % interval."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(one_N2), size=(2000, len(one_N2)))

    def rate(values: np.ndarray) -> np.ndarray:
        return values[..., 0].sum(-1) / values[..., 1].sum(-1)

    drawn = rate(one_N2[draws]) - rate(other_N2[draws])
    low, high = np.quantile(drawn, (0.025, 0.975))
    change = float(rate(one_N2) - rate(other_N2))
    return {"difference": change, "low": float(low), "high": float(high)}


def ablate(steps: int, seeds: int, demonstrations: int) -> dict[str, Any]:
    """Train every variant, and return its figures on held-out demonstrations."""
    config = load_config("experiments/sft.py", "tiny")
    config.steps = steps
    config.rows = 4
    chat = Chat(Tokenizer.load(TINY))
    rng = random.Random("masks")
    held = max(demonstrations // 4, 8)
    training = [plant(one, chat, rng)[0] for one in play(config, chat, 0, demonstrations)]
    tested = [plant(one, chat, rng) for one in play(config, chat, 500_000, held)]
    good, bad = [], []
    for trajectory, numbers in tested:
        everything = set(range(len(trajectory.chunks)))
        good.append(only(trajectory, everything - numbers))
        if numbers:
            bad.append(only(trajectory, numbers))
    learner = make_learner(config, PRESETS["tiny"])
    figures: dict[str, Any] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, masks in VARIANTS.items():
        sums = {"good": np.zeros((len(good), 2)), "bad": np.zeros((len(bad), 2))}
        for seed in range(seeds):
            params = train(learner, config, training, masks, seed)
            for kind, scored in (("good", good), ("bad", bad)):
                sums[kind] += bits(learner, params, scored, config)
        scores[name] = sums
        figures[name] = {}
        for kind, values in sums.items():
            figures[name][f"bits_{kind}"] = float(values[:, 0].sum() / values[:, 1].sum())
            figures[name][f"added_{kind}"] = difference(values, scores["all masks"][kind])
        print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    return {
        "steps": steps,
        "seeds": seeds,
        "trained": len(training),
        "held_out": len(good),
        "held_out_bad": len(bad),
        "variants": figures,
    }


def show(report: dict[str, Any]) -> None:
    """Print both parts."""
    console = Console(highlight=False)
    rates = report["error_rates"]
    console.print(
        f"Rel on {rates['labelled']} labelled turns: {rates['missed']:.1%} of the irrelevant are"
        f" missed, {rates['wrong']:.1%} of the relevant are masked"
    )
    for kind, (count, of) in rates["by_kind"].items():
        console.print(f"  {kind}: {count} of {of} wrong")
    if "ablation" not in report:
        return
    table = Table("masks", "bits, good turns", "difference", "bits, bad turns", "difference")
    for name, figures in report["ablation"]["variants"].items():
        cells = [name]
        for kind in ("good", "bad"):
            added = figures[f"added_{kind}"]
            cells.append(f"{figures[f'bits_{kind}']:.3f}")
            cells.append(
                f"{added['difference']:+.3f} ({added['low']:+.3f} to {added['high']:+.3f})"
            )
        table.add_row(*cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--steps", type=int, default=300, help="of each run; 0: no ablation")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of each variant")
    parser.add_argument("--demonstrations", type=int, default=880)
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"error_rates": error_rates()}
    if options.steps:
        report["ablation"] = ablate(options.steps, options.seeds, options.demonstrations)
    if options.json:
        write_atomically(options.json, json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
