"""Session: the one place of an episode that owns token ids.

Whoever plays the episode (the loop, a dialogue, an agent with sub-agents) says which chunk to go on
from and what was appended since. The session sends all ids of that context to the engine and keeps
what came back as a chunk: ids, logprobs, versions and routes, as they came. Nothing is rendered or
tokenised here, so what was sampled is what is trained on.

Calls may overlap. A chunk is recorded when its answer is there, so chunks are in the order of time.
The seed of a call derives from the episode's seed, the ids of its context, and how many earlier
calls had the same context: never from the order in which calls arrive.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rome.data.routes import extend_routes
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk
from rome.data.tree import EDGES, LAST, ROOT, path_to, resolve_parents
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineFailed
from rome.model.tokenizer import Tokenizer


class Generator(Protocol):
    """The method of an engine, or of a pool of engines, that a session uses."""

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion: ...


class SessionError(ValueError):
    """A call that this session does not take; the message says why."""


class ContextFull(SessionError):
    """The context has no room for a sampled token."""


class TruncatedParent(SessionError):
    """The answer to go on from was cut before its end, so nothing can follow it."""


class Session:
    """The token ids of one episode, and its engine.

    Args:
      engine: samples the answers.
      tokenizer: of the model; its turn ends are left out of a chunk's text.
      seed: of the episode.
      max_context: tokens of one context, prompts and answers together.
      max_new_tokens: tokens of one answer, at most.
      completion_seconds: for one answer of the engine, its queue included.
      temperature: of sampling, where a call names no other.
      routes: whether to ask the engine for the experts of each token, and to keep them.
      chunks: of a replayed prefix, which the session goes on to extend.
      kind: of the chunks that it adds: "rl", or "context" for answers that are only recorded, such
        as those of another model; these need no weight versions.

    Attributes:
      chunks: all chunks so far, in the order of time.
    """

    def __init__(
        self,
        engine: Generator,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_context: int,
        max_new_tokens: int,
        completion_seconds: float,
        temperature: float = 1.0,
        routes: bool = False,
        chunks: list[Chunk] | None = None,
        kind: str = "rl",
    ) -> None:
        self.chunks = [] if chunks is None else chunks
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.max_new_tokens = max_new_tokens
        self._engine = engine
        self._seed = seed
        self._completion_seconds = completion_seconds
        self._temperature = temperature
        self._routes = routes
        self._kind = kind
        self._calls: collections.Counter[bytes] = collections.Counter()  # by digest of the context
        self._truncated: set[int] = set()
        self._parents = resolve_parents([chunk.parent for chunk in self.chunks])
        self._tokens: list[int] = []  # of each chunk: the length of its context, itself included
        self._digests: list[Any] = []  # and the running hash of it
        for number, parent in enumerate(self._parents):
            self._measure(parent, _ids_of(self.chunks[number]))

    @property
    def last(self) -> int:
        """Return the number of the newest chunk; ROOT where there is none."""
        return len(self.chunks) - 1 if self.chunks else ROOT

    def context_of(self, number: int) -> list[int]:
        """Return all ids from the root to the end of a chunk; [] for ROOT."""
        ids: list[int] = []
        for place in path_to(number, self._parents):
            ids += self.chunks[place].prompt_ids
            ids += self.chunks[place].action_ids
        return ids

    def tokens_of(self, number: int) -> int:
        """Return the length of `context_of(number)`."""
        return 0 if number == ROOT else self._tokens[number]

    def is_truncated(self, number: int) -> bool:
        """Return whether a chunk's answer was cut before its end."""
        return number in self._truncated

    async def sample(
        self,
        parent: int,
        prompt_ids: Sequence[int],
        *,
        edge: str = "continuation",
        max_new_tokens: int | None = None,
        temperature: float | None = None,
    ) -> int:
        """Sample one answer and record it as a chunk.

        Args:
          parent: number of the chunk to go on from, or ROOT.
          prompt_ids: what was appended since.
          edge: how the chunk follows its parent (`rome.data.tree`).
          max_new_tokens: of this answer; None, or more than the session's, is the session's.
          temperature: of this answer; None is the session's.

        Returns:
          The number of the new chunk.

        Raises:
          ContextFull: there is no room for an answer.
          TruncatedParent: the parent's answer was cut.
          SessionError: there is no such parent, or nothing to read.
          EngineError: the engine did not answer, or not as an engine does.
        """
        prompt_ids = list(prompt_ids)
        self._check_parent(parent, prompt_ids, edge)
        context = self.context_of(parent)
        routes_from = self._routes_from(parent, len(context))
        context += prompt_ids
        sampling = Sampling(
            max_new_tokens=self._room(len(context), max_new_tokens),
            temperature=self._temperature if temperature is None else temperature,
            stop_token_ids=(self.tokenizer.im_end,),
            seed=self._next_seed(parent, prompt_ids),
            routes_from=routes_from,
        )
        completion = await self._engine.generate(
            context, sampling, self._completion_seconds, affinity=str(self._seed)
        )
        if completion.versions or self._kind == "rl":
            _check_spans(completion)
        return self._record(parent, prompt_ids, edge, completion)

    def add(
        self,
        parent: int,
        prompt_ids: Sequence[int],
        action_ids: Sequence[int],
        *,
        edge: str = "continuation",
        is_truncated: bool = False,
    ) -> int:
        """Record an answer that was not sampled here as a chunk of kind "context".

        Args:
          parent: number of the chunk to go on from, or ROOT.
          prompt_ids: what was appended since.
          action_ids: of the answer.
          edge: how the chunk follows its parent.
          is_truncated: whether the answer was cut before its end.

        Returns:
          The number of the new chunk.

        Raises:
          TruncatedParent: the parent's answer was cut.
          SessionError: there is no such parent, nothing to read, or the session's chunks are to be
            trained.
        """
        if self._kind != "context":
            raise SessionError(
                f"a session of kind {self._kind!r} samples all its answers; make one of kind"
                " 'context'"
            )
        prompt_ids = list(prompt_ids)
        self._check_parent(parent, prompt_ids, edge)
        reason = "length" if is_truncated else "stop"
        answer = Completion(list(action_ids), [0.0] * len(action_ids), reason, [])
        return self._record(parent, prompt_ids, edge, answer)

    def _check_parent(self, parent: int, prompt_ids: list[int], edge: str) -> None:
        if edge not in EDGES or (edge == "rewind" and parent == ROOT):
            raise SessionError(
                f"edge {edge!r} does not lead from parent {parent}; choose one of"
                f" {', '.join(EDGES)}, and a chunk to rewind to"
            )
        if parent != ROOT and not 0 <= parent < len(self.chunks):
            raise SessionError(
                f"parent {parent} is no chunk of this episode, which has {len(self.chunks)}; give"
                " the number of one, or ROOT"
            )
        if parent == ROOT and not prompt_ids:
            raise SessionError("a context of its own needs a token to begin with; give prompt_ids")
        if parent in self._truncated:
            raise TruncatedParent(
                f"the answer of chunk {parent} was cut at its limit of tokens, so nothing can"
                " follow it; go on from an earlier chunk, or allow more tokens"
            )

    def _room(self, tokens: int, wanted: int | None) -> int:
        """Return how many tokens may be sampled after a context of so many."""
        room = self.max_context - tokens
        if room < 1:
            raise ContextFull(f"no room left in a context of {self.max_context} tokens")
        limit = self.max_new_tokens if wanted is None else min(wanted, self.max_new_tokens)
        if limit < 1:
            raise SessionError(f"max_new_tokens is {wanted}; ask for 1 or more")
        return min(room, limit)

    def _routes_from(self, parent: int, context: int) -> int | None:
        """Return the place of the first token whose routes are wanted; None for no routes.

        The engine has computed everything before the parent's end, except the last token that it
        sampled. A replayed parent has no routes, and they are not asked for.
        """
        if not self._routes:
            return None
        has_routes = parent != ROOT and self.chunks[parent].routes is not None
        return context - 1 if has_routes else context

    def _extend_digest(self, parent: int, ids: Sequence[int]) -> Any:
        """Return the running hash of the context that `ids` extend."""
        empty = hashlib.blake2s(digest_size=16)
        digest = empty if parent == ROOT else self._digests[parent].copy()
        digest.update(np.asarray(ids, "<i8").tobytes())
        return digest

    def _next_seed(self, parent: int, prompt_ids: list[int]) -> int:
        context = self._extend_digest(parent, prompt_ids).digest()
        earlier = self._calls[context]
        self._calls[context] += 1
        return derive_seed(self._seed, context.hex(), earlier)

    def _record(self, parent: int, prompt_ids: list[int], edge: str, answer: Completion) -> int:
        number = len(self.chunks)
        follows = parent == (number - 1 if number else ROOT)
        text_ids = answer.output_ids
        if text_ids and text_ids[-1] in self.tokenizer.turn_ends:
            text_ids = text_ids[:-1]
        chunk = Chunk(
            prompt_ids=prompt_ids,
            action_ids=answer.output_ids,
            logprobs=answer.logprobs,
            versions=answer.versions,
            text=self.tokenizer.decode(text_ids),
            kind=self._kind,
            cached_tokens=answer.cached_tokens,
            parent=LAST if follows else parent,
            edge=edge,
        )
        if answer.routes is not None:
            earlier = None if parent == ROOT else self.chunks[parent].routes
            chunk.routes = extend_routes(earlier, answer.routes, len(_ids_of(chunk)))
        if answer.finish_reason == "length":
            chunk.status = "malformed"
            self._truncated.add(number)
        self.chunks.append(chunk)
        self._parents.append(parent)
        self._measure(parent, _ids_of(chunk))
        return number

    def _measure(self, parent: int, ids: list[int]) -> None:
        """Note the length and the hash of the context that a new chunk's ids extend."""
        self._tokens.append(self.tokens_of(parent) + len(ids))
        self._digests.append(self._extend_digest(parent, ids))


def _ids_of(chunk: Chunk) -> list[int]:
    return [*chunk.prompt_ids, *chunk.action_ids]


def _check_spans(answer: Completion) -> None:
    """Check that the versions of an answer cover its tokens in order, without gaps.

    Raises:
      EngineFailed: they do not.
    """
    place = 0
    for _, start, end in answer.versions:
        if start != place or end < start:
            break
        place = end
    if place != len(answer.output_ids):
        raise EngineFailed(
            f"the engine answered {len(answer.output_ids)} tokens with weight versions"
            f" {answer.versions}; they must cover the tokens in order"
        )
