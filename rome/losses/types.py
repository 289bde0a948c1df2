"""What every loss takes and returns.

A loss sees one micro-batch but divides by counts of the whole step, so that values, gradients and
metrics of the micro-batches of a step simply add up, whatever their number, their padding and the
devices they lie on. Metrics whose name starts with `max_` combine by maximum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from rome.data.batch import CONTEXT, IMITATION, RL, Batch

Metrics = dict[str, jax.Array]


class Denominators(NamedTuple):
    """Counts over all micro-batches and devices of a step, before any mask of a loss."""

    rl_tokens: float  # action tokens of RL chunks
    rl_chunks: float
    rl_trajectories: float  # with at least one RL chunk
    imitation_tokens: float  # action tokens of imitation chunks
    sft_tokens: float  # action tokens of every chunk that is not context


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Switches of the losses; defaults are IPA's and GRPO's, those of the others are PUBLISHED in
    rome.losses.

    `sft` reads none of them.
    """

    # ipa, token_level: the step's RL "tokens", "chunks" or "trajectories" divide the sum
    norm: str = "tokens"
    # ipa: what m_k drops, a "chunk" or a "token"; token_level always drops tokens
    mismatch_mask: str = "chunk"
    # of pi_old / mu. ipa, token_level: H, dropped above it; icepop: beta, dropped above it; tis: C,
    # truncated to it
    mismatch_limit: float = 5.0
    mismatch_low: float = 0.5  # icepop: alpha, dropped below it
    lambda_rl: float = 1.0
    lambda_il: float = 1.0
    clip_low: float = 0.2  # ratios are clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    # where the advantage is negative the clipped losses count a ratio as at most this; 0: without
    # such a bound
    dual_clip: float = 0.0
    # dr_grpo: what a trajectory's token sum is divided by, the same for all; the token budget of an
    # episode
    token_constant: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("tokens", "chunks", "trajectories"):
            raise ValueError(
                f"norm {self.norm!r} unknown; set it to tokens, chunks or trajectories"
            )
        if self.mismatch_mask not in ("chunk", "token"):
            raise ValueError(
                f"mismatch_mask {self.mismatch_mask!r} unknown; set it to chunk or token"
            )
        if not self.mismatch_limit > 0:
            raise ValueError(
                f"mismatch_limit {self.mismatch_limit} drops everything; set a ratio above 0, such"
                " as 5 (inf keeps everything)"
            )
        for name in (
            "lambda_rl",
            "lambda_il",
            "clip_low",
            "clip_high",
            "mismatch_low",
            "dual_clip",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 0 or more")
        if self.dual_clip and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"dual_clip {self.dual_clip} is within the clip range that ends at"
                f" {1 + self.clip_high}; set it above, such as to 3, or to 0 for none"
            )
        if not self.token_constant > 0:
            raise ValueError(
                f"token_constant is {self.token_constant}; set it to the token budget of an episode"
            )


Loss = Callable[[jax.Array, Batch, LossConfig, Denominators], tuple[jax.Array, Metrics]]


def count_denominators(batches: Iterable[Batch]) -> Denominators:
    """Counts the NumPy micro-batches of a whole step, all processes' rows included."""
    counts = np.zeros(len(Denominators._fields), np.int64)
    for batch in batches:
        kind_BT = np.take_along_axis(batch.kind_BC, np.maximum(batch.chunk_ids_BT, 0), axis=1)
        kind_BT = np.where(batch.action_mask_BT, kind_BT, CONTEXT)
        rl_BC = batch.valid_BC & (batch.kind_BC == RL)
        trajectories = sum(len(np.unique(row[rl])) for row, rl in zip(batch.trajectory_BC, rl_BC))
        counts += [
            (kind_BT == RL).sum(),
            rl_BC.sum(),
            trajectories,
            (kind_BT == IMITATION).sum(),
            (kind_BT != CONTEXT).sum(),
        ]
    return Denominators(*map(float, counts))
