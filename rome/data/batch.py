"""Batch: the arrays that a training step reads.

B rows, T tokens a row, C chunks a row, L layers, k experts a token. A row packs several whole
trajectories: segments 1, 2, ..., positions from 0 in each. Index t is about tokens_BT[:, t], which
the model predicts at t - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rome.data.trajectory import KINDS

RL, IMITATION, CONTEXT = range(
    len(KINDS)
)  # kind_BC is an index into KINDS; context is only read, never learned


class Batch(NamedTuple):
    """Packed rows; a pytree.

    Every field is 0 on padding, except chunk_ids_BT, which is -1 outside action tokens.
    """

    tokens_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32
    segments_BT: np.ndarray  # int32; 0 is padding
    action_mask_BT: np.ndarray  # bool; sampled by a policy, stop token included
    chunk_ids_BT: np.ndarray  # int32; index into the row's C chunks
    version_BT: np.ndarray  # int32; weights that sampled the token
    logp_rollout_BT: np.ndarray  # float32; the engine's
    logp_old_BT: (
        np.ndarray
    )  # float32; the trainer's at version_BT; zeros until the trainer has scored them
    return_BC: np.ndarray  # float32; Eq. 7
    reward_BC: np.ndarray  # float32; of the chunk's trajectory, failures mapped to failure_reward
    sign_BC: np.ndarray  # float32; +1 where that reward is > 0, else -1
    # float32; the trajectory's advantage in its group, with "steps" the turn's own
    # (rome.data.advantages)
    advantage_BC: np.ndarray
    trajectory_BC: np.ndarray  # int32; the chunk's segment; 0 is padding
    kind_BC: np.ndarray  # int8; RL, IMITATION or CONTEXT
    valid_BC: np.ndarray  # bool
    # uint8 or uint16, as in rome.data.routes; None: every token chooses its experts itself
    routes_BTLk: np.ndarray | None = None

    def map(self, function: Callable[..., np.ndarray], *others: Batch) -> Batch:
        """function(field, the others' fields...) of every field that is there."""
        return Batch(
            *(
                None if field is None else function(field, *rest)
                for field, *rest in zip(self, *others)
            )
        )

    @property
    def num_rows(self) -> int:
        return self.tokens_BT.shape[0]
