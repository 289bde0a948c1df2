"""A client of SGLang's protocol.

It works unchanged with SGLang servers, with the embedded engine (`rome.serve`) and, without HTTP,
with the engine inside the trainer (`rome.engine.inside`). Every wait has a deadline. A completion
that a pause cut is continued from its partial output. Differences between SGLang's versions are
asked of the server (`Engine.dialect`), and a server that is too old is refused with an error that
names its version. What a trainer asks besides sampling is in `rome.engine.control`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from rome.engine.answers import (
    Answer,
    Span,
    append_answer,
    append_routes,
    blame_engine,
    num_routes,
    parse_answer,
    parse_logprobs,
    parse_routes,
)
from rome.engine.completion import Completion, Sampling
from rome.engine.connection import (
    Connection,
    Deadline,
    Wire,
    growing_wait,
)
from rome.engine.control import CONTROL_SECONDS, Control
from rome.engine.errors import EngineRefused, EngineUnproven
from rome.engine.mirror import MirrorClient
from rome.engine.weights import Weights
from rome.model.config import ModelConfig

MAX_ABORT_WAIT_SECONDS = 2.0


class Engine(Control):
    """One SGLang server, or one embedded engine, at a URL.

    Usable as an async context manager, from several event loops in turn.

    Args:
      url: such as http://127.0.0.1:30000.
      api_key: sent as a bearer token.
      model: config of the model that the server runs; needed to read its routes.
      dead_after_seconds: how long refused or broken connections are retried before the server
        counts as dead.
      mirror: copies weights to the server's host (`launch.mirror`); None if the server reads the
        trainer's directory itself.
      wire: carries the requests; None: HTTP.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: ModelConfig | None = None,
        dead_after_seconds: float = 5.0,
        mirror: MirrorClient | None = None,
        wire: Wire | None = None,
    ):
        url = url.rstrip("/")
        connection = Connection(url, api_key=api_key, dead_after_seconds=dead_after_seconds)
        super().__init__(url, wire or connection, mirror)
        self.model = model
        self._held: asyncio.Event | None = None  # set when `release` ends a hold
        self._deadlines: set[Deadline] = set()  # of running completions
        self._refused: str | None = None  # the cause, while the engine is out of service
        self._posts: set[asyncio.Task[dict[str, Any]]] = set()  # requests of running completions
        self._proven: list[int] = []  # verified versions, in order; while empty, any is accepted

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- sampling
    # ---------------------------------------------------------------------------------------------

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
        begun: Completion | None = None,
    ) -> Completion:
        """Sample a continuation of `input_ids`.

        An answer that a pause aborted is sent again as prompt + partial output, until it ends by
        itself.

        Args:
          input_ids: tokens of the prompt.
          sampling: how to sample, and how much.
          deadline_seconds: for the whole call; afterwards the request is dropped on the server too.
            It stands still while the engine is held.
          affinity: ignored here; `EnginePool.generate` chooses an engine by it.
          begun: what another engine sampled of this completion; continued in place.

        Returns:
          The completion; `begun` itself where it was given.

        Raises:
          EngineError: the deadline passed.
          EngineDead: the engine cannot be reached.
          EngineFailed: it answered with an error of its own, or unlike an engine.
          EngineRefused: the engine was taken out of service; `begun` holds what was sampled.
          EngineUnproven: the engine answered with weights that were not verified.
          RequestRejected: the engine does not take this request.
        """
        completion = Completion.unfinished() if begun is None else begun
        num_empty = 0  # answers in a row that an abort cut before their first token
        async with self._time_for(completion, deadline_seconds):
            while completion.finish_reason == "abort":
                before = len(completion.output_ids)
                await self._continue_completion(completion, input_ids, sampling)
                is_empty = len(completion.output_ids) == before
                if is_empty and completion.finish_reason == "abort":
                    await asyncio.sleep(growing_wait(num_empty, MAX_ABORT_WAIT_SECONDS))
                num_empty = num_empty + 1 if is_empty else 0
        return completion

    @contextlib.asynccontextmanager
    async def _time_for(self, completion: Completion, seconds: float) -> AsyncIterator[None]:
        """Bound the time of a completion, apart from that in which the engine is held."""
        async with self._connection.deadline(seconds, "a completion") as deadline:
            self._deadlines.add(deadline)
            if self._held is not None:
                deadline.stop()
            try:
                yield
            finally:
                self._deadlines.discard(deadline)
                deadline.go_on()
                completion.seconds_held += deadline.seconds_stopped

    async def score(
        self, input_ids: list[int], deadline_seconds: float = CONTROL_SECONDS
    ) -> list[float]:
        """Return log p(input_ids[t] | input_ids[:t]) at temperature 1, one per id; 0 for the first.

        Raises:
          EngineError: the engine failed, or returned another number of logprobs.
        """
        ids = list(map(int, input_ids))
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": ids,
            "stream": False,
            "return_logprob": True,
            "logprob_start_len": 0,
            # A fresh key has no cached prefix, so the current weights compute every token.
            "extra_key": f"probe-{uuid.uuid4().hex}",
            "sampling_params": Sampling(max_new_tokens=1, temperature=0.0).to_json(),
        }
        body |= self._adapter_field(self._adapter)
        async with self._connection.deadline(deadline_seconds, "logprobs of a prompt"):
            answer = await self._connection.post("/generate", body)
        with blame_engine(self.url, "/generate"):
            entries = answer["meta_info"]["input_token_logprobs"]
            if len(entries) != len(ids):
                raise ValueError(
                    f"{len(entries)} input logprobs for a prompt of {len(ids)} tokens; its"
                    " cache must be flushed before scoring"
                )
            return [0.0, *parse_logprobs(entries[1:], ids[1:])]

    async def _continue_completion(
        self, completion: Completion, input_ids: list[int], sampling: Sampling
    ) -> None:
        """Send one request for the rest of a completion, and append its answer."""
        await self._wait_while_held()
        before = len(completion.output_ids)
        proven_at_start = self._proven[-1:]
        adapter = self._adapter
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": list(map(int, input_ids)) + completion.output_ids,
            "sampling_params": sampling.to_json(already=before),
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }
        body |= self._salt()
        body |= self._adapter_field(adapter)
        body |= self._route_fields(completion, sampling)
        answer = await self._post_unless_refused("/generate", body)
        # An update may have frozen the request, and the server may have continued it before its new
        # weights were verified. Only the outcome of that check says whether the tokens count.
        await self._wait_while_held()
        parsed = parse_answer(
            self.url, answer, self.model, max_tokens=sampling.max_new_tokens - before
        )
        if adapter is not None:  # servers name the version of the weights that it lies beside
            span = Span(adapter.version, adapter.adapter_name, 0, len(parsed.ids))
            parsed = parsed._replace(spans=[span] if parsed.ids else [])
        self._require_proven(parsed, proven_at_start)
        if sampling.routes_from is not None and parsed.ids:
            routes = parse_routes(
                self.url,
                self.model,
                completion,
                parsed,
                start=sampling.routes_from,
                prompt_length=len(input_ids),
            )
            append_routes(completion, routes)
        append_answer(completion, parsed)
        is_full = len(completion.output_ids) >= sampling.max_new_tokens
        if completion.finish_reason == "abort" and is_full:
            completion.finish_reason = "length"

    async def _post_unless_refused(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post, but stop waiting at once when `refuse` is called: the server may hang."""
        if self._refused is not None:
            raise EngineRefused(self._refused)
        post = asyncio.ensure_future(self._connection.post(route, body))
        self._posts.add(post)
        try:
            await asyncio.wait([post])
            if post.cancelled():
                raise EngineRefused(self._refused or f"{self.url} was left")
            return post.result()
        finally:
            self._posts.discard(post)
            # If the caller was cancelled: the server drops a request whose connection is closed.
            post.cancel()

    def _salt(self) -> dict[str, str]:
        """Return the field that sets apart prefixes which other weights computed.

        SGLang's prefix cache is keyed by tokens and by this field, not by weights.
        """
        if not self._proven:
            return {}
        return {"extra_key": f"weights-{self._proven[-1]}"}

    @staticmethod
    def _adapter_field(adapter: Weights | None) -> dict[str, str]:
        return {} if adapter is None else {"lora_path": adapter.adapter_name}

    def _route_fields(self, completion: Completion, sampling: Sampling) -> dict[str, Any]:
        """Return the fields that ask for the routes which are not known yet.

        Servers that do not know the second field send the routes of the whole sequence.
        """
        if sampling.routes_from is None:
            return {}
        start = sampling.routes_from + num_routes(completion)
        return {"return_routed_experts": True, "routed_experts_start_len": start}

    def _require_proven(self, answer: Answer, proven_at_start: list[int]) -> None:
        """Raise EngineUnproven unless verified weights sampled every token of an answer.

        Allowed are the version that was current when the request was sent, and later ones.
        """
        if not proven_at_start or not answer.ids:
            return
        newest_first = self._proven[::-1]
        num_allowed = newest_first.index(proven_at_start[0]) + 1
        allowed = self._proven[-num_allowed:]
        for span in answer.spans:
            if span.version in allowed:
                continue
            if self._refused is not None:  # the pool knows already
                raise EngineRefused(self._refused)
            raise EngineUnproven(
                f"{self.url} answered with weights {span.name!r}; proven there were"
                f" {', '.join(map(str, allowed))}"
            )

    # -- taking the engine out of service, on the client's side
    # ---------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Make `generate` wait before it sends or returns anything, until `release`.

        Used during an update: new weights are not sampled from before they are verified. Deadlines
        of completions stand still meanwhile.
        """
        if self._held is None:
            self._held = asyncio.Event()
        for deadline in self._deadlines:
            deadline.stop()

    def release(self) -> None:
        """End what `hold` began."""
        if self._held is not None:
            self._held.set()
        self._held = None
        for deadline in self._deadlines:
            deadline.go_on()

    async def _wait_while_held(self) -> None:
        while self._held is not None:  # a hold may follow another one before this wakes up
            await self._held.wait()

    def refuse(self, cause: str) -> None:
        """Make `generate` raise EngineRefused, also where it is waiting, until `accept`."""
        self._refused = cause
        self.release()
        for post in self._posts:
            post.cancel()

    def accept(self) -> None:
        """End what `refuse` began."""
        self._refused = None

    async def drain(self, seconds: float) -> None:
        """Wait until no request of a completion is in flight, but at most `seconds`."""
        if self._posts:
            await asyncio.wait(set(self._posts), timeout=seconds)

    def prove(self, version: int) -> None:
        """Require that later answers are sampled from `version`, or from one proven after it."""
        if self._proven[-1:] != [version]:
            self._proven.append(version)
