"""Batch: the arrays that a training step reads.

B rows, T tokens a row, C chunks a row, L layers, k experts a token. A row packs several whole lines
of trajectories (an episode without branches is one line): segments 1, 2, ..., positions from 0 in
each. Index t is about tokens_BT[:, t], which the model predicts at t - 1. In rows of prefix trees a
segment is a tree of lines, and `Tree` says what index t of the learned fields is about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from rome.data.trajectory import KINDS

# kind_BC is an index into KINDS. Context is only read, never learned from.
RL = KINDS.index("rl")
IMITATION = KINDS.index("imitation")
CONTEXT = KINDS.index("context")


class HasShape(Protocol):
    """An array of NumPy or JAX, or the abstract value of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the size of each axis."""
        ...


ArrayT = TypeVar("ArrayT", bound=HasShape)


class Tree(NamedTuple, Generic[ArrayT]):
    """How the lines of rows share their beginnings (`rome.data.prefix_tree`); int32 places.

    Attributes:
      ends_BT: the token at place j is seen by those at j, ..., end - 1; 0 on padding.
      about_BT: place of the token that the learned fields of index t are about; t on padding.
      predictor_BT: place of the token that predicts it; -1 where index t is about no action token.
    """

    ends_BT: ArrayT
    about_BT: ArrayT
    predictor_BT: ArrayT


class Batch(NamedTuple, Generic[ArrayT]):
    """Packed rows, as a pytree: `Batch[np.ndarray]` on the host, `Batch[jax.Array]` inside jit.

    Every field is 0 on padding, except chunk_ids_BT, which is -1 outside action tokens, and the
    fields of `Tree`. The learned fields are action_mask_BT, chunk_ids_BT, version_BT and the
    logprobs.
    """

    tokens_BT: ArrayT  # int32
    positions_BT: ArrayT  # int32; position within the line
    segments_BT: ArrayT  # int32; number of the line within the row, from 1; 0 is padding
    action_mask_BT: ArrayT  # bool; sampled by a policy, stop token included
    chunk_ids_BT: ArrayT  # int32; index into the row's C chunks
    version_BT: ArrayT  # int32; version of the weights that sampled the token
    logp_rollout_BT: ArrayT  # float32; logprob computed by the engine when it sampled
    # float32; logprob computed by the trainer at version_BT; zeros until the trainer has scored it
    logp_old_BT: ArrayT
    return_BC: ArrayT  # float32; discounted reward of the chunk (Eq. 7)
    reward_BC: ArrayT  # float32; reward of the chunk's trajectory, failures as failure_reward
    sign_BC: ArrayT  # float32; +1 where reward_BC is > 0, else -1
    # float32; advantage of the trajectory in its group, or of the turn with the "steps" estimator
    # (rome.data.advantages)
    advantage_BC: ArrayT
    trajectory_BC: ArrayT  # int32; the chunk's segment; 0 is padding
    kind_BC: ArrayT  # int8; RL, IMITATION or CONTEXT
    valid_BC: ArrayT  # bool; False where a row has fewer chunks
    # uint8 or uint16, encoded as in rome.data.routes; None: every token chooses its own experts
    routes_BTLk: ArrayT | None = None
    # float32; number of lines that the chunk's episode is split into; None: one line each
    lines_BC: ArrayT | None = None
    # float32; how often these rows chose each expert in the pass that scored logp_old; None: not
    # counted. Not split by rows, so it stays on the host.
    expert_counts_LE: np.ndarray | None = None
    # int32; fields of `tree`. None: every line has its tokens to itself.
    ends_BT: ArrayT | None = None
    about_BT: ArrayT | None = None
    predictor_BT: ArrayT | None = None

    def map(self, function: Callable[..., Any], *others: Batch[Any]) -> Batch[Any]:
        """Apply `function` to each field together with the same field of `others`.

        Args:
          function: takes as many arrays as there are batches. It is not called for absent fields.
          others: further batches; their fields are absent where this batch's are.
        """
        mapped: list[Any] = []
        for field, *rest in zip(self, *others, strict=True):
            mapped.append(None if field is None else function(field, *rest))
        return Batch(*mapped)

    @property
    def tree(self) -> Tree[ArrayT] | None:
        """Return how the lines share their beginnings; None where they share nothing."""
        if self.ends_BT is None or self.about_BT is None or self.predictor_BT is None:
            return None
        return Tree(self.ends_BT, self.about_BT, self.predictor_BT)

    @property
    def num_rows(self) -> int:
        """Return the number of rows B."""
        return self.tokens_BT.shape[0]

    def kind_BT(self) -> np.ndarray:
        """Return the kind of each action token's chunk, [B, T] int8; CONTEXT for all other tokens.

        For batches on the host. Losses use `rome.losses.chunks.tokens_of_kind`.
        """
        chunk_BT = np.maximum(np.asarray(self.chunk_ids_BT), 0)
        kind_BT = np.take_along_axis(np.asarray(self.kind_BC), chunk_BT, axis=1)
        return np.where(np.asarray(self.action_mask_BT), kind_BT, np.int8(CONTEXT))
