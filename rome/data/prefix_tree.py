"""Prefix trees: lines that begin with the same tokens share them, and they are computed once.

Lines are merged into a tree of token runs, laid out depth first: a token's descendants follow it
without a gap, so that one number says who sees it. A token at place j is seen by the tokens at
places j to end - 1 (its own place included): its descendants, which are those that have it as
context. A token of two lines has one place, and is computed once.

What is learned is kept apart from that, in slots. A slot holds what the loss reads about one
trained token of one line: version, logprobs, chunk. It names the token (`about`) and the token
before it on its line (`predictor`), whose hidden state predicts it: where lines part, one token
predicts several. Two lines that both train a shared token have a slot each, so each line's terms
are those that it has alone. Chunks and their features belong to lines, as without trees; chunks
that train nothing have neither slots nor features here.

NumPy arrays. T places of a tree or row, C chunks of a row, K numbers by which tokens are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rome.data.batch import CONTEXT, Batch
from rome.data.lines import CHUNK_FEATURES, Example

# Of a tree, by token or slot. Places within the tree; predictor and chunk count from 1, 0 is none.
TREE_TOKEN_FEATURES: dict[str, Any] = {
    "tokens": np.int32,
    "position": np.int32,
    "end": np.int32,
    "action_mask": bool,
    "about": np.int32,
    "predictor": np.int32,
    "chunk": np.int32,
    "version": np.int32,
    "logp_rollout": np.float32,
}
TREE_CHUNK_FEATURES: dict[str, Any] = CHUNK_FEATURES | {"line": np.int32}
# Lines that share less than this part of the shorter one are not merged: there is little to save,
# and rows are filled better by whole lines that can be put anywhere.
LEAST_SHARED = 1 / 16


def merge_lines(
    examples: Sequence[Example],
    keys: Sequence[np.ndarray],
    row_length: int,
    chunks_per_row: int,
    least_shared: float = LEAST_SHARED,
) -> list[Example]:
    """Merge lines that begin with the same tokens into trees that fit a row.

    A line that trains nothing is left out. The same examples give the same trees.

    Args:
      examples: lines, as `rome.data.lines.to_examples` makes them; each fits a row.
      keys: [tokens of the line, K] integers of at least 0, for each example. Tokens are shared
        where all K numbers are equal, from the first token on: ids, and what else must be equal.
      row_length: T, the most tokens of a tree.
      chunks_per_row: C, the most chunks of a tree.
      least_shared: lines share their beginning if it is at least this part of the shorter one.

    Returns:
      Trees: features by token or slot (TREE_TOKEN_FEATURES, and "places" where the lines have
      them) and by chunk (TREE_CHUNK_FEATURES).
    """
    lines = [_Line(*pair) for pair in zip(examples, keys, strict=True)]
    lines = sorted((line for line in lines if line.trained.size), key=lambda line: line.order)
    trees: list[Example] = []
    grown: _Tree | None = None
    for line in lines:
        if grown is None or not grown.takes(line, row_length, chunks_per_row, least_shared):
            if grown is not None:
                trees.append(grown.example())
            grown = _Tree()
        grown.add(line)
    if grown is not None:
        trees.append(grown.example())
    return trees


class _Line:
    """A line, what it trains, and by what its tokens are compared."""

    def __init__(self, example: Example, keys_TK: np.ndarray) -> None:
        self.example = example
        self.keys_TK = np.asarray(keys_TK, np.int64)
        # Lines in the order of these bytes are in the order of their keys: big-endian, no signs.
        self.order = self.keys_TK.astype(">i8").tobytes()
        self.chunk_T = np.cumsum(example["chunk_start"]) - 1
        is_trained_C = example["kind"] != CONTEXT
        kind_T = is_trained_C[np.maximum(self.chunk_T, 0)]
        self.trained = np.flatnonzero(example["action_mask"] & kind_T)  # places on the line
        self.chunks = np.unique(self.chunk_T[self.trained])

    def __len__(self) -> int:
        return len(self.keys_TK)

    def shared_with(self, other: _Line) -> int:
        """Return how many tokens both lines begin with."""
        length = min(len(self), len(other))
        differs = (self.keys_TK[:length] != other.keys_TK[:length]).any(axis=1)
        return int(differs.argmax()) if differs.any() else length


class _Tree:
    """A tree that grows by lines in the order of their keys, which is depth first."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []
        self._paths: list[np.ndarray] = []  # of each line: the place of each of its tokens
        self._size = 0
        self._slots = 0
        self._chunks = 0

    def takes(self, line: _Line, row_length: int, chunks_per_row: int, least: float) -> bool:
        """Return whether the line shares enough with the tree, and still fits."""
        before = self._lines[-1]  # of all lines, the one that shares most with this one
        shared = line.shared_with(before)
        size = self._size + len(line) - shared
        slots = self._slots + line.trained.size
        return (
            shared >= max(1, least * min(len(line), len(before)))
            and size <= row_length
            and slots <= size  # a slot has a place of its own
            and self._chunks + line.chunks.size <= chunks_per_row
        )

    def add(self, line: _Line) -> None:
        """Add a line: what is new of it comes after all that is there."""
        shared = line.shared_with(self._lines[-1]) if self._lines else 0
        added = len(line) - shared
        known = self._paths[-1][:shared] if self._paths else np.zeros(0, np.int32)
        new = np.arange(self._size, self._size + added, dtype=np.int32)
        self._paths.append(np.concatenate([known, new]))
        self._lines.append(line)
        self._size += added
        self._slots += line.trained.size
        self._chunks += line.chunks.size

    def example(self) -> Example:
        """Return the features of the tree."""
        features = {name: np.zeros(self._size, kind) for name, kind in TREE_TOKEN_FEATURES.items()}
        if "places" in self._lines[0].example:
            features["places"] = np.zeros((self._size, 3), np.int32)
        placed = 0
        for line, path in zip(self._lines, self._paths, strict=True):
            size = max(placed, int(path[-1]) + 1)
            new = path >= placed
            features["tokens"][path[new]] = line.example["tokens"][new]
            features["position"][path] = np.arange(len(path))
            features["end"][path] = size
            if "places" in features:
                features["places"][path[new]] = line.example["places"][new]
            placed = size
        self._fill_slots(features)
        for name, kind in TREE_CHUNK_FEATURES.items():
            features[name] = np.concatenate(
                [self._chunk_feature(number, name) for number in range(len(self._lines))]
            ).astype(kind)
        return features

    def _fill_slots(self, features: Example) -> None:
        """Give each trained token of each line a slot: the token's own place where that is free."""
        first_chunk = 1
        for line, path, slots in zip(self._lines, self._paths, self._slots_of_lines(), strict=True):
            trained = line.trained
            features["action_mask"][slots] = True
            features["about"][slots] = path[trained]
            features["predictor"][slots] = path[trained - 1] + 1
            chunk = np.searchsorted(line.chunks, line.chunk_T[trained])
            features["chunk"][slots] = first_chunk + chunk
            for name in ("version", "logp_rollout"):
                features[name][slots] = line.example[name][trained]
            first_chunk += line.chunks.size

    def _slots_of_lines(self) -> list[np.ndarray]:
        """Return the place of the slot of each token that a line trains, for each line."""
        is_free = np.ones(self._size, bool)
        slots = []
        for line, path in zip(self._lines, self._paths, strict=True):
            own = path[line.trained]
            slots.append(np.where(is_free[own], own, -1))
            is_free[own] = False
        left = iter(np.flatnonzero(is_free).tolist())
        for places in slots:
            for number in np.flatnonzero(places < 0).tolist():
                places[number] = next(left)
        return slots

    def _chunk_feature(self, number: int, name: str) -> np.ndarray:
        line = self._lines[number]
        if name == "line":
            return np.full(line.chunks.size, number + 1)
        return line.example[name][line.chunks]


def to_tree_batch(rows: Sequence[Example]) -> Batch[np.ndarray]:
    """Stack rows of packed trees into a batch; logp_old_BT is zeros.

    Args:
      rows: of `rome.data.packing.pack_stream`, over trees of `merge_lines`.
    """
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    segments_BT = stacked["tokens_segment_ids"]
    tree_BC = stacked["kind_segment_ids"]
    T = segments_BT.shape[1]
    places_BT = np.broadcast_to(np.arange(T, dtype=np.int32), segments_BT.shape)
    start_BT = places_BT - stacked["tokens_positions"]  # of the token's tree
    has_slot_BT = stacked["action_mask"]
    first_BT = _first_chunks(tree_BC, segments_BT)
    is_valid_BC = tree_BC > 0
    return Batch(
        tokens_BT=stacked["tokens"],
        positions_BT=stacked["position"],
        segments_BT=segments_BT,
        action_mask_BT=has_slot_BT,
        chunk_ids_BT=np.where(has_slot_BT, first_BT + stacked["chunk"] - 1, -1).astype(np.int32),
        version_BT=stacked["version"],
        logp_rollout_BT=stacked["logp_rollout"],
        logp_old_BT=np.zeros_like(stacked["logp_rollout"]),
        return_BC=stacked["return"],
        reward_BC=stacked["reward"],
        sign_BC=stacked["sign"],
        advantage_BC=stacked["advantage"],
        trajectory_BC=np.where(is_valid_BC, _number_lines(tree_BC, stacked["line"]), 0),
        kind_BC=stacked["kind"],
        valid_BC=is_valid_BC,
        lines_BC=stacked["lines"] if (stacked["lines"] > 1).any() else None,
        ends_BT=np.where(segments_BT > 0, stacked["end"] + start_BT, 0).astype(np.int32),
        about_BT=np.where(has_slot_BT, stacked["about"] + start_BT, places_BT).astype(np.int32),
        predictor_BT=np.where(has_slot_BT, stacked["predictor"] - 1 + start_BT, -1).astype(
            np.int32
        ),
    )


def _first_chunks(tree_BC: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """Return the row's number of the first chunk of each token's tree, [B, T]."""
    trees = int(max(segments_BT.max(initial=0), tree_BC.max(initial=0))) + 1
    first = np.full((len(tree_BC), trees), tree_BC.shape[1], np.int32)
    rows_N, chunks_N = np.nonzero(tree_BC)
    np.minimum.at(first, (rows_N, tree_BC[rows_N, chunks_N]), chunks_N)
    return np.take_along_axis(first, segments_BT, axis=1)


def _number_lines(tree_BC: np.ndarray, line_BC: np.ndarray) -> np.ndarray:
    """Return a number for each line of a row, from 1: chunks of a line stand together."""
    begins_BC = np.ones(tree_BC.shape, bool)
    same_tree_BC = tree_BC[:, 1:] == tree_BC[:, :-1]
    begins_BC[:, 1:] = ~(same_tree_BC & (line_BC[:, 1:] == line_BC[:, :-1]))
    return np.cumsum(begins_BC, axis=1, dtype=np.int32)
