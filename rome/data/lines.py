"""From trajectories to examples: what is learned from each line of an episode, by token and chunk.

NumPy arrays. T tokens of a line, K turns of an episode.

A chunk without a sampled token is no decision: its prompt is context of the next chunk, and it is
not counted among the chunks. A turn that several lines share is trained in the first of them and
context in the others, so each sampled token is trained once. K, and with it the returns, counts the
turns of the whole episode in the order of time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rome.data.advantages import chunk_returns, loss_reward
from rome.data.batch import CONTEXT, IMITATION, RL
from rome.data.costs import chunk_costs, discounted_costs
from rome.data.trajectory import KINDS, Chunk, Trajectory
from rome.data.tree import credits_of, lines_of, path_to

Purpose = Literal["rl", "sft"]
Example = dict[str, np.ndarray]  # one line or text: its features, by token or by chunk

TOKEN_FEATURES: dict[str, Any] = {
    "tokens": np.int32,
    "action_mask": bool,
    "chunk_start": bool,
    "version": np.int32,
    "logp_rollout": np.float32,
}
CHUNK_FEATURES: dict[str, Any] = {
    "return": np.float32,
    "reward": np.float32,
    "sign": np.float32,
    "advantage": np.float32,
    "kind": np.int8,
    "lines": np.float32,
}


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How a trajectory becomes an example; `pack` explains the fields."""

    row_length: int
    chunks_per_row: int
    gamma: float
    failure_reward: float
    purpose: Purpose = "rl"
    with_places: bool = False  # where the route of each token is: "places" of the example
    safety_cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    negative_weight: float = 1.0
    negative_tokens: int = 0
    edge_credit: Mapping[str, float] = dataclasses.field(default_factory=dict)


def fits_row(trajectory: Trajectory, row_length: int, chunks_per_row: int) -> bool:
    """Return whether a row of this size can hold each line of a trajectory."""
    turns = trajectory.turns
    for line in lines_of(trajectory.turn_parents):
        on_line = [turns[number] for number in line]
        if count_tokens(on_line) > row_length or len(line) > chunks_per_row:
            return False
    return True


def count_tokens(turns: Sequence[tuple[list[int], Chunk]]) -> int:
    """Return how many tokens the (prompt ids, chunk) of a trajectory's turns take in a row."""
    return sum(len(prompt_ids) + len(chunk.action_ids) for prompt_ids, chunk in turns)


def to_examples(
    trajectory: Trajectory, advantage: float | np.ndarray, options: ExampleOptions
) -> list[Example]:
    """Return the features of each line of a trajectory, by tokens and by chunks.

    A turn that several lines share is trained in the first of them and context in the others. Of
    an episode with branches, lines that train nothing are left out.

    Args:
      trajectory: a trainable one.
      advantage: of the trajectory, or of each of its K turns.
      options: as for `pack`.

    Raises:
      ValueError: a row cannot hold it, it has nothing to train on, or a part of it is damaged.
    """
    turns = trajectory.turns
    lines = lines_of(trajectory.turn_parents)
    _check_fits(trajectory, turns, lines, options)
    per_chunk = _chunk_features(trajectory, advantage, options)
    kinds_K = per_chunk["kind"]
    kept = _lines_to_train(lines, kinds_K)
    sampled = [number for number, chunk in enumerate(trajectory.chunks) if chunk.action_ids]
    examples = []
    for line, kinds in kept:
        features = {name: values_K[line] for name, values_K in per_chunk.items()}
        features |= {"kind": kinds, "lines": np.full(len(line), len(kept))}
        on_line = [turns[number] for number in line]
        example = _line_example(trajectory, on_line, features)
        if options.with_places:
            example["places"] = _places(trajectory, sampled[line[-1]])
        examples.append(example)
    _check_trained_once(trajectory, turns, kinds_K, examples)
    return examples


def _lines_to_train(
    lines: list[list[int]], kinds_K: np.ndarray
) -> list[tuple[list[int], np.ndarray]]:
    """Return the turns of each line that trains some, and the kinds that they have there."""
    kept = []
    seen = np.zeros(len(kinds_K), bool)
    for line in lines:
        kinds = np.where(seen[line], CONTEXT, kinds_K[line])
        if len(lines) > 1 and (kinds == CONTEXT).all():
            continue
        seen[line] = True
        kept.append((line, kinds))
    return kept


def _line_example(
    trajectory: Trajectory, on_line: list[tuple[list[int], Chunk]], per_chunk: Example
) -> Example:
    """Return the features of one line, given its turns and their features."""
    pieces = [_token_features(trajectory, *turn) for turn in on_line]
    example = {}
    for name, dtype in TOKEN_FEATURES.items():
        joined = np.concatenate([piece[name] for piece in pieces])
        example[name] = np.asarray(joined, dtype)
    for name, dtype in CHUNK_FEATURES.items():
        example[name] = np.asarray(per_chunk[name], dtype)
    return example


def text_example(tokens: Sequence[int] | np.ndarray) -> Example:
    """Return the features of a piece of plain text, as one chunk sampled by a policy.

    Args:
      tokens: two or more; all but the first are learned.
    """
    places = np.arange(len(tokens))
    example = {}
    for name, dtype in TOKEN_FEATURES.items():
        example[name] = np.zeros(len(tokens), dtype)
    for name, dtype in CHUNK_FEATURES.items():
        example[name] = np.zeros(1, dtype)
    example["tokens"] = np.asarray(tokens, np.int32)
    example["action_mask"] = places > 0
    example["chunk_start"] = places == 1
    example["kind"] = np.full(1, IMITATION, np.int8)
    return example


def _chunk_features(
    trajectory: Trajectory, advantage: float | np.ndarray, options: ExampleOptions
) -> Example:
    turns = trajectory.turns
    cost_K = chunk_costs(trajectory, options.safety_cost)
    before_costs = loss_reward(trajectory, options.failure_reward)
    reward = before_costs - float(cost_K.sum())
    return_K = chunk_returns(before_costs, len(turns), options.gamma)
    return_K = return_K - discounted_costs(cost_K, options.gamma)
    is_positive = reward > 0  # T+ of Eq. 9, also where the task is only partly solved
    weight = 1.0 if is_positive else options.negative_weight
    kinds_K = np.array([_kind(chunk, options.purpose) for _, chunk in turns])
    if not is_positive and _is_too_long(turns, options.negative_tokens):
        kinds_K = np.where(kinds_K == RL, CONTEXT, kinds_K)
    ones_K = np.ones(len(turns))
    advantage_weight_K = np.where(advantage * ones_K < 0, options.negative_weight, 1.0)
    credit_K = _credits(trajectory, options)
    # A turn that costs more than it leads to fades out as it becomes unlikely, as a failure's do.
    is_gain_K = is_positive & (return_K > 0)
    return {
        "return": credit_K * weight * return_K,
        "reward": credit_K * weight * reward * ones_K,
        "sign": np.where(is_gain_K, 1.0, -1.0),
        "advantage": credit_K * advantage_weight_K * advantage,
        "kind": np.where(credit_K > 0, kinds_K, CONTEXT),
    }


def _credits(trajectory: Trajectory, options: ExampleOptions) -> np.ndarray:
    """Return the weight of each turn's credit by the edges of the tree, [K]."""
    edges = [chunk.edge for chunk in trajectory.chunks]
    weights = credits_of(trajectory.parents, edges, options.edge_credit)
    sampled = [bool(chunk.action_ids) for chunk in trajectory.chunks]
    return np.array(weights)[sampled]


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


def _places(trajectory: Trajectory, leaf: int) -> np.ndarray:
    """Return (chunk, token of the chunk) of each token on the line to a chunk."""
    pieces = []
    for number in path_to(leaf, trajectory.parents):
        chunk = trajectory.chunks[number]
        offsets = np.arange(len(chunk.prompt_ids) + len(chunk.action_ids), dtype=np.int32)
        pieces.append(np.stack([np.full_like(offsets, number), offsets], axis=1))
    return np.concatenate(pieces)


def _versions(trajectory: Trajectory, chunk: Chunk) -> np.ndarray:
    """Return the weight version of each action token; 0 if no engine sampled the chunk."""
    if not chunk.versions:
        return np.zeros(len(chunk.action_ids), np.int32)
    versions = np.full(len(chunk.action_ids), -1, np.int32)
    for version, start, end in chunk.versions:
        versions[start:end] = version
    if (versions < 0).any():
        raise ValueError(
            f"version spans {chunk.versions} of {name_of(trajectory)} leave some of {len(versions)}"
            " action tokens without a weight version; record one for every token"
        )
    return versions


def _check_fits(
    trajectory: Trajectory,
    turns: list[tuple[list[int], Chunk]],
    lines: list[list[int]],
    options: ExampleOptions,
) -> None:
    name = name_of(trajectory)
    if not trajectory.trainable or not turns:
        raise ValueError(
            f"{name} ended as {trajectory.ending} with {trajectory.num_action_tokens} action"
            " tokens: nothing to train; leave it out"
        )
    for line in lines:
        on_line = [turns[number] for number in line]
        tokens = count_tokens(on_line)
        if tokens > options.row_length:
            raise ValueError(
                f"{name} has {tokens} tokens but row_length is {options.row_length}; raise"
                " row_length or lower the episode's max_context"
            )
        if len(line) > options.chunks_per_row:
            raise ValueError(
                f"{name} has {len(line)} chunks but chunks_per_row is {options.chunks_per_row};"
                " raise chunks_per_row or lower the episode's turns"
            )
        first_prompt_ids, _ = on_line[0]
        if not first_prompt_ids:
            raise ValueError(
                f"{name} begins with a sampled token, which nothing predicts; its first chunk"
                " needs prompt_ids"
            )
    if not all(np.isfinite(chunk.logprobs).all() for _, chunk in turns):
        raise ValueError(
            f"{name} has a logprob that is not finite; end such an episode as infra_engine"
        )


def _check_trained_once(
    trajectory: Trajectory,
    turns: list[tuple[list[int], Chunk]],
    kinds_K: np.ndarray,
    examples: list[Example],
) -> None:
    """Check that the lines together train each token once that is to be trained."""
    pairs = zip(turns, kinds_K, strict=True)
    wanted = sum(len(chunk.action_ids) for (_, chunk), kind in pairs if kind != CONTEXT)
    trained = 0
    for example in examples:
        chunk_T = np.cumsum(example["chunk_start"]) - 1
        is_trained_T = example["kind"][np.maximum(chunk_T, 0)] != CONTEXT
        trained += int(np.count_nonzero(example["action_mask"] & is_trained_T))
    if trained != wanted:
        raise ValueError(
            f"{name_of(trajectory)} would train {trained} tokens of {wanted} that were sampled;"
            " its tree of chunks is damaged"
        )


def name_of(trajectory: Trajectory) -> str:
    """Return the name of a trajectory, for messages."""
    return (
        f"trajectory {trajectory.task} (group {trajectory.group}, episode {trajectory.episode},"
        f" seed {trajectory.seed})"
    )
