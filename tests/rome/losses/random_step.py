"""A random step of trajectories whose action tokens all have an id of their own, so that arrays can
follow a token into any packing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import LOSSES, SPECS, count_denominators

GAMMA = 0.9
MAX_IDS = 1024


@dataclasses.dataclass
class Step:
    trajectories: list[Trajectory]
    logp: np.ndarray  # by token id
    old: np.ndarray  # by token id
    failure_reward: float = -1.0


def random_step(
    seed,
    *,
    trajectories=7,
    spread=0.6,
    kinds=("rl", "rl", "rl", "imitation", "context"),
    failure_reward=-1.0,
    meeting=False,
):
    """meeting: few calls and few outputs are possible, so that trajectories of a group come into
    the same states.
    """
    rng = np.random.default_rng(seed)
    next_id = iter(range(1, MAX_IDS))

    def chunk():
        ids = [next(next_id) for _ in range(rng.integers(1, 5))]
        return Chunk(
            prompt_ids=[int(i) for i in rng.integers(1, MAX_IDS, rng.integers(1, 4))],
            action_ids=ids,
            logprobs=[float(p) for p in np.float32(-rng.exponential(1.0, len(ids)))],
            status=str(rng.choice(["ok", "ok", "tool_error", "malformed", "timeout"])),
            kind=str(rng.choice(kinds)),
        )

    made = [
        Trajectory(
            task=f"task{n}",
            family="f",
            chunks=[chunk() for _ in range(rng.integers(1, 5))],
            group=int(rng.integers(0, 3)),
            episode=n,
            reward=float(rng.choice([0.0, 0.0, 1.0, 0.5])),
            ending=str(
                rng.choice(
                    ["success", "failure", "success", "timeout", "infra_sandbox", "cancelled"]
                )
            ),
        )
        for n in range(trajectories)
    ]
    if meeting:
        for trajectory in made:
            trajectory.chunks = [
                dataclasses.replace(
                    c,
                    prompt_ids=[1] if n == 0 else [int(rng.integers(2, 4))],
                    tool_call=[None, {"name": "bash"}][rng.integers(2)],
                )
                for n, c in enumerate(trajectory.chunks)
            ]
    rollout = np.zeros(MAX_IDS, np.float32)
    for trajectory in made:
        for c in trajectory.chunks:
            rollout[c.action_ids] = c.logprobs
    old = rollout + np.float32(rng.normal(0, spread, MAX_IDS))
    return Step(made, old + np.float32(rng.normal(0, spread, MAX_IDS)), old, failure_reward)


def packed(step, name="ipa", *, row_length=40, rows=4):
    """Micro-batches of the step as the loss of that name is to see them, logp_old filled in."""
    batch = pack(
        step.trajectories,
        row_length=row_length,
        chunks_per_row=10,
        gamma=GAMMA,
        failure_reward=step.failure_reward,
        purpose="sft" if name == "sft" else "rl",
        advantage=SPECS[name].advantage or "normalised",
    )
    batch = batch._replace(
        logp_old_BT=np.where(batch.action_mask_BT, step.old[batch.tokens_BT], 0).astype(np.float32)
    )
    return microbatches(batch, rows)


def evaluate(name, batches, logp, config, denominators=None):
    """Sum (value, gradient by token id, metrics) over the micro-batches, as a trainer does."""
    denominators = denominators or count_denominators(batches)
    value, gradient, metrics = 0.0, np.zeros(MAX_IDS), {}
    for batch in batches:
        logp_BT = np.where(batch.action_mask_BT, logp[batch.tokens_BT], 0).astype(np.float32)
        value_and_grad = jax.value_and_grad(
            LOSSES[name], has_aux=True
        )  # not compiled: as many losses and switches would take longer to compile than to run
        (part, part_metrics), gradient_BT = value_and_grad(
            jnp.asarray(logp_BT), batch, config, denominators
        )
        value += float(part)
        assert not np.any(np.asarray(gradient_BT)[~batch.action_mask_BT]), (
            "a gradient outside action tokens"
        )
        np.add.at(
            gradient,
            batch.tokens_BT[batch.action_mask_BT],
            np.asarray(gradient_BT)[batch.action_mask_BT],
        )
        for key, figure in part_metrics.items():
            combine = max if key.startswith("max_") else float.__add__
            metrics[key] = combine(metrics.get(key, 0.0), float(figure))
    return value, gradient, metrics
