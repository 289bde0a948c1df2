"""A client of SGLang's protocol.

It works unchanged with SGLang servers, with the embedded engine (`rome.serve`) and, without HTTP,
with the engine inside the trainer (`rome.engine.inside`). Every wait has a deadline. A completion
that a pause cut is continued from its partial output. Differences between SGLang's versions are
asked of the server (`Engine.dialect`), and a server that is too old is refused with an error that
names its version.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

import aiohttp

from rome.engine.answers import (
    Answer,
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
    RETRY_STATUS,
    UPDATE_SECONDS,
    Connection,
    Deadline,
    Wire,
    error_text,
    growing_wait,
    require_object,
)
from rome.engine.dialect import Dialect, dialect_of
from rome.engine.errors import EngineError, EngineRefused, EngineUnproven
from rome.engine.mirror import MirrorClient
from rome.engine.weights import Weights, file_checksums
from rome.model.config import ModelConfig

HEALTH_SECONDS = 30.0  # SGLang's /health generates a token and may take 20 s on a busy server
CONTROL_SECONDS = 60.0
MAX_ABORT_WAIT_SECONDS = 2.0
MEMORY_TAGS = ("weights", "kv_cache")
PauseMode = Literal["abort", "retract", "in_place"]
# busy: it answers 429 or 503; hung: it takes connections and does not answer; gone: it takes none
Health = Literal["well", "busy", "hung", "gone"]


class Engine:
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
        self.url = url.rstrip("/")
        self.model = model
        self.mirror = mirror
        self._connection = wire or Connection(
            self.url, api_key=api_key, dead_after_seconds=dead_after_seconds
        )
        self._info_routes: dict[str, str] = {}
        self._held: asyncio.Event | None = None  # set when `release` ends a hold
        self._deadlines: set[Deadline] = set()  # of running completions
        self._refused: str | None = None  # the cause, while the engine is out of service
        self._posts: set[asyncio.Task[dict[str, Any]]] = set()  # requests of running completions
        self._proven: list[int] = []  # verified versions, in order; while empty, any is accepted

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        await self._connection.close()

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
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": list(map(int, input_ids)) + completion.output_ids,
            "sampling_params": sampling.to_json(already=before),
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }
        body |= self._salt()
        body |= self._route_fields(completion, sampling)
        answer = await self._post_unless_refused("/generate", body)
        # An update may have frozen the request, and the server may have continued it before its new
        # weights were verified. Only the outcome of that check says whether the tokens count.
        await self._wait_while_held()
        parsed = parse_answer(
            self.url, answer, self.model, max_tokens=sampling.max_new_tokens - before
        )
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

    # -- control of the server
    # ---------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling.

        Args:
          mode: what happens to running requests. "abort" returns them as they are, "retract"
            computes their cache anew when sampling continues, "in_place" freezes them.
        """
        async with self._connection.deadline(CONTROL_SECONDS, f"pause({mode})"):
            await self._connection.post_for_any("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Continue sampling after `pause`."""
        async with self._connection.deadline(CONTROL_SECONDS, "continue"):
            await self._connection.post_for_any("/continue_generation", {})

    async def load(self, weights: Weights, *, flush: bool) -> None:
        """Bring weights to the engine, by way of its mirror where it has one.

        Args:
          weights: where they are.
          flush: see `update_weights`.
        """
        path = weights.path
        if self.mirror is not None:
            path = await self.mirror.fetch(path)
        await self.update_weights(str(path.resolve()), weights.version, flush=flush)

    async def update_weights(self, path: str, version: int, *, flush: bool = True) -> None:
        """Load the weights of a Hugging Face directory that the server can read.

        Success of this call proves nothing: check `model_info` and `score` before sampling.

        Args:
          path: the directory, as the server sees it.
          version: reported by the server for tokens sampled from these weights.
          flush: whether to forget cached prefixes. Must be False while requests are frozen (pause
            "in_place"): SGLang 0.5.23 then answers 400 although the weights changed.

        Raises:
          EngineError: the server says that it did not load them.
        """
        body = {
            "model_path": str(path),
            "weight_version": str(version),
            "flush_cache": flush,
            "abort_all_requests": False,
        }
        async with self._connection.deadline(UPDATE_SECONDS, "a weight update"):
            answer = await self._connection.post("/update_weights_from_disk", body)
        if answer.get("success") is not True:
            raise EngineError(
                f"{self.url} did not take weights {version} from {path}: {answer.get('message')}"
            )

    async def release_memory(self, tags: tuple[str, ...] = MEMORY_TAGS) -> None:
        """Free the device's memory for another process.

        The engine must be idle and stays paused; SGLang needs --enable-memory-saver.
        """
        async with self._connection.deadline(CONTROL_SECONDS, "release_memory_occupation"):
            await self._connection.post_for_any("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: tuple[str, ...] = MEMORY_TAGS) -> None:
        """Allocate the memory again that `release_memory` freed.

        Its content is undefined: load and verify weights before anything is sampled.
        """
        async with self._connection.deadline(CONTROL_SECONDS, "resume_memory_occupation"):
            await self._connection.post_for_any("/resume_memory_occupation", {"tags": list(tags)})

    # -- state of the server
    # ---------------------------------------------------------------------------------------------

    async def checksum(self) -> dict[str, Any]:
        """Return the server's hashes of its weights, comparable between servers of one kind."""
        async with self._connection.deadline(CONTROL_SECONDS, "weights_checker"):
            return await self._connection.post("/weights_checker", {"action": "checksum"})

    async def expected_checksums(self, weights: Weights) -> dict[str, str]:
        """Return what `checksum` says of an embedded engine that holds these weights."""
        info = await self.server_info()
        return await asyncio.to_thread(file_checksums, weights.path, info["dtype"])

    async def model_info(self) -> dict[str, Any]:
        """Return what the server says about its model, `weight_version` among it."""
        return await self._get_info("model_info")

    async def server_info(self) -> dict[str, Any]:
        """Return what the server says about itself, `version` among it."""
        return await self._get_info("server_info")

    async def dialect(self) -> Dialect:
        """Ask the server which protocol version it speaks.

        Not cached: the server at a URL may be replaced by another version.

        Raises:
          EngineError: the server is too old, or runs several tokenizer workers.
        """
        info = await self.server_info()
        with blame_engine(self.url, "/server_info"):
            num_workers = int(info.get("tokenizer_worker_num") or 1)
        if num_workers > 1:
            raise EngineError(
                f"{self.url} runs {num_workers} tokenizer workers: a pause and an"
                " update may meet different ones; start it with --tokenizer-worker-num 1"
            )
        is_embedded = info.get("engine") == "rome.serve"
        return dialect_of(self.url, str(info.get("version", "")), is_embedded)

    async def health(self, seconds: float = HEALTH_SECONDS) -> Health:
        """Return how the server is doing; an unhealthy server is never an exception.

        Args:
          seconds: time after which it counts as hung. SGLang generates a token to answer and may
            need 20 s, so a shorter wait condemns busy servers.
        """
        try:
            async with asyncio.timeout(seconds):
                status = await self._connection.status("/health_generate")
        except TimeoutError:  # also aiohttp's own, of a connection that was not accepted
            return "hung"
        except (aiohttp.ClientError, OSError):
            return "gone"
        if status == 200:
            return "well"
        return "busy" if status in RETRY_STATUS else "gone"

    async def _get_info(self, name: str) -> dict[str, Any]:
        """Return the answer of /NAME, or of /get_NAME as old servers call it."""
        async with self._connection.deadline(CONTROL_SECONDS, name):
            if name not in self._info_routes:
                response = await self._connection.request("GET", f"/{name}", None)
                if response.status == 200:
                    self._info_routes[name] = f"/{name}"
                    return require_object(self.url, f"/{name}", response.body)
                self._info_routes[name] = f"/get_{name}"
            route = self._info_routes[name]
            response = await self._connection.request("GET", route, None)
            if response.status != 200:
                del self._info_routes[name]
                raise EngineError(
                    f"{self.url}{route} answered {response.status}:"
                    f" {error_text(response.body)}; is this an SGLang server?"
                )
            return require_object(self.url, route, response.body)
