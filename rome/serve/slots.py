"""The slots of the cache, and the prefixes that they hold.

A prompt is prefilled in chunks that begin at multiples of the chunk length. A complete chunk that
was computed this way is kept under a key that stands for all tokens up to its end; another request
with the same beginning copies it. Only such chunks are shared, never what decoding wrote: a
request's numbers are then the same whether its prefix was cached or not.
"""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import numpy as np


def chunk_keys(ids: list[int], chunk: int, root: str) -> list[bytes]:
    """Return one key for each complete chunk of ids.

    Args:
      ids: tokens.
      chunk: tokens of a chunk.
      root: sets apart prefixes that must not be shared (other weights, another salt).
    """
    digest = hashlib.blake2b(root.encode(), digest_size=16)
    keys = []
    for start in range(0, len(ids) - chunk + 1, chunk):
        chunk_ids = np.asarray(ids[start : start + chunk], np.int32)
        digest.update(chunk_ids.tobytes())
        keys.append(digest.digest())
    return keys


class SlotTable:
    """The free slots, and the prefix that each slot, free or taken, holds.

    A prefix is a list of chunk keys in order, with a note for each: the routes of its tokens, or
    None where nobody asked for them.
    """

    def __init__(self, count: int):
        # Least recently used first; an ordered set.
        self._free = collections.OrderedDict.fromkeys(range(count))
        self._keys: list[list[bytes]] = [[] for _ in range(count)]
        self._notes: list[list[Any]] = [[] for _ in range(count)]
        self._holders: dict[bytes, set[int]] = collections.defaultdict(set)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def acquire(self, keys: list[bytes]) -> int:
        """Take the free slot that holds most of this prefix and nothing beyond it.

        If no slot holds any of it, take the least recently used one.
        """

        def usable_chunks(slot: int) -> int:
            held = self._keys[slot]
            num_held = len(held)
            if num_held == 0:
                return 0
            # A key stands for all tokens before it, so the last one says it all.
            is_prefix = num_held <= len(keys) and held[-1] == keys[num_held - 1]
            return num_held if is_prefix else -1

        slot = max(self._free, key=usable_chunks)
        if usable_chunks(slot) <= 0:
            slot = next(iter(self._free))
        del self._free[slot]
        return slot

    def release(self, slot: int) -> None:
        """Give the slot back. Its prefix stays until another request needs the slot."""
        self._free[slot] = None

    def find(self, key: bytes) -> int | None:
        """Return a slot whose prefix has this chunk, or None."""
        return next(iter(self._holders.get(key, ())), None)

    def notes(self, slot: int, chunks: int) -> list[Any]:
        """Return the notes of the first `chunks` chunks of a slot."""
        return self._notes[slot][:chunks]

    def hold(self, slot: int, keys: list[bytes], notes: list[Any]) -> None:
        """Record that the slot now holds exactly these chunks, each with a note."""
        for key in self._keys[slot]:
            holders = self._holders[key]
            holders.discard(slot)
            if not holders:
                del self._holders[key]
        self._keys[slot] = list(keys)
        self._notes[slot] = list(notes)
        for key in keys:
            self._holders[key].add(slot)

    def extend(self, slot: int, key: bytes, note: Any) -> None:
        """Record that the slot holds one more chunk, after those that it has."""
        self._keys[slot].append(key)
        self._notes[slot].append(note)
        self._holders[key].add(slot)

    def forget_all(self) -> None:
        """Record that no slot holds anything."""
        for slot in range(len(self._keys)):
            self.hold(slot, [], [])
