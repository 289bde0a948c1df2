"""The causal mask of splash attention for queries in any order.

T time of queries and keys.
"""

from __future__ import annotations

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


class PlacedCausalMask(masks.CausalMask):
    """A mask in which a query sees the keys up to its own place.

    The kernel computes the mask from the places: a [T, T] array never exists.

    Args:
      places_T: place of each query.
    """

    def __init__(self, places_T: np.ndarray):
        super().__init__((places_T.size, places_T.size))
        self.q_sequence = places_T  # the name under which the kernel looks for it

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        """Return a block of the mask.

        Blocks of one value, nearly all of a long row's, are not compared place by place.
        """
        query_slice, key_slice = idx
        places = self.q_sequence[query_slice]
        keys = range(*key_slice.indices(self.shape[1]))
        shape = (places.size, len(keys))
        if keys.start > places.max():
            return np.zeros(shape, bool)
        if keys.stop - 1 <= places.min():
            return np.ones(shape, bool)
        return super().__getitem__(idx)
