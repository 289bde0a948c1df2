"""Which slot of the cache holds which prefix.

A prompt is prefilled in chunks that begin at multiples of the chunk length. A chunk that was
computed so, whole, is kept under a key that stands for all tokens up to its end; another request
with the same beginning copies it. Only such chunks are shared, never what decoding wrote: a
request's numbers are then the same whether its prefix was cached or not.
"""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import numpy as np


def chunk_keys(ids: list[int], chunk: int, root: str) -> list[bytes]:
    """One key for each whole chunk of ids.

    `root` sets apart what must not be shared (weights, salt).
    """
    digest = hashlib.blake2b(root.encode(), digest_size=16)
    keys = []
    for start in range(0, len(ids) - chunk + 1, chunk):
        digest.update(np.asarray(ids[start : start + chunk], np.int32).tobytes())
        keys.append(digest.digest())
    return keys


class SlotTable:
    """Free slots, and the prefix that each slot, free or taken, holds: keys of its chunks in order,
    with a note for each (their routes).
    """

    def __init__(self, count: int):
        self._free: collections.OrderedDict[int, None] = collections.OrderedDict.fromkeys(
            range(count)
        )  # least recently used first
        self._keys: list[list[bytes]] = [[] for _ in range(count)]
        self._notes: list[list[Any]] = [[] for _ in range(count)]
        self._holders: dict[bytes, set[int]] = collections.defaultdict(set)

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self, keys: list[bytes]) -> int:
        """Takes a free slot: the one that holds most of this prefix and nothing beyond it, or else
        the least recently used one.
        """

        def worth(slot: int) -> int:
            held = self._keys[slot]
            return len(held) if held == keys[: len(held)] else -1

        slot = max(self._free, key=worth)
        if worth(slot) <= 0:
            slot = next(iter(self._free))
        del self._free[slot]
        return slot

    def release(self, slot: int) -> None:
        """Gives the slot back. Its prefix stays until somebody else needs the place."""
        self._free[slot] = None

    def find(self, key: bytes) -> int | None:
        """A slot whose prefix has this chunk."""
        return next(iter(self._holders.get(key, ())), None)

    def notes(self, slot: int, chunks: int) -> list[Any]:
        return self._notes[slot][:chunks]

    def hold(self, slot: int, keys: list[bytes], notes: list[Any]) -> None:
        """Says that the slot holds exactly these chunks now."""
        for key in self._keys[slot]:
            self._holders[key].discard(slot)
            if not self._holders[key]:
                del self._holders[key]
        self._keys[slot], self._notes[slot] = list(keys), list(notes)
        for key in keys:
            self._holders[key].add(slot)

    def forget_all(self) -> None:
        for slot in range(len(self._keys)):
            self.hold(slot, [], [])
