"""Supervised fine-tuning, Eq. 1-2 of "Let It Flow": likelihood of the turns worth imitating.

B rows, T tokens, C chunks a row. Turns whose tool call failed, and irrelevant ones, are CONTEXT:
later turns read them, and no term learns from them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.data.batch import CONTEXT, Batch
from rome.losses.chunks import at_tokens
from rome.losses.ipa import weighted_sum
from rome.losses.types import Denominators, LossConfig, Metrics


def sft_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return minus the mean logprob of the step's action tokens outside context chunks.

    `config` is part of every loss's signature; this one reads no switch.
    """
    learned_BT = at_tokens(batch.valid_BC & (batch.kind_BC != CONTEXT), batch)
    total = weighted_sum(jnp.ones_like(logp_BT), logp_BT, learned_BT)
    logp = total / jnp.maximum(denominators.trained_tokens, 1.0)
    return -logp, {"logp": logp}
