"""Alarms: figures at which a run stops before it is ruined, each with what it means and what to
look at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from rome.data.batch import RL, Batch


class TrainingAlarm(RuntimeError):
    """Training on would harm the model. Nothing of the step that raised it is kept."""


def check_mismatch(
    microbatches: Sequence[Batch], limit: float, unscored: Collection[int] = ()
) -> None:
    """Raises TrainingAlarm where engine and trainer disagree about what was sampled: mean k3 of
    KL(rollout || old) over the step's RL tokens.

    It is asked before the step's first update, so the weights are unharmed. `unscored`: versions
    whose weights are lost. Their tokens count the engine's own word as pi_old, which agrees with
    itself: they would hide what the others show.
    """
    kl = tokens = 0.0
    for batch in microbatches:
        counted_BT = (batch.kind_BT() == RL) & ~np.isin(batch.version_BT, list(unscored))
        difference_n = (batch.logp_old_BT - batch.logp_rollout_BT)[counted_BT].astype(np.float64)
        kl += float(np.sum(np.exp(np.minimum(difference_n, 50.0)) - difference_n - 1.0))
        tokens += len(difference_n)
    if tokens and not kl / tokens <= limit:  # also when it is NaN
        raise TrainingAlarm(
            f"mismatch_kl is {kl / tokens:.3g} over {int(tokens)} tokens, above alarm_kl={limit:g}:"
            " the engine samples from another distribution than the trainer computes. Compare"
            " weights, dtypes, temperature and chat template; routing_replay=rollout if experts"
            " flip; or raise --config.alarm_kl"
        )


def check_figures(step: int, figures: Mapping[str, float], limit: float) -> None:
    """Raises TrainingAlarm where the first update of a step already sees another policy than pi_old
    although all samples are fresh.
    """
    if figures.get("max_staleness") == 0 and figures.get("first_kl", 0.0) > limit:
        raise TrainingAlarm(
            f"first_kl is {figures['first_kl']:.3g} at step {step}, above alarm_kl={limit:g}:"
            " before any update the trainer disagrees with its own scores. Is the forward pass"
            " deterministic, and scored with the same kernels and routes? Or raise"
            " --config.alarm_kl"
        )
