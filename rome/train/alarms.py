"""Alarms: metrics at which a run stops before the model is harmed, and what to look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from rome.data.batch import RL, Batch

MAX_LOG_RATIO = 50.0  # exp of more would overflow the mean; such a token raises the alarm anyway


class TrainingAlarm(RuntimeError):
    """Further training would harm the model. Nothing of the step that raised it is kept."""


class Diverged(TrainingAlarm):
    """Weights or metrics of a step are not finite; the newest checkpoint is from before it."""


def check_finite(step: int, metrics: Mapping[str, float], resume: str) -> None:
    """Raise Diverged where a metric of a step is not finite.

    Args:
      step: that the metrics are of.
      metrics: by name.
      resume: says where the next start goes on.
    """
    broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise diverged(step, ", ".join(broken), resume)


def diverged(step: int, what: str, resume: str) -> Diverged:
    """Return the error of a step that is not finite, with the keys that may be changed."""
    return Diverged(
        f"training has diverged at step {step}: {what}. Nothing of that step is saved; {resume}."
        " Give it a lower --config.learning_rate or --config.clip, or"
        " --config.skip_nonfinite_updates=True"
    )


def check_mismatch(
    microbatches: Sequence[Batch], limit: float, unscored: Collection[int] = ()
) -> None:
    """Raise TrainingAlarm where engine and trainer disagree about the sampled tokens.

    The measure is the mean k3 estimate of KL(rollout || old) over the step's RL tokens. It is
    checked before the step's first update, so the weights are unharmed.

    Args:
      microbatches: of one step, with logp_old filled in.
      limit: largest accepted mean, nats a token.
      unscored: versions whose weights are lost. Their tokens are skipped: their logp_old is the
        engine's own value, so their mismatch of 0 would dilute the mean.
    """
    kl = 0.0
    tokens = 0
    for batch in microbatches:
        counted_BT = (batch.kind_BT() == RL) & ~np.isin(batch.version_BT, list(unscored))
        difference_BT = batch.logp_old_BT - batch.logp_rollout_BT
        difference_n = difference_BT[counted_BT].astype(np.float64)
        ratio_n = np.exp(np.minimum(difference_n, MAX_LOG_RATIO))
        kl += float(np.sum(ratio_n - difference_n - 1.0))
        tokens += len(difference_n)
    if tokens == 0:
        return
    mean = kl / tokens
    if not mean <= limit:  # also when it is NaN
        raise TrainingAlarm(
            f"mismatch_kl is {mean:.3g} over {tokens} tokens, above alarm_kl={limit:g}: the engine"
            " samples from another distribution than the trainer computes. Compare weights, dtypes,"
            " temperature and chat template; routing_replay=rollout if experts flip; or raise"
            " --config.alarm_kl"
        )


def check_metrics(step: int, metrics: Mapping[str, float], limit: float) -> None:
    """Raise TrainingAlarm where a first update disagrees with pi_old although samples are fresh.

    Args:
      step: that the metrics are of.
      metrics: by name; `max_staleness` and `first_kl` are read.
      limit: largest accepted KL of the first update, nats a token.
    """
    first_kl = metrics.get("first_kl", 0.0)
    if metrics.get("max_staleness") == 0 and first_kl > limit:
        raise TrainingAlarm(
            f"first_kl is {first_kl:.3g} at step {step}, above alarm_kl={limit:g}: before any"
            " update the trainer disagrees with its own scores. Is the forward pass deterministic,"
            " and scored with the same kernels and routes? Or raise --config.alarm_kl"
        )
