"""Records that have the ids of their tokens: these are kept, nothing is tokenised again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rome.data.formats.conversation import UnfitError
from rome.data.trajectory import Chunk, Trajectory


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call of the model, as engines record it.

    Args:
      prompt_ids: the whole prompt with its history.
      action_ids: what was sampled.
      logprobs: of the sampled tokens; None where they were not kept.
      text: what the record says was written, or a part of it.
    """

    prompt_ids: list[int]
    action_ids: list[int]
    logprobs: list[float] | None
    text: str = ""


def ids_of(value: Any, what: str) -> list[int]:
    """Return a list of token ids, which may be spelt as texts.

    Raises:
      UnfitError: it is something else.
    """
    if not isinstance(value, list):
        raise UnfitError(f"{what} are a {type(value).__name__}, not a list of token ids")
    try:
        ids = [int(token) for token in value if not isinstance(token, (bool, float))]
    except (TypeError, ValueError):
        ids = []
    if len(ids) < len(value) or any(token < 0 for token in ids):
        raise UnfitError(f"{what} hold something that is no token id")
    return ids


def join_turns(turns: Sequence[Turn], reward: float | None) -> Trajectory:
    """Return the trajectory of turns whose prompts each go on from the turn before.

    Raises:
      UnfitError: a prompt does not, so that its history was rendered anew; or nothing was sampled.
    """
    history: list[int] = []
    chunks = []
    for number, turn in enumerate(turns, 1):
        if turn.prompt_ids[: len(history)] != history:
            raise UnfitError(
                f"the prompt of turn {number} does not go on from the tokens of the turn before:"
                " its history was tokenised anew"
            )
        chunks.append(_chunk_of(turn, turn.prompt_ids[len(history) :], number))
        history = [*turn.prompt_ids, *turn.action_ids]
    reward = 1.0 if reward is None else reward
    return Trajectory("", "", chunks, reward, "success" if reward > 0 else "failure")


def _chunk_of(turn: Turn, prompt_ids: list[int], number: int) -> Chunk:
    if not turn.action_ids:
        raise UnfitError(f"turn {number} has no sampled token")
    logprobs = turn.logprobs
    if logprobs is None:
        logprobs = [0.0] * len(turn.action_ids)
    is_number = all(isinstance(one, (int, float)) and math.isfinite(one) for one in logprobs)
    if len(logprobs) != len(turn.action_ids) or not is_number:
        raise UnfitError(f"turn {number} has not one finite logprob for each sampled token")
    return Chunk(prompt_ids, turn.action_ids, list(logprobs), text=turn.text, kind="imitation")
