"""From trajectories to rows of fixed shape, and from rows to micro-batches.

NumPy arrays; grain does the bin packing.

B rows, T tokens a row, C chunks a row, K turns of a trajectory, L layers, k experts a token. A row
packs several whole lines of trajectories; a trajectory without branches is one line.

What a line's tokens and chunks are is said in `rome.data.lines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import grain
import grain.experimental
import numpy as np

from rome.data.advantages import Anchor, Comparison, Estimator, group_advantages
from rome.data.batch import CONTEXT, Batch
from rome.data.lines import (
    CHUNK_FEATURES,
    TOKEN_FEATURES,
    Example,
    ExampleOptions,
    Purpose,
    to_examples,
)
from rome.data.prefix_tree import (
    LEAST_SHARED,
    TREE_CHUNK_FEATURES,
    TREE_TOKEN_FEATURES,
    merge_lines,
    to_tree_batch,
)
from rome.data.row_routes import fetch_routes, hash_routes
from rome.data.trajectory import Trajectory
from rome.model.config import ModelConfig


def pack(
    trajectories: Sequence[Trajectory],
    *,
    row_length: int,
    chunks_per_row: int,
    gamma: float,
    failure_reward: float,
    purpose: Purpose = "rl",
    routes_for: ModelConfig | None = None,
    advantage: Estimator | Comparison = "normalised",
    anchor: Anchor = "history",
    safety_cost: Mapping[str, float] | None = None,
    negative_weight: float = 1.0,
    negative_tokens: int = 0,
    edge_credit: Mapping[str, float] | None = None,
    is_own_row: Callable[[int], bool] = lambda row: True,
    load_routes: Callable[[Trajectory], Trajectory] = lambda trajectory: trajectory,
    prefix_tree: bool = False,
    versions_apart: bool = False,
) -> Batch[np.ndarray]:
    """Pack all trainable trajectories, each line whole, into as few rows as best-fit finds.

    Infrastructure failures and cancelled episodes are left out, here and in the group statistics.
    The longest line comes first. The same list gives the same rows.

    Args:
      trajectories: a whole step or whole groups: advantages compare the trajectories of one
        `Trajectory.group` within this list.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      gamma: discount per chunk (Eq. 7).
      failure_reward: replaces every reward <= 0; 0.0 learns from successes only.
      purpose: "sft" learns from chunks that are not context and whose call did not fail: status
        "ok", whatever the command's exit status. "rl" learns from every action the policy took.
      routes_for: the model that is to replay the chunks' routes; they are checked against it. None:
        the batch has no routes.
      advantage: how the episodes of a group are compared (`rome.data.advantages`).
      anchor: which turns the "steps" advantage takes to be in one state (`anchor_states`).
      safety_cost: of each kind of event; a turn's return loses those of its own events and, as
        they are discounted, of later ones; the episode's reward loses all (`rome.data.costs`).
      negative_weight: multiplies return and reward of failures, and advantages below 0.
      negative_tokens: failures with more action tokens than this are only read; 0: learn from all.
        Negatives that grow longer come before a collapse.
      edge_credit: multiplies return, reward and advantage of turns by the edges of the tree
        (`rome.data.tree.credits_of`); a turn of weight 0 is only read.
      is_own_row: whether the routes of a row are needed here; elsewhere they are zeros.
      load_routes: returns a trajectory with its routes; asked for those of own rows, and with
        prefix_tree for all.
      prefix_tree: lines that begin with the same tokens, and the same routes where these are
        replayed, share what they have in common (`rome.data.prefix_tree`), unless that takes more
        rows.
      versions_apart: with prefix_tree, sampled tokens are shared by samples of one version only.

    Returns:
      As many rows as were needed, none if nothing is trainable. logp_old_BT is zeros.

    Raises:
      ValueError: a line does not fit a row, or a part of it is damaged.
    """
    options = ExampleOptions(
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        gamma=gamma,
        failure_reward=failure_reward,
        purpose=purpose,
        with_places=routes_for is not None,
        safety_cost=safety_cost or {},
        negative_weight=negative_weight,
        negative_tokens=negative_tokens,
        edge_credit=edge_credit or {},
    )
    trained = [one for one in trajectories if one.trainable and one.num_action_tokens]
    advantages = group_advantages(
        trained,
        failure_reward,
        advantage,
        gamma=gamma,
        anchor=anchor,
        safety_cost=safety_cost,
    )
    examples = []
    keys = []
    for number, (trajectory, advantage_K) in enumerate(zip(trained, advantages, strict=True), 1):
        lines = to_examples(trajectory, advantage_K, options)
        if routes_for is not None:
            for example in lines:
                example["places"] = np.insert(example["places"], 0, number, axis=1)
        if prefix_tree:
            with_routes = None if routes_for is None else load_routes(trajectory)
            keys += [_keys(example, versions_apart, with_routes, routes_for) for example in lines]
        examples += lines
    if prefix_tree and examples:
        rows = _rows_of_trees(examples, keys, row_length, chunks_per_row)
        batch = to_tree_batch(rows) if rows else _empty_rows(0, row_length, chunks_per_row)
    elif routes_for is None or not examples:
        return pack_examples(examples, row_length, chunks_per_row)
    else:
        rows = _best_fit(examples, row_length, chunks_per_row, places=True)
        batch = to_batch(rows)
    if routes_for is None or not rows:
        return batch
    routes_BTLk = fetch_routes(
        np.stack([row["places"] for row in rows]),
        trained,
        routes_for,
        own_rows=[number for number in range(len(rows)) if is_own_row(number)],
        load=load_routes,
    )
    return batch._replace(routes_BTLk=routes_BTLk)


def _keys(
    example: Example,
    versions_apart: bool,
    with_routes: Trajectory | None,
    routes_for: ModelConfig | None,
) -> np.ndarray:
    """Return the numbers that must be equal where two lines share a token, [T, K]."""
    keys = [example["tokens"]]
    if versions_apart:
        chunk_T = np.cumsum(example["chunk_start"]) - 1
        is_read_T = ~example["action_mask"] | (example["kind"][np.maximum(chunk_T, 0)] == CONTEXT)
        keys.append(np.where(is_read_T, 0, example["version"] + 1))
    if with_routes is not None and routes_for is not None:
        keys.append(hash_routes(with_routes, example["places"][:, 1:], routes_for))
    return np.stack(keys, axis=1).astype(np.int64)


def _rows_of_trees(
    examples: list[Example], keys: list[np.ndarray], row_length: int, chunks_per_row: int
) -> list[Example]:
    """Return rows of trees; of lines that share nothing where that takes fewer rows."""
    found = []
    for least_shared in (LEAST_SHARED, math.inf):
        trees = merge_lines(examples, keys, row_length, chunks_per_row, least_shared)
        found.append(_best_fit(trees, row_length, chunks_per_row, "places" in examples[0], True))
    return min(found, key=len)


def pack_examples(
    examples: list[Example], row_length: int, chunks_per_row: int
) -> Batch[np.ndarray]:
    """Pack all examples, each once and whole; the longest first.

    Args:
      examples: as `to_examples` and `text_example` make them.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
    """
    if not examples:
        return _empty_rows(0, row_length, chunks_per_row)
    return to_batch(_best_fit(examples, row_length, chunks_per_row))


def _best_fit(
    examples: list[Example],
    row_length: int,
    chunks_per_row: int,
    places: bool = False,
    trees: bool = False,
) -> list[Example]:
    """Return rows of all examples; `places` and `trees` say which features these have."""
    if not examples:
        return []
    # sorted is stable: examples of equal length keep their order
    longest_first = sorted(examples, key=lambda example: -len(example["tokens"]))
    without_prefetch = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = grain.MapDataset.source(longest_first).to_iter_dataset(without_prefetch)
    return list(pack_stream(stream, row_length, chunks_per_row, len(examples), places, trees))


def microbatches(batch: Batch[np.ndarray], rows_per_microbatch: int) -> list[Batch[np.ndarray]]:
    """Split the rows into batches of one shape.

    The last batch is filled up with empty rows, which carry no loss.

    Args:
      batch: any number of rows.
      rows_per_microbatch: rows of each result.

    Raises:
      ValueError: rows_per_microbatch is below 1.
    """
    if rows_per_microbatch < 1:
        raise ValueError(f"rows_per_microbatch is {rows_per_microbatch}; set it to 1 or more")
    starts = range(0, batch.num_rows, rows_per_microbatch)
    batches = [_take_rows(batch, start, start + rows_per_microbatch) for start in starts]
    if batches:  # only the last one is copied: rows of other processes take no memory
        batches[-1] = _fill_up(batches[-1], rows_per_microbatch)
    return batches


def _fill_up(batch: Batch[np.ndarray], rows: int) -> Batch[np.ndarray]:
    """Return the batch with empty rows after its own, so many in all."""
    missing = rows - batch.num_rows
    if not missing:
        return batch
    _, T = batch.tokens_BT.shape
    _, C = batch.valid_BC.shape
    empty = _empty_rows(missing, T, C)
    if batch.routes_BTLk is not None:
        shape = (missing, *batch.routes_BTLk.shape[1:])
        empty = empty._replace(routes_BTLk=np.zeros(shape, batch.routes_BTLk.dtype))
    if batch.lines_BC is not None:
        empty = empty._replace(lines_BC=np.zeros((missing, C), batch.lines_BC.dtype))
    if batch.tree is not None:
        places_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (missing, T))
        empty = empty._replace(
            ends_BT=np.zeros((missing, T), np.int32),
            about_BT=places_BT,
            predictor_BT=np.full((missing, T), -1, np.int32),
        )
    return batch.map(lambda field, padding: np.concatenate([field, padding]), empty)


def _take_rows(batch: Batch[np.ndarray], start: int, stop: int) -> Batch[np.ndarray]:
    return batch.map(lambda field: field[start:stop])


def pack_stream(
    examples: grain.IterDataset,
    row_length: int,
    chunks_per_row: int,
    bins: int,
    places: bool = False,
    trees: bool = False,
) -> grain.IterDataset:
    """Pack a stream of examples into a stream of rows for `to_batch` or `to_tree_batch`, best-fit.

    The iterator's get_state and set_state resume at an exact row.

    Args:
      examples: as `to_examples` and `text_example` make them.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      bins: rows that are open at a time.
      places: whether the examples have places of routes.
      trees: whether the examples are trees of `rome.data.prefix_tree`.
    """
    lengths = dict.fromkeys(TREE_TOKEN_FEATURES if trees else TOKEN_FEATURES, row_length)
    lengths |= dict.fromkeys(TREE_CHUNK_FEATURES if trees else CHUNK_FEATURES, chunks_per_row)
    if places:
        lengths["places"] = row_length
    # grain adds segments and positions to every feature that is not called meta: one feature of
    # each length is enough.
    meta = [name for name in lengths if name not in ("tokens", "kind")]
    return grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct=lengths,
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=meta,
    )


def to_batch(rows: Sequence[Example]) -> Batch[np.ndarray]:
    """Stack rows of `pack_stream` into a batch; logp_old_BT is zeros."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    # Chunks lie in the row in the order of their tokens, so the n-th start belongs to the row's
    # n-th chunk.
    chunk_BT = np.cumsum(stacked["chunk_start"], axis=1) - 1
    chunk_ids_BT = np.where(stacked["action_mask"], chunk_BT, -1)
    return Batch(
        tokens_BT=stacked["tokens"],
        positions_BT=stacked["tokens_positions"],
        segments_BT=stacked["tokens_segment_ids"],
        action_mask_BT=stacked["action_mask"],
        chunk_ids_BT=chunk_ids_BT.astype(np.int32),
        version_BT=stacked["version"],
        logp_rollout_BT=stacked["logp_rollout"],
        logp_old_BT=np.zeros_like(stacked["logp_rollout"]),
        return_BC=stacked["return"],
        reward_BC=stacked["reward"],
        sign_BC=stacked["sign"],
        advantage_BC=stacked["advantage"],
        trajectory_BC=stacked["kind_segment_ids"],
        kind_BC=stacked["kind"],
        valid_BC=stacked["kind_segment_ids"] > 0,
        lines_BC=stacked["lines"] if (stacked["lines"] > 1).any() else None,
    )


def _empty_rows(rows: int, row_length: int, chunks_per_row: int) -> Batch[np.ndarray]:
    row = {
        "tokens_positions": np.zeros(row_length, np.int32),
        "tokens_segment_ids": np.zeros(row_length, np.int32),
        "kind_segment_ids": np.zeros(chunks_per_row, np.int32),
    }
    for name, dtype in TOKEN_FEATURES.items():
        row[name] = np.zeros(row_length, dtype)
    for name, dtype in CHUNK_FEATURES.items():
        row[name] = np.zeros(chunks_per_row, dtype)
    return to_batch([row]).map(lambda field: np.repeat(field, rows, axis=0))
