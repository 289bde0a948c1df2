"""The engine seen from outside: a client of SGLang's HTTP protocol.

It works unchanged with real SGLang servers and with the embedded one (`rome.serve`). Every wait has a deadline. Back-pressure (429, 503) is
waited out, a refused connection for a short while only; an answer that was cut by a pause is taken up again from its partial output.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import random
import time
import uuid
from typing import Any

import aiohttp
import numpy as np

from rome.data.routes import encode_routes
from rome.model.config import ModelConfig

RETRY_STATUS = (429, 502, 503, 504)  # back-pressure of a server or of a router before it
HEALTH_SECONDS = 30.0  # SGLang's /health generates a token and may take 20 s on a busy server
CONTROL_SECONDS = 60.0
UPDATE_SECONDS = 600.0


class EngineError(RuntimeError):
    """The engine could not do what it was asked; the message names its URL and a remedy."""


class EngineDead(EngineError):
    """Nobody answers at the engine's URL."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are what RL needs: the plain distribution at temperature 1, every token of which has a logprob.

    Args:
      temperature: 0 is greedy.
      top_k: -1 keeps all tokens.
      seed: same seed and same prompt, same tokens; None samples anew each time.
      routes_from: the routes of the tokens from this position on are wanted too; None: no routes.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    routes_from: int | None = None

    def to_json(self, already: int = 0) -> dict[str, Any]:
        """SGLang's sampling_params, all of them: a server's own defaults would slip into every field that is left out."""
        fields = {
            "max_new_tokens": self.max_new_tokens - already, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids), "ignore_eos": False,
            "skip_special_tokens": False, "no_stop_trim": True, "min_new_tokens": 0, "n": 1,
            "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
        }
        return fields if self.seed is None else fields | {"sampling_seed": self.seed}


@dataclasses.dataclass
class Completion:
    """What was sampled, stop token included.

    Args:
      logprobs: of each output id under softmax(logits / temperature).
      finish_reason: "stop" or "length".
      versions: (weight version, start, end) over output_ids, in order and without gaps.
      cached_tokens: prompt tokens whose keys and values were in the engine's cache.
      routes: [prompt + output - 1 - routes_from, layers, k] as in `rome.data.routes`, where they were asked for. The last token has none: it was
        drawn, but not run.
    """

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: list[tuple[int, int, int]]
    cached_tokens: int = 0
    routes: np.ndarray | None = None


class Engine:
    """One SGLang HTTP server.

    Args:
      url: such as http://127.0.0.1:30000.
      api_key: sent as a bearer token.
      model: what the server runs; needed to understand its routes.
      dead_after_s: how long refused or broken connections are tried again before the server counts as dead.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: ModelConfig | None = None, dead_after_s: float = 5.0):
        self.url = url.rstrip("/")
        self.model = model
        self.dead_after_s = dead_after_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._info_routes: dict[str, str] = {}
        self._held: asyncio.Event | None = None  # set when `release` ends a hold
        self._refused: str | None = None

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None and self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._session = self._loop = None

    async def generate(
        self, input_ids: list[int], sampling: Sampling, deadline_s: float, *, affinity: str | None = None,
    ) -> Completion:
        """Samples a continuation of input_ids.

        An answer that a pause aborted is re-sent as prompt + partial output until it ends by itself; each part keeps its weight version.

        Args:
          deadline_s: for all of it; afterwards the request is dropped on the server too.
          affinity: for `EnginePool`, which has the same method; one engine has no choice to make.
        Raises: EngineError.
        """
        completion = Completion([], [], "abort", [])
        async with self._deadline(deadline_s, "a completion"):
            while completion.finish_reason == "abort":
                done = len(completion.output_ids)
                if self._held is not None:
                    await self._held.wait()
                if self._refused is not None:
                    raise EngineDead(self._refused)
                answer = await self._post("/generate", {
                    "rid": uuid.uuid4().hex, "input_ids": list(map(int, input_ids)) + completion.output_ids,
                    "sampling_params": sampling.to_json(already=done), "return_logprob": True, "logprob_start_len": -1, "stream": False,
                    **self._route_fields(completion, sampling),
                })
                self._append(completion, answer)
                if sampling.routes_from is not None and len(completion.output_ids) > done:
                    self._append_routes(completion, answer["meta_info"], sampling.routes_from, len(input_ids))
                if completion.finish_reason == "abort":
                    if len(completion.output_ids) >= sampling.max_new_tokens:
                        completion.finish_reason = "length"
                    elif len(completion.output_ids) == done:  # aborted before its first token: give the server a moment
                        await asyncio.sleep(random.uniform(0.02, 0.1))
        return completion

    def hold(self) -> None:
        """Makes `generate` wait before it sends anything, until `release`: new weights are not sampled from before they are proven."""
        self._held = self._held or asyncio.Event()

    def release(self) -> None:
        if self._held is not None:
            self._held.set()
        self._held = None

    def refuse(self, cause: str) -> None:
        """From now on `generate` raises EngineDead at once, also where it was waiting."""
        self._refused = cause
        self.release()

    async def score(self, input_ids: list[int], deadline_s: float = CONTROL_SECONDS) -> list[float]:
        """log p(input_ids[t] | before t) at temperature 1, one for each id; 0 for the first."""
        async with self._deadline(deadline_s, "logprobs of a prompt"):
            answer = await self._post("/generate", {
                "rid": uuid.uuid4().hex, "input_ids": list(map(int, input_ids)), "stream": False, "return_logprob": True, "logprob_start_len": 0,
                "sampling_params": Sampling(max_new_tokens=1, temperature=0.0).to_json(),
            })
        entries = answer["meta_info"]["input_token_logprobs"]
        if len(entries) != len(input_ids):
            raise EngineError(f"{self.url} returned {len(entries)} input logprobs for a prompt of {len(input_ids)} tokens; its cache must be flushed before scoring")
        return [0.0] + [float(entry[0]) for entry in entries[1:]]

    async def pause(self, mode: str = "abort") -> None:
        """Stops sampling. Running requests: "abort" returns them as they are, "retract" starts them over later, "in_place" freezes them."""
        async with self._deadline(CONTROL_SECONDS, f"pause({mode})"):
            await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        async with self._deadline(CONTROL_SECONDS, "continue"):
            await self._post("/continue_generation", {})

    async def update_weights(self, path: str, version: int) -> None:
        """Loads an HF-layout directory that the server can read. Check it (`model_info`, `score`) before resuming."""
        async with self._deadline(UPDATE_SECONDS, "a weight update"):
            answer = await self._post("/update_weights_from_disk", {
                "model_path": str(path), "weight_version": str(version), "flush_cache": True, "abort_all_requests": False,
            })
        if not answer.get("success"):
            raise EngineError(f"{self.url} did not take weights {version} from {path}: {answer.get('message')}")

    async def flush_cache(self) -> None:
        async with self._deadline(CONTROL_SECONDS, "flush_cache"):
            await self._post("/flush_cache", {})

    async def abort(self, rid: str = "", *, everything: bool = False) -> None:
        """Aborts the requests whose id begins with rid."""
        async with self._deadline(CONTROL_SECONDS, "abort"):
            await self._post("/abort_request", {"rid": rid, "abort_all": everything})

    async def checksum(self) -> dict[str, Any]:
        """The server's own hashes of its weights; comparable between servers of one kind only."""
        async with self._deadline(CONTROL_SECONDS, "weights_checker"):
            return await self._post("/weights_checker", {"action": "checksum"})

    async def model_info(self) -> dict[str, Any]:
        return await self._info("model_info")

    async def server_info(self) -> dict[str, Any]:
        return await self._info("server_info")

    async def health(self) -> bool:
        """Whether the server answers that it is well. Never raises for a server that is down."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                async with self._client().get(self.url + "/health", headers=self._headers) as response:
                    return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _info(self, name: str) -> dict[str, Any]:
        """New servers call it /model_info, old ones /get_model_info: whichever is there is remembered."""
        async with self._deadline(CONTROL_SECONDS, name):
            if name not in self._info_routes:
                status, answer = await self._request("GET", f"/{name}", None)
                if status == 200:
                    self._info_routes[name] = f"/{name}"
                    return answer
                self._info_routes[name] = f"/get_{name}"
            status, answer = await self._request("GET", self._info_routes[name], None)
            if status != 200:
                raise EngineError(f"{self.url}{self._info_routes.pop(name)} answered {status}: {_error_text(answer)}; is this an SGLang server?")
            return answer

    async def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, after as many attempts as back-pressure asks for. Ends by success, EngineError, or the caller's deadline."""
        wait = 0.1
        while True:
            status, answer = await self._request("POST", route, body)
            if status == 200:
                return answer
            if status not in RETRY_STATUS:
                raise EngineError(f"{self.url}{route} answered {status}: {_error_text(answer)}")
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            wait = min(2 * wait, 5.0)

    async def _request(self, method: str, route: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """(status, parsed body). Broken connections are tried again for `dead_after_s`, then the server is dead."""
        give_up, wait = time.monotonic() + self.dead_after_s, 0.1
        while True:
            try:
                async with self._client().request(method, self.url + route, json=body, headers=self._headers) as response:
                    is_json = response.content_type == "application/json"
                    return response.status, (await response.json() if is_json else await response.text())
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
                if time.monotonic() + wait > give_up:
                    raise EngineDead(f"engine {self.url} is dead: {type(error).__name__} {error}; see its log, start it again, and resume") from error
            except (aiohttp.ClientError, ValueError) as error:
                raise EngineError(f"{self.url}{route} did not answer in HTTP and JSON ({type(error).__name__} {error}); is this an SGLang server?") from error
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, 2.0)

    def _client(self) -> aiohttp.ClientSession:
        """The session of the running event loop. One of an earlier, finished loop is forgotten: its sockets went with it."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop or self._session.closed:
            if self._session is not None and not self._session.closed:
                self._session.detach()
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)  # totals are the callers' deadlines
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
            self._loop = loop
        return self._session

    def _deadline(self, seconds: float, what: str) -> _Deadline:
        return _Deadline(seconds, f"{self.url} did not give {what} within {seconds:g} s; is it paused, overloaded or stuck? See its log")

    def _append(self, completion: Completion, answer: dict[str, Any]) -> None:
        """Adds one answer's tokens to what earlier, aborted answers brought."""
        meta, start = answer["meta_info"], len(completion.output_ids)
        ids = list(answer["output_ids"])
        entries = meta["output_token_logprobs"] if ids else []
        if [entry[1] for entry in entries] != ids:
            raise EngineError(f"{self.url} returned {len(entries)} logprobs for {len(ids)} tokens, or of other tokens; this engine cannot be trained on")
        completion.cached_tokens = completion.cached_tokens if start else int(meta.get("cached_tokens", 0))
        completion.output_ids += ids
        completion.logprobs += [float(entry[0]) for entry in entries]
        completion.finish_reason = (meta["finish_reason"] or {}).get("type", "abort")
        spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
        for span in spans:
            _append_span(completion.versions, self._version(span["version"]), start + span["start"], start + span["end"])

    def _route_fields(self, completion: Completion, sampling: Sampling) -> dict[str, Any]:
        """Asks for the routes that are not known yet. Servers that do not know the second field send those of the whole sequence."""
        if sampling.routes_from is None:
            return {}
        known = 0 if completion.routes is None else len(completion.routes)
        return {"return_routed_experts": True, "routed_experts_start_len": sampling.routes_from + known}

    def _append_routes(self, completion: Completion, meta: dict[str, Any], start: int, prompt_length: int) -> None:
        """Adds the routes of the tokens that have none yet: a token keeps those of the pass that its successor was sampled from, also when an
        abort made the server run it again."""
        config, known = self.model, 0 if completion.routes is None else len(completion.routes)
        if config is None:
            raise ValueError("routes were asked for, but the model is unknown; make Engine(url, model=config)")
        if not meta.get("routed_experts"):
            raise EngineError(f"{self.url} returned no routes; start the SGLang server with --enable-return-routed-experts (and no gateway before it that "
                              "drops the field), or set routing_replay to off or recompute")
        ids = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.dtype(meta.get("routed_experts_dtype") or "int32"))
        total, each = prompt_length + len(completion.output_ids) - 1, config.num_layers * config.experts_per_token
        wanted = total - start - known
        if ids.size not in (wanted * each, total * each):
            raise EngineError(f"{self.url} returned {ids.size} expert ids; {wanted} tokens in {config.num_layers} layers with {config.experts_per_token} "
                              "experts each have another number. Does it serve another model?")
        try:
            routes = encode_routes(ids.reshape(-1, config.num_layers, config.experts_per_token)[-wanted:], config)
        except ValueError as error:
            raise EngineError(f"routes from {self.url}: {error}. Does it serve another model?") from error
        completion.routes = routes if completion.routes is None else np.concatenate([completion.routes, routes])

    def _version(self, text: str) -> int:
        """SGLang's versions are strings; ours are numbers, and a server that was never updated says "default": version 0."""
        try:
            return 0 if text == "default" else int(text)
        except ValueError:
            raise EngineError(f"{self.url} has weight_version {text!r}, not a number; start it with --weight-version 0") from None


class _Deadline:
    """asyncio.timeout that raises EngineError with a sentence."""

    def __init__(self, seconds: float, sentence: str):
        self._sentence = sentence
        self._timeout = asyncio.timeout(max(seconds, 0.0))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise EngineError(self._sentence) from None


def _append_span(spans: list[tuple[int, int, int]], version: int, start: int, end: int) -> None:
    """Joins a span to the last one where the version did not change; empty spans vanish."""
    if end <= start:
        return
    if spans and spans[-1][0] == version and spans[-1][2] == start:
        start = spans.pop()[1]
    spans.append((version, start, end))


def _error_text(answer: Any) -> str:
    """Both shapes of error bodies: {"error": "text"} and {"error": {"message": ...}}; updates answer {"message": ...}."""
    if not isinstance(answer, dict):
        return str(answer)[:500] or "no text"
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
