"""Replay: a recorded episode answers in the place of a model.

An agent that does what it did when it was recorded gets the same tokens again, wherever it runs and
without weights: for tests of agents and proxies, and to find out whether an agent is deterministic.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from rome.data.trajectory import Chunk
from rome.data.tree import path_to, resolve_parents
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import RequestRejected


class Replay:
    """The answers of an episode, by the ids of their contexts. It is a `session.Generator`.

    Args:
      chunks: of the record; those that nobody sampled are passed over.
      turn_ends: tokens that end a turn; an answer without one was cut at its limit.

    Attributes:
      left: answers that nobody has asked for.
    """

    def __init__(self, chunks: Sequence[Chunk], turn_ends: Sequence[int]) -> None:
        self.left = 0
        self._answers: dict[tuple[int, ...], collections.deque[Chunk]] = {}
        self._turn_ends = frozenset(turn_ends)
        parents = resolve_parents([chunk.parent for chunk in chunks])
        for number, chunk in enumerate(chunks):
            if chunk.kind == "context":
                continue
            context: list[int] = []
            for place in path_to(parents[number], parents):
                context += [*chunks[place].prompt_ids, *chunks[place].action_ids]
            key = (*context, *chunk.prompt_ids)
            self._answers.setdefault(key, collections.deque()).append(chunk)
            self.left += 1

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        """Return the next recorded answer in this context.

        Raises:
          RequestRejected: the record has none: the agent does something else than it did.
        """
        del deadline_seconds, affinity
        answers = self._answers.get(tuple(input_ids))
        if not answers:
            raise RequestRejected(
                f"the record has no further answer after these {len(input_ids)} tokens: the agent"
                " does something else than when it was recorded"
            )
        chunk = answers.popleft()
        self.left -= 1
        ends = bool(chunk.action_ids) and chunk.action_ids[-1] in self._turn_ends
        return Completion(
            output_ids=list(chunk.action_ids),
            logprobs=list(chunk.logprobs),
            finish_reason="stop" if ends else "length",
            versions=list(chunk.versions),
        )
