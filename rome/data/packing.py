"""From trajectories to rows of fixed shape, and from rows to micro-batches.

NumPy arrays; grain does the bin packing.

B rows, T tokens a row, C chunks a row, L layers, k experts a token. A row packs several whole
trajectories.

A chunk without a sampled token is no decision: its prompt is context of the next chunk, and it is
not counted among the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import grain
import grain.experimental
import numpy as np

from rome.data.advantages import Anchor, Estimator, group_advantages, loss_reward
from rome.data.batch import CONTEXT, IMITATION, RL, Batch
from rome.data.routes import join_routes
from rome.data.trajectory import KINDS, Chunk, Trajectory
from rome.losses.ipa import chunk_returns
from rome.model.config import ModelConfig

Purpose = Literal["rl", "sft"]


_TOKEN_FEATURES = {
    "tokens": np.int32,
    "action_mask": bool,
    "chunk_start": bool,
    "version": np.int32,
    "logp_rollout": np.float32,
}
_CHUNK_FEATURES = {
    "return": np.float32,
    "reward": np.float32,
    "sign": np.float32,
    "advantage": np.float32,
    "kind": np.int8,
}


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
) -> Batch:
    """All trainable trajectories, each once and whole, in as few rows as best-fit finds; the
    longest first.

    Infrastructure failures and cancelled episodes are left out, here and in the group statistics.
    Give a whole step, or whole groups: advantages are taken within `Trajectory.group` over what is
    given.

    Args:
      gamma: discount per chunk (Eq. 7).
      failure_reward: stands for every reward <= 0; 0.0 learns from successes only.
      purpose: "sft" learns from chunks of status "ok" that are not context; "rl" from every action
        the policy took.
      routes_for: the model that is to replay the chunks' routes; they are checked against it. None:
        the batch has no routes.
      denial_penalty: what an episode loses that reached for a network which its sandbox does not
        grant.
      advantage, anchor: how a group is compared (`rome.data.advantages`).
      negative_weight: what failures count beside successes: it multiplies their return and reward,
        and advantages below 0.
      negative_tokens: failures with more action tokens than this are only read; 0: all are learnt
        from. Negatives that grow longer come before a collapse.
    Returns:
      As many rows as were needed, none if nothing is trainable. The same list gives the same rows.
    """
    trajectories = [
        trajectory
        for trajectory in trajectories
        if trajectory.trainable and trajectory.num_action_tokens
    ]
    advantages = group_advantages(
        trajectories,
        failure_reward,
        advantage,
        gamma=gamma,
        anchor=anchor,
        denial_penalty=denial_penalty,
    )
    examples = [
        to_example(
            trajectory,
            row_length=row_length,
            chunks_per_row=chunks_per_row,
            gamma=gamma,
            failure_reward=failure_reward,
            advantage=advantage_K,
            purpose=purpose,
            routes_for=routes_for,
            denial_penalty=denial_penalty,
            negative_weight=negative_weight,
            negative_tokens=negative_tokens,
        )
        for trajectory, advantage_K in zip(trajectories, advantages)
    ]
    return pack_examples(examples, row_length, chunks_per_row, routes_for is not None)


def pack_examples(
    examples: list[dict[str, np.ndarray]],
    row_length: int,
    chunks_per_row: int,
    routes: bool = False,
) -> Batch:
    """All of these, each once and whole; the longest first."""
    if not examples:
        return _empty_rows(0, row_length, chunks_per_row)
    examples = sorted(
        examples, key=lambda example: -len(example["tokens"])
    )  # stable, so ties keep their order
    without_prefetch = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = grain.MapDataset.source(examples).to_iter_dataset(without_prefetch)
    return to_batch(
        list(pack_stream(stream, row_length, chunks_per_row, bins=len(examples), routes=routes))
    )


def microbatches(batch: Batch, rows_per_microbatch: int) -> list[Batch]:
    """Cuts the rows into batches of one shape; the last one is filled up with empty rows, which
    carry no loss.
    """
    if rows_per_microbatch < 1:
        raise ValueError(f"rows_per_microbatch is {rows_per_microbatch}; set it to 1 or more")
    missing = -batch.num_rows % rows_per_microbatch
    empty = _empty_rows(missing, batch.tokens_BT.shape[1], batch.valid_BC.shape[1])
    if batch.routes_BTLk is not None:
        empty = empty._replace(
            routes_BTLk=np.zeros_like(
                batch.routes_BTLk, shape=(missing, *batch.routes_BTLk.shape[1:])
            )
        )
    full = batch.map(lambda *pair: np.concatenate(pair), empty)
    starts = range(0, full.num_rows, rows_per_microbatch)
    return [full.map(lambda field: field[start : start + rows_per_microbatch]) for start in starts]


def to_example(
    trajectory: Trajectory,
    *,
    row_length: int,
    chunks_per_row: int,
    gamma: float,
    failure_reward: float,
    advantage: float | np.ndarray,
    purpose: Purpose,
    routes_for: ModelConfig | None = None,
    denial_penalty: float = 0.0,
    negative_weight: float = 1.0,
    negative_tokens: int = 0,
) -> dict[str, np.ndarray]:
    """One trajectory as features of two lengths, its tokens and its chunks.

    Raises ValueError if a row cannot hold it.

    advantage: of the trajectory, or of each of its turns.
    """
    turns = trajectory.turns
    _check_fits(trajectory, turns, row_length, chunks_per_row)
    reward = loss_reward(trajectory, failure_reward, denial_penalty)
    everywhere = np.ones(len(turns))
    weight = 1.0 if reward > 0 else negative_weight
    too_long = reward <= 0 and 0 < negative_tokens < sum(
        len(chunk.action_ids) for _, chunk in turns if chunk.kind == "rl"
    )
    kinds = np.array([_kind(chunk, purpose) for _, chunk in turns])
    per_chunk = {
        "return": weight * chunk_returns(reward, len(turns), gamma),
        "reward": weight * reward * everywhere,
        "sign": (1.0 if reward > 0 else -1.0) * everywhere,
        "advantage": np.where(advantage * everywhere < 0, negative_weight, 1.0) * advantage,
        "kind": np.where((kinds == RL) & too_long, CONTEXT, kinds),
    }
    pieces = [_token_features(trajectory, prompt_ids, chunk) for prompt_ids, chunk in turns]
    per_token = {
        name: np.concatenate([piece[name] for piece in pieces]) for name in _TOKEN_FEATURES
    }
    example = {
        name: np.asarray(per_token[name], dtype) for name, dtype in _TOKEN_FEATURES.items()
    } | {name: np.asarray(per_chunk[name], dtype) for name, dtype in _CHUNK_FEATURES.items()}
    return (
        example
        if routes_for is None
        else example | {"routes": _routes(trajectory, routes_for)[: len(example["tokens"])]}
    )


def text_example(tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """A piece of plain text of two tokens or more, every one but the first to be learnt: one chunk,
    as if a policy had said it.
    """
    zeros = {name: np.zeros(len(tokens), dtype) for name, dtype in _TOKEN_FEATURES.items()}
    places = np.arange(len(tokens))
    chunk = {name: np.zeros(1, dtype) for name, dtype in _CHUNK_FEATURES.items()}
    return (
        zeros
        | chunk
        | {
            "tokens": np.asarray(tokens, np.int32),
            "action_mask": places > 0,
            "chunk_start": places == 1,
            "kind": np.full(1, IMITATION, np.int8),
        }
    )


def pack_stream(
    examples: grain.IterDataset,
    row_length: int,
    chunks_per_row: int,
    bins: int,
    routes: bool = False,
) -> grain.IterDataset:
    """Best-fit over `bins` open rows at a time; for `to_batch`.

    Its iterator's get_state/set_state resume at an exact row.
    """
    lengths = (
        dict.fromkeys(_TOKEN_FEATURES, row_length)
        | dict.fromkeys(_CHUNK_FEATURES, chunks_per_row)
        | ({"routes": row_length} if routes else {})
    )
    # grain adds segments and positions to every feature that is not called meta: one of each length
    # is enough.
    meta = [name for name in lengths if name not in ("tokens", "kind")]
    return grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct=lengths,
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=meta,
    )


def to_batch(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stacks rows of `pack_stream`."""
    row = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    # Chunks lie in the row in the order of their tokens, so the n-th start belongs to the row's
    # n-th chunk.
    chunk_ids_BT = np.where(
        row["action_mask"], np.cumsum(row["chunk_start"], axis=1) - 1, -1
    ).astype(np.int32)
    return Batch(
        tokens_BT=row["tokens"],
        positions_BT=row["tokens_positions"],
        segments_BT=row["tokens_segment_ids"],
        action_mask_BT=row["action_mask"],
        chunk_ids_BT=chunk_ids_BT,
        version_BT=row["version"],
        logp_rollout_BT=row["logp_rollout"],
        logp_old_BT=np.zeros_like(row["logp_rollout"]),
        return_BC=row["return"],
        reward_BC=row["reward"],
        sign_BC=row["sign"],
        advantage_BC=row["advantage"],
        trajectory_BC=row["kind_segment_ids"],
        kind_BC=row["kind"],
        valid_BC=row["kind_segment_ids"] > 0,
        routes_BTLk=row.get("routes"),
    )


def _empty_rows(rows: int, row_length: int, chunks_per_row: int) -> Batch:
    lengths = dict.fromkeys(_TOKEN_FEATURES, row_length) | dict.fromkeys(
        _CHUNK_FEATURES, chunks_per_row
    )
    lengths |= {
        "tokens_positions": row_length,
        "tokens_segment_ids": row_length,
        "kind_segment_ids": chunks_per_row,
    }
    dtypes = _TOKEN_FEATURES | _CHUNK_FEATURES
    row = {name: np.zeros(length, dtypes.get(name, np.int32)) for name, length in lengths.items()}
    return to_batch([row]).map(lambda field: np.repeat(field, rows, axis=0))


def _kind(chunk: Chunk, purpose: Purpose) -> int:
    if purpose == "rl":
        return KINDS.index(chunk.kind)
    if purpose == "sft":  # Eq. 2: an erroneous turn is read, not imitated
        return IMITATION if chunk.status == "ok" and chunk.kind != "context" else CONTEXT
    raise ValueError(f"purpose {purpose!r} unknown; known: rl, sft")


def _token_features(
    trajectory: Trajectory, prompt_ids: list[int], chunk: Chunk
) -> dict[str, np.ndarray]:
    read, acted = len(prompt_ids), len(chunk.action_ids)
    start = np.zeros(read + acted, bool)
    start[read] = True
    return {
        "tokens": np.concatenate(
            [np.asarray(prompt_ids, np.int32), np.asarray(chunk.action_ids, np.int32)]
        ),
        "action_mask": np.arange(read + acted) >= read,
        "chunk_start": start,
        "version": np.concatenate([np.zeros(read, np.int32), _versions(trajectory, chunk)]),
        "logp_rollout": np.concatenate(
            [np.zeros(read, np.float32), np.asarray(chunk.logprobs, np.float32)]
        ),
    }


def _routes(trajectory: Trajectory, config: ModelConfig) -> np.ndarray:
    """[tokens, L, k]; 0 for the chunks that no engine sampled."""
    if any(chunk.versions and chunk.routes is None for chunk in trajectory.chunks):
        raise ValueError(
            f"{_name(trajectory)} was sampled without routes, so there is nothing to replay; play"
            " it again with an engine that returns them (SGLang: --enable-return-routed-experts),"
            " or set routing_replay to off or recompute"
        )
    try:
        return join_routes(
            [
                (chunk.routes, len(chunk.prompt_ids) + len(chunk.action_ids))
                for chunk in trajectory.chunks
            ],
            config,
        )
    except ValueError as error:
        raise ValueError(
            f"{_name(trajectory)}: {error}; it was sampled by another model, or its file is damaged"
        ) from error


def _versions(trajectory: Trajectory, chunk: Chunk) -> np.ndarray:
    """The weight version of each action token; 0 throughout for a chunk that no engine sampled (an
    expert's).
    """
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
    trajectory: Trajectory,
    turns: list[tuple[list[int], Chunk]],
    row_length: int,
    chunks_per_row: int,
) -> None:
    name = _name(trajectory)
    if not trajectory.trainable or not turns:
        raise ValueError(
            f"{name} ended as {trajectory.ending} with {trajectory.num_action_tokens} action"
            " tokens: nothing to train; leave it out"
        )
    tokens = sum(len(prompt_ids) + len(chunk.action_ids) for prompt_ids, chunk in turns)
    if tokens > row_length:
        raise ValueError(
            f"{name} has {tokens} tokens but row_length is {row_length}; raise row_length or lower"
            " the episode's max_context"
        )
    if len(turns) > chunks_per_row:
        raise ValueError(
            f"{name} has {len(turns)} chunks but chunks_per_row is {chunks_per_row}; raise"
            " chunks_per_row or lower the episode's turns"
        )
    if not turns[0][0]:
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
