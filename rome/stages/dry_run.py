"""Call a run's own code once on a tiny step, before anything is started.

What a wrong shape, a NaN or a mean over a micro-batch would do at the first step of a run, or never
say at all, is one line here.

B rows, T tokens, C chunks a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rome.data.advantages import group_advantages
from rome.data.batch import Batch
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import Loss, LossConfig, count_denominators
from rome.own_code import OwnCodeError, describe, is_own
from rome.stages.own_code import own_advantage, own_filter, own_loss, own_reward, refusal
from rome.stages.settings import loss_config
from rome.train.sums import is_maximum
from rome.train.workdir import ConfigError

# Metrics that the learner adds itself.
TAKEN = ("loss", "entropy", "gradient_norm", "step", "stage", "updates", "skipped_updates")
TOLERANCE = 1e-4  # relative, between a step and the sum of its rows


def try_own_code(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError where own code of a config does not do what its key promises."""
    with _named(config, "loss"):
        if is_own(config.loss):
            try_loss(own_loss(config), loss_config(config))
    if config.get("advantage") and is_own(config.advantage):
        with _named(config, "advantage"):
            group_advantages(episodes(), 0.0, own_advantage(config))
    if config.get("reward"):
        with _named(config, "reward"):
            reward: Any = own_reward(config)
            for episode in episodes():
                reward(episode)
    if config.get("filter"):
        with _named(config, "filter"):
            choose: Any = own_filter(config)
            choose(episodes())


def try_loss(loss: Loss, config: LossConfig) -> None:
    """Raise OwnCodeError where a function is no loss on a step of two rows.

    Its value and its metrics over the step must be those of the rows added up, as the micro-batches
    of a step and the devices of a mesh add theirs.
    """
    step = tiny_step()
    denominators = count_denominators([step])
    logp_BT = step.logp_old_BT + np.float32(0.05) * step.action_mask_BT

    def call(logp_BT: Any, batch: Batch) -> tuple[Any, Any]:
        found = loss(logp_BT, batch, config, denominators)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
            raise OwnCodeError(
                f"it returned {_spell(found)}. Return the value and a dictionary of metrics"
            )
        value, metrics = found
        for name, number in {"value": value, **metrics}.items():
            _require_number(name, number)
        return value, {"value": value, **metrics}

    program = jax.jit(jax.grad(call, has_aux=True))
    gradient_BT, found = jax.device_get(program(logp_BT, step))
    _check_metrics(found)
    if not np.isfinite(gradient_BT).all():
        raise OwnCodeError(
            "its gradient is not finite. Select with jnp.where before a division or a logarithm"
        )
    rows = [
        jax.device_get(program(logp_BT[row : row + 1], batch))[1]
        for row, batch in enumerate(microbatches(step, 1))
    ]
    _require_sums(found, rows)


def _check_metrics(found: dict[str, Any]) -> None:
    for name, number in found.items():
        if name in TAKEN or name.startswith("router_"):
            raise OwnCodeError(f"the metric {name!r} is the learner's own. Give it another name")
        if not np.isfinite(number):
            raise OwnCodeError(f"{name} is {number} on a tiny step. Look for a division by 0")


def _require_sums(step: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for name, number in step.items():
        numbers = [float(row[name]) for row in rows]
        combined = max(numbers) if is_maximum(name) else sum(numbers)
        if not np.isclose(combined, number, rtol=TOLERANCE, atol=1e-6):
            what = "its value" if name == "value" else f"its metric {name!r}"
            raise OwnCodeError(
                f"{what} is {float(number):.6g} for a step, and {combined:.6g} where its rows are"
                " added up. Divide sums by `denominators`, the counts of the step, and take no"
                " mean over a batch (a maximum is named max_...)"
            )


def _require_number(name: str, number: Any) -> None:
    shape = np.shape(number)
    if shape != ():
        raise OwnCodeError(f"{name} has the shape {shape}. Return one number: a sum over the batch")
    dtype = jnp.asarray(number).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise OwnCodeError(f"{name} is {dtype}, no float. Cast it to float32")


def _spell(found: Any) -> str:
    if isinstance(found, tuple):
        return f"{len(found)} values ({', '.join(type(one).__name__ for one in found)})"
    return f"a {type(found).__name__}"


def episodes() -> list[Trajectory]:
    """Return a group of three made-up episodes: solved, half solved and failed."""
    return [_episode(number, reward) for number, reward in enumerate((1.0, 0.5, 0.0))]


def _episode(number: int, reward: float) -> Trajectory:
    def turn(place: int) -> Chunk:
        first = 10 * number + 4 * place + 1
        return Chunk(
            prompt_ids=[first, first + 1],
            action_ids=[first + 2, first + 3],
            logprobs=[-0.5, -1.0 - 0.25 * number],
            versions=[(0, 0, 2)],
            text="<tool_call>",
            tool_call={"name": "bash", "arguments": {"command": "ls"}},
            observation="notes.txt\n",
        )

    return Trajectory(
        task="example/0",
        family="example",
        chunks=[turn(place) for place in range(1 + number % 2)],
        reward=reward,
        ending="success" if reward == 1.0 else "failure",
        group=0,
        episode=number,
        instruction="List the files.",
        seconds=1.0,
    )


def tiny_step() -> Batch:
    """Return two packed rows of the made-up episodes and of a demonstration, scored."""
    shown = _episode(3, 1.0)
    shown.group = 1
    for chunk in shown.chunks:
        chunk.kind = "imitation"
    step = pack(
        [*episodes(), shown], row_length=12, chunks_per_row=4, gamma=0.9, failure_reward=-1.0
    )
    return step._replace(logp_old_BT=step.logp_rollout_BT + np.float32(0.01) * step.action_mask_BT)


@contextlib.contextmanager
def _named(config: ml_collections.ConfigDict, role: str) -> Iterator[None]:
    """Turn whatever own code raises into a ConfigError that names its key."""
    try:
        yield
    except ConfigError:
        raise
    except OwnCodeError as error:
        raise refusal(role, config[role], error) from None
    except Exception as error:
        what = OwnCodeError(f"it failed on a tiny step: {describe(error)}")
        raise refusal(role, config[role], what) from error
