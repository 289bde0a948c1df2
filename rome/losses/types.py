"""Types of every loss: its switches, the counts that it divides by, its signature.

A loss sees one micro-batch but divides by counts of the whole step, so that values, gradients and
metrics of the micro-batches of a step simply add up, whatever their number, their padding and the
devices they lie on. Metrics whose name starts with `max_` combine by maximum.

B rows, T tokens, C chunks a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from rome.data.batch import IMITATION, RL, Batch

Metrics = dict[str, jax.Array]

_NOT_NEGATIVE = ("lambda_rl", "lambda_il", "clip_low", "clip_high", "mismatch_low", "dual_clip")


class Denominators(NamedTuple):
    """Counts over all micro-batches and devices of one update, before any mask of a loss.

    Trained chunks are those of RL and of imitation: all that are not context. The lines of an
    episode with branches count as one trajectory together.
    """

    rl_tokens: float  # action tokens of RL chunks
    rl_chunks: float
    rl_trajectories: float  # with at least one RL chunk
    trained_tokens: float  # action tokens of trained chunks
    trained_chunks: float
    trained_trajectories: float  # with at least one trained chunk


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Switches of the losses. `sft` and `cpt` read none of them.

    Defaults are those of IPA and GRPO; `rome.losses.PUBLISHED` has those of the other papers.
    """

    # ipa, token_level: divide both terms by the step's trained "tokens", "chunks" or "trajectories"
    norm: str = "tokens"
    # ipa: m_k drops a whole "chunk" or a single "token"; token_level always drops tokens
    mismatch_mask: str = "chunk"
    # upper limit of pi_old / mu. ipa, token_level: H, dropped above it; icepop: beta, dropped above
    # it; tis: C, truncated to it
    mismatch_limit: float = 5.0
    mismatch_low: float = 0.5  # icepop: alpha, dropped below it
    lambda_rl: float = 1.0  # weight of the RL term (Eq. 10)
    lambda_il: float = 1.0  # weight of the imitation term (Eq. 10)
    clip_low: float = 0.2  # ratios are clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    # clipped losses: upper bound of the ratio where the advantage is negative; 0: no bound
    dual_clip: float = 0.0
    # dr_grpo: constant that divides each trajectory's token sum, the token budget of an episode
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
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} is {value}; set it to 0 or more")
        if self.dual_clip and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"dual_clip {self.dual_clip} is within the clip range that ends at"
                f" {1 + self.clip_high}; set it above, such as to 3, or to 0 for none"
            )
        if not self.token_constant > 0:
            raise ValueError(
                f"token_constant is {self.token_constant}; set it to the token budget of an episode"
            )


Loss = Callable[[jax.Array, Batch[jax.Array], LossConfig, Denominators], tuple[jax.Array, Metrics]]


def count_denominators(batches: Iterable[Batch[np.ndarray]]) -> Denominators:
    """Count what the losses of one update divide by.

    Args:
      batches: all micro-batches of the update, those of other processes included.
    """
    batches = list(batches)
    rl = _count(batches, (RL,))
    trained = _count(batches, (RL, IMITATION))
    return Denominators(*rl, *trained)


def _count(batches: list[Batch[np.ndarray]], kinds: tuple[int, ...]) -> tuple[float, ...]:
    """Count the action tokens, the chunks and the trajectories with chunks of these kinds."""
    tokens = chunks = 0
    trajectories = 0.0
    for batch in batches:
        chosen_BC = batch.valid_BC & np.isin(batch.kind_BC, kinds)
        tokens += int(np.count_nonzero(np.isin(batch.kind_BT(), kinds)))
        chunks += int(np.count_nonzero(chosen_BC))
        lines_BC = np.ones(chosen_BC.shape) if batch.lines_BC is None else batch.lines_BC
        for row, chosen_C in enumerate(chosen_BC):
            _, first = np.unique(batch.trajectory_BC[row][chosen_C], return_index=True)
            trajectories += float(np.sum(1.0 / lines_BC[row][chosen_C][first]))
    return float(tokens), float(chunks), trajectories
