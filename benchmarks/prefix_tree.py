r"""Time an update over rows of prefix trees beside the same update over separate rows.

python -m benchmarks.prefix_tree --json prefix_tree.json [--recorded WORKDIR/trajectories] \
    [--size small] [--pairs 5]

Both sides are `Learner.update` with IPA over all micro-batches of the same episodes, packed as the
trainer packs them: lines whole in as few rows as best-fit finds, or lines merged where they begin
alike. The two take turns in one process; `speedup` is the median over the pairs;
`processor_speedup` compares processor seconds, which a busy machine changes less. `gradient_error`
is the norm of the difference of the two gradients over the norm of that of separate rows.

    groups      groups of 8 episodes: one prompt, then turns of their own
    forks       sources, and 7 episodes of each that go on from a quarter, half and three quarters
    subagents   episodes, recorded by `rome.agent.session`: an agent asks 8 sub-agents, which
                share instructions and tools, and goes on in a compacted context that begins as its
                first one does
    alike       groups of 8 of a policy that has learned: half of the episodes begin with the same
                sampled turn, which each of them trains
    apart       no two episodes begin alike: what trees cost where there is nothing to share

`--recorded` adds a case: the episodes of a run, in its own groups. The top-level figures are over
all cases but `apart`: tokens and seconds summed, and the largest error.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from rome.agent.session import Session
from rome.data.batch import Batch
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory, load_trajectory
from rome.data.tree import ROOT
from rome.engine.completion import Completion, Sampling
from rome.files import write_atomically
from rome.losses import LOSSES, LossConfig, count_denominators
from rome.model.config import PRESETS
from rome.model.sharding import make_mesh
from rome.model.tokenizer import TINY, Tokenizer
from rome.train.memory import keep_freed_memory
from rome.train.state import make_optimizer
from rome.train.step import Learner
from rome.train.sums import WholeStep

VOCABULARY = 512  # ids of made-up tokens
LENGTHS = (24, 96)  # tokens of an answer or a tool's result, at least and at most
TURNS = 4
LARGEST_ERROR = 1e-4  # of float32 sums in another order; beyond, nothing is timed


def ids(rng: random.Random, count: int) -> list[int]:
    """Return made-up tokens."""
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def some_ids(rng: random.Random) -> list[int]:
    """Return made-up tokens of an answer or a tool's result."""
    return ids(rng, rng.randint(*LENGTHS))


def turn(rng: random.Random, prompt_ids: list[int]) -> Chunk:
    """Return a chunk with an answer of its own."""
    action_ids = some_ids(rng)
    logprobs = [-rng.random() for _ in action_ids]
    return Chunk(prompt_ids, action_ids, logprobs, versions=[(0, 0, len(action_ids))])


def episode(number: int, group: int, chunks: list[Chunk]) -> Trajectory:
    """Return an episode; every other one succeeds."""
    reward = float(number % 2)
    ending = "success" if reward else "failure"
    return Trajectory("made/up", "made", chunks, reward, ending, group=group, episode=number)


def turns(rng: random.Random, count: int, prompt_ids: list[int] | None = None) -> list[Chunk]:
    """Return some turns, the first of which reads a prompt or a tool's result."""
    prompts = [prompt_ids or some_ids(rng)] + [some_ids(rng) for _ in range(count - 1)]
    return [turn(rng, prompt) for prompt in prompts]


def groups(rng: random.Random, count: int, prompt: int) -> list[Trajectory]:
    """Return groups whose episodes share their prompt."""
    prompts = [ids(rng, prompt) for _ in range(count)]
    return [
        episode(number, group, turns(rng, TURNS, prompts[group]))
        for group in range(count)
        for number in range(8)
    ]


def alike(rng: random.Random, count: int, prompt: int) -> list[Trajectory]:
    """Return groups of which half of the episodes also share their first sampled turn."""
    made = groups(rng, count, prompt)
    for one in made:
        first = made[8 * one.group].chunks[0]
        if one.episode < 4:
            one.chunks[0] = dataclasses.replace(first)
    return made


def forks(rng: random.Random, count: int, prompt: int) -> list[Trajectory]:
    """Return sources and the episodes that go on from three depths of each."""
    made = []
    for group in range(count):
        source = turns(rng, 8, ids(rng, prompt))
        made.append(episode(0, group, source))
        for number in range(1, 8):
            anchor = 2 * (1 + number % 3)
            known = [dataclasses.replace(chunk, kind="context") for chunk in source[:anchor]]
            made.append(episode(number, group, known + turns(rng, 8 - anchor)))
    return made


def apart(rng: random.Random, count: int, prompt: int) -> list[Trajectory]:
    """Return episodes that have nothing in common."""
    return [
        episode(number, group, turns(rng, TURNS, ids(rng, prompt)))
        for group in range(count)
        for number in range(8)
    ]


class MadeUpEngine:
    """Answers with made-up tokens."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        """Return an answer."""
        sampled = some_ids(self._rng)
        logprobs = [-self._rng.random() for _ in sampled]
        return Completion(sampled, logprobs, "stop", [(0, 0, len(sampled))])


def subagents(rng: random.Random, count: int, prompt: int) -> list[Trajectory]:
    """Return episodes with sub-agents and a compaction, as a session records them."""
    tokenizer = Tokenizer.load(TINY)

    async def play(number: int) -> Trajectory:
        session = Session(
            MadeUpEngine(rng),
            tokenizer,
            seed=number,
            max_context=1 << 20,
            max_new_tokens=LENGTHS[1],
            completion_seconds=60.0,
        )
        last = await session.sample(ROOT, own_ids + some_ids(rng))

        async def work() -> None:
            place = await session.sample(ROOT, subagent_ids + some_ids(rng), edge="subagent")
            for _ in range(2):
                place = await session.sample(place, some_ids(rng))

        await asyncio.gather(*(work() for _ in range(8)))
        for _ in range(3):
            last = await session.sample(last, some_ids(rng))
        last = await session.sample(ROOT, own_ids + some_ids(rng), edge="compaction")
        await session.sample(last, some_ids(rng))
        return episode(number, 0, session.chunks)

    own_ids, subagent_ids = ids(rng, prompt), ids(rng, prompt)

    async def play_all() -> list[Trajectory]:
        return [await play(number) for number in range(count)]

    return asyncio.run(play_all())


CASES: dict[str, Callable[[random.Random, int, int], list[Trajectory]]] = {
    "groups": groups,
    "forks": forks,
    "subagents": subagents,
    "alike": alike,
    "apart": apart,
}


def packed(
    episodes: list[Trajectory], prefix_tree: bool, length: int, chunks: int, rows: int
) -> list[Batch]:
    """Return scored micro-batches of the episodes."""
    batch = pack(
        episodes,
        row_length=length,
        chunks_per_row=chunks,
        gamma=0.95,
        failure_reward=-1.0,
        prefix_tree=prefix_tree,
    )
    scored = batch._replace(logp_old_BT=batch.logp_rollout_BT)
    return microbatches(scored, rows)


class Side:
    """One way to pack, and its updates."""

    def __init__(self, learner: Learner, batches: list[Batch]) -> None:
        self.batches = batches
        self.tokens = sum(int((batch.segments_BT > 0).sum()) for batch in batches)
        self.rows = sum(int((batch.segments_BT > 0).any(axis=1).sum()) for batch in batches)
        self._learner = learner
        self._counts = count_denominators(batches)
        self._state = learner.init(seed=0)

    def gradients(self) -> Any:
        """Return the gradients at the first weights, on the host."""
        whole = WholeStep(self._counts, float(self.tokens), 1.0, None)
        with jax.set_mesh(self._learner.mesh):
            sums = self._learner._sum_up(self._state.params, self.batches, whole)
        return jax.device_get(sums.gradients)

    def update(self) -> tuple[float, float]:
        """Make an update; return its seconds, and those of the processor."""
        began = time.perf_counter(), time.process_time()
        self._state, _ = self._learner.update(self._state, self.batches, self._counts)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began[0], time.process_time() - began[1]


def relative_error(one: Any, other: Any) -> float:
    """Return the norm of the difference over the norm of the second."""

    def norm(leaves: list[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves)))

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return norm([left - right for left, right in pairs]) / norm(jax.tree.leaves(other))


def measure(
    name: str, episodes: list[Trajectory], learner: Learner, sizes: tuple[int, int, int], pairs: int
) -> dict[str, Any]:
    """Check that both sides have one gradient, time them in turns, and return a case's figures."""
    shared, alone = (Side(learner, packed(episodes, way, *sizes)) for way in (True, False))
    error = relative_error(shared.gradients(), alone.gradients())
    if not error < LARGEST_ERROR:
        raise RuntimeError(f"{name}: the gradients differ by {error:.1e} of their norm")
    for side in (shared, alone):
        side.update()
    times = np.array([(shared.update(), alone.update()) for _ in range(pairs)])
    seconds = np.median(times, axis=0)  # [side, clock]
    speedups = np.median(times[:, 1] / times[:, 0], axis=0)
    return {
        "name": name,
        "tokens": alone.tokens,
        "tokens_saved": 1 - shared.tokens / alone.tokens,
        "rows": [shared.rows, alone.rows],
        "seconds": seconds[:, 0].tolist(),
        "processor_seconds": seconds[:, 1].tolist(),
        "speedup": float(speedups[0]),
        "processor_speedup": float(speedups[1]),
        "gradient_error": error,
    }


def recorded(folder: pathlib.Path, most: int) -> list[Trajectory]:
    """Return the trainable episodes of the newest groups of a run.

    Raises:
      ValueError: the folder has none.
    """
    made = [load_trajectory(path, routes=False) for path in sorted(folder.glob("*.json"))]
    made = [one for one in made if one.trainable and one.num_action_tokens and one.group >= 0]
    if not made:
        raise ValueError(f"{folder} has no trainable episodes of groups")
    return sorted(made, key=lambda one: one.group)[-most:]


def make_learner(size: str) -> Learner:
    """Return a learner with IPA, without a balance term, which would differ by definition."""
    config = dataclasses.replace(PRESETS[size], router_aux_loss_coef=0.0)
    optimizer = make_optimizer(
        learning_rate=1e-4, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
    )
    return Learner(config, LOSSES["ipa"], LossConfig(), optimizer, make_mesh({}, config))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--recorded", type=pathlib.Path, help="episodes of a run, as a case more")
    parser.add_argument("--most", type=int, default=128, help="recorded episodes, at most")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--size", default="small", help="a preset of rome.model.config")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--chunks", type=int, default=64, help="chunks a row")
    parser.add_argument("--rows", type=int, default=2, help="rows a micro-batch")
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side")
    parser.add_argument("--groups", type=int, default=4, help="groups, sources or episodes a case")
    flags = parser.parse_args(argv)
    unknown = set(flags.cases.split(",")) - CASES.keys()
    if unknown:
        parser.error(f"{min(unknown)!r} is no case; choose from {', '.join(CASES)}")
    learner = make_learner(flags.size)
    episodes = {
        name: CASES[name](random.Random(0), flags.groups, flags.prompt)
        for name in flags.cases.split(",")
    }
    if flags.recorded:
        episodes["recorded"] = recorded(flags.recorded, flags.most)
    sizes = (flags.length, flags.chunks, flags.rows)
    cases = []
    for name, made in episodes.items():
        cases.append(measure(name, made, learner, sizes, flags.pairs))
        print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    found = summary(cases) | {
        "cases": cases,
        "size": flags.size,
        "row_length": flags.length,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    show(found)
    if flags.json:
        write_atomically(flags.json, json.dumps(found, indent=1) + "\n")


def summary(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures over all cases that share something."""
    sharing = [case for case in cases if case["name"] != "apart"] or cases
    tokens = sum(case["tokens"] for case in sharing)
    seconds = np.sum([(case["seconds"], case["processor_seconds"]) for case in sharing], axis=0)
    return {
        "tokens_saved": sum(case["tokens_saved"] * case["tokens"] for case in sharing) / tokens,
        "speedup": float(seconds[0, 1] / seconds[0, 0]),
        "processor_speedup": float(seconds[1, 1] / seconds[1, 0]),
        "gradient_error": max(case["gradient_error"] for case in cases),
    }


def show(found: dict[str, Any]) -> None:
    """Print the report as a table."""
    table = Table(title="One update: prefix trees beside separate rows", title_justify="left")
    for column in (
        "case",
        "tokens",
        "saved",
        "rows",
        "seconds",
        "speedup",
        "of processor",
        "error",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in found["cases"]:
        rows, seconds = case["rows"], case["seconds"]
        table.add_row(
            case["name"],
            f"{case['tokens']:,}",
            f"{case['tokens_saved']:.1%}",
            f"{rows[0]} / {rows[1]}",
            f"{seconds[0]:.2f} / {seconds[1]:.2f}",
            f"{case['speedup']:.2f}",
            f"{case['processor_speedup']:.2f}",
            f"{case['gradient_error']:.1e}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"all: {found['tokens_saved']:.1%} of tokens saved, {found['speedup']:.2f} x as fast,"
        f" gradients differ by at most {found['gradient_error']:.1e}"
    )


if __name__ == "__main__":
    main()
