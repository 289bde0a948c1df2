"""From trajectories to rows of fixed shape, and from rows to micro-batches.

NumPy arrays; grain does the bin packing.

B rows, T tokens a row, C chunks a row, K turns of a trajectory, L layers, k experts a token. A row
packs several whole trajectories.

A chunk without a sampled token is no decision: its prompt is context of the next chunk, and it is
not counted among the chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import grain
import grain.experimental
import numpy as np

from rome.data.advantages import Anchor, Estimator, chunk_returns, group_advantages, loss_reward
from rome.data.batch import CONTEXT, IMITATION, RL, Batch
from rome.data.routes import join_routes
from rome.data.trajectory import KINDS, Chunk, Trajectory
from rome.model.config import ModelConfig

Purpose = Literal["rl", "sft"]
Example = dict[str, np.ndarray]  # one trajectory or text: its features, by token or by chunk

_TOKEN_FEATURES: dict[str, Any] = {
    "tokens": np.int32,
    "action_mask": bool,
    "chunk_start": bool,
    "version": np.int32,
    "logp_rollout": np.float32,
}
_CHUNK_FEATURES: dict[str, Any] = {
    "return": np.float32,
    "reward": np.float32,
    "sign": np.float32,
    "advantage": np.float32,
    "kind": np.int8,
}


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How a trajectory becomes an example; `pack` explains the fields."""

    row_length: int
    chunks_per_row: int
    gamma: float
    failure_reward: float
    purpose: Purpose = "rl"
    routes_for: ModelConfig | None = None
    denial_penalty: float = 0.0
    negative_weight: float = 1.0
    negative_tokens: int = 0


def pack(
    trajectories: Sequence[Trajectory],
    *,
    row_length: int,
    chunks_per_row: int,
    gamma: float,
    failure_reward: float,
    purpose: Purpose = "rl",
    routes_for: ModelConfig | None = None,
    advantage: Estimator = "normalised",
    anchor: Anchor = "history",
    denial_penalty: float = 0.0,
    negative_weight: float = 1.0,
    negative_tokens: int = 0,
) -> Batch[np.ndarray]:
    """Pack all trainable trajectories, each once and whole, into as few rows as best-fit finds.

    Infrastructure failures and cancelled episodes are left out, here and in the group statistics.
    The longest trajectory comes first. The same list gives the same rows.

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
      denial_penalty: subtracted from the reward of an episode that tried to reach a network address
        which its sandbox does not grant.
      negative_weight: multiplies return and reward of failures, and advantages below 0.
      negative_tokens: failures with more action tokens than this are only read; 0: learn from all.
        Negatives that grow longer come before a collapse.

    Returns:
      As many rows as were needed, none if nothing is trainable. logp_old_BT is zeros.

    Raises:
      ValueError: a trajectory does not fit a row, or a part of it is damaged.
    """
    options = ExampleOptions(
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        gamma=gamma,
        failure_reward=failure_reward,
        purpose=purpose,
        routes_for=routes_for,
        denial_penalty=denial_penalty,
        negative_weight=negative_weight,
        negative_tokens=negative_tokens,
    )
    trained = [one for one in trajectories if one.trainable and one.num_action_tokens]
    advantages = group_advantages(
        trained,
        failure_reward,
        advantage,
        gamma=gamma,
        anchor=anchor,
        denial_penalty=denial_penalty,
    )
    examples = []
    for trajectory, advantage_K in zip(trained, advantages, strict=True):
        examples.append(to_example(trajectory, advantage_K, options))
    return pack_examples(examples, row_length, chunks_per_row, routes=routes_for is not None)


def fits_row(trajectory: Trajectory, row_length: int, chunks_per_row: int) -> bool:
    """Return whether a row of this size can hold a trajectory."""
    turns = trajectory.turns
    return count_tokens(turns) <= row_length and len(turns) <= chunks_per_row


def count_tokens(turns: Sequence[tuple[list[int], Chunk]]) -> int:
    """Return how many tokens the (prompt ids, chunk) of a trajectory's turns take in a row."""
    return sum(len(prompt_ids) + len(chunk.action_ids) for prompt_ids, chunk in turns)


def pack_examples(
    examples: list[Example],
    row_length: int,
    chunks_per_row: int,
    routes: bool = False,
) -> Batch[np.ndarray]:
    """Pack all examples, each once and whole; the longest first.

    Args:
      examples: as `to_example` and `text_example` make them.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      routes: whether the examples have routes.
    """
    if not examples:
        return _empty_rows(0, row_length, chunks_per_row)
    # sorted is stable: examples of equal length keep their order
    longest_first = sorted(examples, key=lambda example: -len(example["tokens"]))
    without_prefetch = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = grain.MapDataset.source(longest_first).to_iter_dataset(without_prefetch)
    rows = pack_stream(stream, row_length, chunks_per_row, bins=len(examples), routes=routes)
    return to_batch(list(rows))


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
    missing = -batch.num_rows % rows_per_microbatch
    starts = range(0, batch.num_rows, rows_per_microbatch)
    if not missing:
        return [_take_rows(batch, start, start + rows_per_microbatch) for start in starts]
    _, T = batch.tokens_BT.shape
    _, C = batch.valid_BC.shape
    empty = _empty_rows(missing, T, C)
    if batch.routes_BTLk is not None:
        shape = (missing, *batch.routes_BTLk.shape[1:])
        empty = empty._replace(routes_BTLk=np.zeros(shape, batch.routes_BTLk.dtype))
    full = batch.map(lambda field, padding: np.concatenate([field, padding]), empty)
    return [_take_rows(full, start, start + rows_per_microbatch) for start in starts]


def _take_rows(batch: Batch[np.ndarray], start: int, stop: int) -> Batch[np.ndarray]:
    return batch.map(lambda field: field[start:stop])


def to_example(
    trajectory: Trajectory, advantage: float | np.ndarray, options: ExampleOptions
) -> Example:
    """Return a trajectory's features of two lengths, its tokens and its chunks.

    Args:
      trajectory: a trainable one.
      advantage: of the trajectory, or of each of its K turns.
      options: as for `pack`.

    Raises:
      ValueError: a row cannot hold it, it has nothing to train on, or a part of it is damaged.
    """
    turns = trajectory.turns
    _check_fits(trajectory, turns, options)
    per_chunk = _chunk_features(trajectory, advantage, options)
    pieces = [_token_features(trajectory, prompt_ids, chunk) for prompt_ids, chunk in turns]
    example = {}
    for name, dtype in _TOKEN_FEATURES.items():
        joined = np.concatenate([piece[name] for piece in pieces])
        example[name] = np.asarray(joined, dtype)
    for name, dtype in _CHUNK_FEATURES.items():
        example[name] = np.asarray(per_chunk[name], dtype)
    if options.routes_for is not None:
        routes = _routes(trajectory, options.routes_for)
        example["routes"] = routes[: len(example["tokens"])]
    return example


def text_example(tokens: Sequence[int] | np.ndarray) -> Example:
    """Return the features of a piece of plain text, as one chunk sampled by a policy.

    Args:
      tokens: two or more; all but the first are learned.
    """
    places = np.arange(len(tokens))
    example = {}
    for name, dtype in _TOKEN_FEATURES.items():
        example[name] = np.zeros(len(tokens), dtype)
    for name, dtype in _CHUNK_FEATURES.items():
        example[name] = np.zeros(1, dtype)
    example["tokens"] = np.asarray(tokens, np.int32)
    example["action_mask"] = places > 0
    example["chunk_start"] = places == 1
    example["kind"] = np.full(1, IMITATION, np.int8)
    return example


def pack_stream(
    examples: grain.IterDataset,
    row_length: int,
    chunks_per_row: int,
    bins: int,
    routes: bool = False,
) -> grain.IterDataset:
    """Pack a stream of examples into a stream of rows for `to_batch`, best-fit.

    The iterator's get_state and set_state resume at an exact row.

    Args:
      examples: as `to_example` and `text_example` make them.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      bins: rows that are open at a time.
      routes: whether the examples have routes.
    """
    lengths = dict.fromkeys(_TOKEN_FEATURES, row_length)
    lengths |= dict.fromkeys(_CHUNK_FEATURES, chunks_per_row)
    if routes:
        lengths["routes"] = row_length
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
        routes_BTLk=stacked.get("routes"),
    )


def _empty_rows(rows: int, row_length: int, chunks_per_row: int) -> Batch[np.ndarray]:
    row = {
        "tokens_positions": np.zeros(row_length, np.int32),
        "tokens_segment_ids": np.zeros(row_length, np.int32),
        "kind_segment_ids": np.zeros(chunks_per_row, np.int32),
    }
    for name, dtype in _TOKEN_FEATURES.items():
        row[name] = np.zeros(row_length, dtype)
    for name, dtype in _CHUNK_FEATURES.items():
        row[name] = np.zeros(chunks_per_row, dtype)
    return to_batch([row]).map(lambda field: np.repeat(field, rows, axis=0))


def _chunk_features(
    trajectory: Trajectory, advantage: float | np.ndarray, options: ExampleOptions
) -> Example:
    turns = trajectory.turns
    reward = loss_reward(trajectory, options.failure_reward, options.denial_penalty)
    is_positive = reward > 0  # T+ of Eq. 9, also where the task is only partly solved
    weight = 1.0 if is_positive else options.negative_weight
    kinds_K = np.array([_kind(chunk, options.purpose) for _, chunk in turns])
    if not is_positive and _is_too_long(turns, options.negative_tokens):
        kinds_K = np.where(kinds_K == RL, CONTEXT, kinds_K)
    ones_K = np.ones(len(turns))
    advantage_weight_K = np.where(advantage * ones_K < 0, options.negative_weight, 1.0)
    return {
        "return": weight * chunk_returns(reward, len(turns), options.gamma),
        "reward": weight * reward * ones_K,
        "sign": (1.0 if is_positive else -1.0) * ones_K,
        "advantage": advantage_weight_K * advantage,
        "kind": kinds_K,
    }


def _is_too_long(turns: list[tuple[list[int], Chunk]], limit: int) -> bool:
    """Return whether the policy sampled more tokens than the limit; 0 is no limit."""
    sampled = sum(len(chunk.action_ids) for _, chunk in turns if chunk.kind == "rl")
    return 0 < limit < sampled


def _kind(chunk: Chunk, purpose: Purpose) -> int:
    if purpose == "rl":
        return KINDS.index(chunk.kind)
    if purpose == "sft":  # Eq. 2: a turn whose call failed is read, not imitated
        imitated = chunk.status == "ok" and chunk.kind != "context"
        return IMITATION if imitated else CONTEXT
    raise ValueError(f"purpose {purpose!r} unknown; known: rl, sft")


def _token_features(trajectory: Trajectory, prompt_ids: list[int], chunk: Chunk) -> Example:
    num_read = len(prompt_ids)
    places = np.arange(num_read + len(chunk.action_ids))
    read_versions = np.zeros(num_read, np.int32)
    read_logprobs = np.zeros(num_read, np.float32)
    return {
        "tokens": np.asarray([*prompt_ids, *chunk.action_ids], np.int32),
        "action_mask": places >= num_read,
        "chunk_start": places == num_read,
        "version": np.concatenate([read_versions, _versions(trajectory, chunk)]),
        "logp_rollout": np.concatenate([read_logprobs, np.asarray(chunk.logprobs, np.float32)]),
    }


def _routes(trajectory: Trajectory, config: ModelConfig) -> np.ndarray:
    """Return the routes of all chunks, [tokens, L, k]; 0 for chunks that no engine sampled."""
    if any(chunk.versions and chunk.routes is None for chunk in trajectory.chunks):
        raise ValueError(
            f"{_name(trajectory)} was sampled without routes, so there is nothing to replay; play"
            " it again with an engine that returns them (SGLang: --enable-return-routed-experts),"
            " or set routing_replay to off or recompute"
        )
    pieces = []
    for chunk in trajectory.chunks:
        tokens = len(chunk.prompt_ids) + len(chunk.action_ids)
        pieces.append((chunk.routes, tokens))
    try:
        return join_routes(pieces, config)
    except ValueError as error:
        raise ValueError(
            f"{_name(trajectory)}: {error}; it was sampled by another model, or its file is damaged"
        ) from error


def _versions(trajectory: Trajectory, chunk: Chunk) -> np.ndarray:
    """Return the weight version of each action token; 0 if no engine sampled the chunk."""
    if not chunk.versions:
        return np.zeros(len(chunk.action_ids), np.int32)
    versions = np.full(len(chunk.action_ids), -1, np.int32)
    for version, start, end in chunk.versions:
        versions[start:end] = version
    if (versions < 0).any():
        raise ValueError(
            f"version spans {chunk.versions} of {_name(trajectory)} leave some of {len(versions)}"
            " action tokens without a weight version; record one for every token"
        )
    return versions


def _check_fits(
    trajectory: Trajectory, turns: list[tuple[list[int], Chunk]], options: ExampleOptions
) -> None:
    name = _name(trajectory)
    if not trajectory.trainable or not turns:
        raise ValueError(
            f"{name} ended as {trajectory.ending} with {trajectory.num_action_tokens} action"
            " tokens: nothing to train; leave it out"
        )
    tokens = count_tokens(turns)
    if tokens > options.row_length:
        raise ValueError(
            f"{name} has {tokens} tokens but row_length is {options.row_length}; raise row_length"
            " or lower the episode's max_context"
        )
    if len(turns) > options.chunks_per_row:
        raise ValueError(
            f"{name} has {len(turns)} chunks but chunks_per_row is {options.chunks_per_row}; raise"
            " chunks_per_row or lower the episode's turns"
        )
    first_prompt_ids, _ = turns[0]
    if not first_prompt_ids:
        raise ValueError(
            f"{name} begins with a sampled token, which nothing predicts; its first chunk needs"
            " prompt_ids"
        )
    if not all(np.isfinite(chunk.logprobs).all() for _, chunk in turns):
        raise ValueError(
            f"{name} has a logprob that is not finite; end such an episode as infra_engine"
        )


def _name(trajectory: Trajectory) -> str:
    return (
        f"trajectory {trajectory.task} (group {trajectory.group}, episode {trajectory.episode},"
        f" seed {trajectory.seed})"
    )
