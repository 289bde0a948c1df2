"""Supervised fine-tuning, Eq. 1-2 of "Let It Flow": likelihood of the turns worth imitating.

B rows, T tokens, C chunks a row. Turns whose tool call failed, and irrelevant ones, are CONTEXT:
read by later turns, learned by none.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.data.batch import CONTEXT, Batch
from rome.losses.chunks import at_tokens
from rome.losses.ipa import weighted_sum
from rome.losses.types import Denominators, LossConfig, Metrics


def sft_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Minus the mean log-likelihood over the step's unmasked action tokens; `config` has nothing to
    switch here.
    """
    learned_BT = at_tokens(batch.valid_BC & (batch.kind_BC != CONTEXT), batch)
    logp = weighted_sum(jnp.ones_like(logp_BT), logp_BT, learned_BT) / jnp.maximum(
        denominators.sft_tokens, 1.0
    )
    return -logp, {"logp": logp}
