"""The engine seen from outside: a client of SGLang's HTTP protocol.

It works unchanged with real SGLang servers and with the embedded one (`rome.serve`). Every wait has
a deadline. Back-pressure (429, 503) is waited out, a refused connection for a short while only; an
answer that was cut by a pause is taken up again from its partial output. What differs between
SGLang's versions is asked of the server (`dialect`), and a server that is too old is refused by
name.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import pathlib
import random
import re
import time
import uuid
from typing import Any, Literal, Protocol

import aiohttp
import numpy as np

from rome.data.routes import encode_routes
from rome.engine.completion import Completion, Sampling
from rome.model.config import ModelConfig

RETRY_STATUS = (429, 502, 503, 504)  # back-pressure of a server or of a router before it
RETRY_AFTER_SECONDS = 30.0  # the longest that a server's Retry-After is believed
HEALTH_SECONDS = 30.0  # SGLang's /health generates a token and may take 20 s on a busy server
CONTROL_SECONDS = 60.0
UPDATE_SECONDS = 600.0
OLDEST = (
    0,
    5,
    9,
)  # of SGLang: the first whose weight update, pause and versions were read and tried against this client
TELLS_SPANS = (0, 5, 23)  # the first that was seen to return meta_info.weight_versions
Health = Literal[
    "well", "busy", "hung", "gone"
]  # busy: it says 429 or 503; hung: it takes connections and does not answer; gone: it takes none


class EngineError(RuntimeError):
    """The engine could not do what it was asked; the message names its URL and a remedy."""


class EngineDead(EngineError):
    """Nobody answers at the engine's URL."""


class EngineRefused(EngineError):
    """The engine was taken out of service while a request waited for it: another engine may go on
    with the request.
    """


class EngineUnproven(EngineError):
    """The engine answered with weights that were never proven there: it was started anew, or
    somebody else changed them.
    """


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a server's version understands.

    Args:
      embedded: it is `rome.serve`, which can hash its tensors by the names of the checkpoint.
      spans: it tells the weight version of each token, so that a request may live through an
        update. (Where it does not, "retract" with a flush also crashed servers.)
    """

    name: str
    embedded: bool
    spans: bool


class Mirror(Protocol):
    """Brings a checkpoint directory to the engine's host.

    `last`: seconds and bytes of the last time, or None.
    """

    last: Any

    async def fetch(self, path: pathlib.Path) -> pathlib.Path: ...


class Engine:
    """One SGLang HTTP server.

    Args:
      url: such as http://127.0.0.1:30000.
      api_key: sent as a bearer token.
      model: what the server runs; needed to understand its routes.
      dead_after_s: how long refused or broken connections are tried again before the server counts
        as dead.
      mirror: what brings weights to the server's host (`launch.mirror`); None: the server reads the
        trainer's directory.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: ModelConfig | None = None,
        dead_after_s: float = 5.0,
        mirror: Mirror | None = None,
    ):
        self.url, self.mirror = url.rstrip("/"), mirror
        self.model = model
        self.dead_after_s = dead_after_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._info_routes: dict[str, str] = {}
        self._held: asyncio.Event | None = None  # set when `release` ends a hold
        self._refused: str | None = None
        self._posts: set[asyncio.Task] = set()  # of running completions
        self._proven: list[int] = []  # versions, in order; none: nothing is known, and any is taken

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None and self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._session = self._loop = None

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_s: float,
        *,
        affinity: str | None = None,
        begun: Completion | None = None,
    ) -> Completion:
        """Samples a continuation of input_ids.

        An answer that a pause aborted is re-sent as prompt + partial output until it ends by
        itself.

        Args:
          deadline_s: for all of it; afterwards the request is dropped on the server too.
          affinity: for `EnginePool`, which has the same method; one engine has no choice to make.
          begun: what another engine has sampled of it; it is gone on with, in place.
        Raises: EngineError.
        """
        completion = Completion([], [], "abort", []) if begun is None else begun
        async with self._deadline(deadline_s, "a completion"):
            while completion.finish_reason == "abort":
                done = len(completion.output_ids)
                if self._held is not None:
                    await self._held.wait()
                    continue  # a hold may follow another one before this wakes up
                known = self._proven[-1:]  # when it is sent
                answer = await self._post_or_leave(
                    "/generate",
                    {
                        "rid": uuid.uuid4().hex,
                        "input_ids": list(map(int, input_ids)) + completion.output_ids,
                        "sampling_params": sampling.to_json(already=done),
                        "return_logprob": True,
                        "logprob_start_len": -1,
                        "stream": False,
                        **self._salt(),
                        **self._route_fields(completion, sampling),
                    },
                )
                while (
                    self._held is not None
                ):  # it was frozen during an update and may have gone on before the proof, which decides
                    await self._held.wait()
                self._require_proven(answer["meta_info"], known)
                self._append(completion, answer)
                if sampling.routes_from is not None and len(completion.output_ids) > done:
                    self._append_routes(
                        completion, answer["meta_info"], sampling.routes_from, len(input_ids)
                    )
                if completion.finish_reason == "abort":
                    if len(completion.output_ids) >= sampling.max_new_tokens:
                        completion.finish_reason = "length"
                    elif (
                        len(completion.output_ids) == done
                    ):  # aborted before its first token: give the server a moment
                        await asyncio.sleep(random.uniform(0.02, 0.1))
        return completion

    async def _post_or_leave(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `_post`, but ends at once when the engine is refused: a server that hangs is not
        waited for.
        """
        if self._refused is not None:
            raise EngineRefused(self._refused)
        post = asyncio.ensure_future(self._post(route, body))
        self._posts.add(post)
        try:
            await asyncio.wait([post])
            if post.cancelled():
                raise EngineRefused(self._refused or f"{self.url} was left")
            return post.result()
        finally:
            self._posts.discard(post)
            # where the caller was cancelled; the server drops a request whose connection ends
            post.cancel()

    def _salt(self) -> dict[str, str]:
        """SGLang's prefix cache is keyed by tokens and by this, not by weights: a prefix that other
        weights computed must not be found.
        """
        return {"extra_key": f"weights-{self._proven[-1]}"} if self._proven else {}

    def hold(self) -> None:
        """Makes `generate` wait before it sends anything, until `release`: new weights are not
        sampled from before they are proven.
        """
        self._held = self._held or asyncio.Event()

    def release(self) -> None:
        if self._held is not None:
            self._held.set()
        self._held = None

    def refuse(self, cause: str) -> None:
        """From now on `generate` raises EngineRefused at once, also where it was waiting, until
        `accept`.
        """
        self._refused = cause
        self.release()
        for post in self._posts:
            post.cancel()

    async def drain(self, seconds: float) -> None:
        """Returns when no request is on its way any more, or after `seconds`."""
        if self._posts:
            await asyncio.wait(set(self._posts), timeout=seconds)

    def accept(self) -> None:
        """Ends what `refuse` began."""
        self._refused = None

    def prove(self, version: int) -> None:
        """From now on requests must be answered by these weights, or by those that are proven while
        they run.
        """
        if self._proven[-1:] != [version]:
            self._proven.append(version)

    async def score(self, input_ids: list[int], deadline_s: float = CONTROL_SECONDS) -> list[float]:
        """log p(input_ids[t] | before t) at temperature 1, one for each id; 0 for the first."""
        async with self._deadline(deadline_s, "logprobs of a prompt"):
            answer = await self._post(
                "/generate",
                {
                    "rid": uuid.uuid4().hex,
                    "input_ids": list(map(int, input_ids)),
                    "stream": False,
                    "return_logprob": True,
                    "logprob_start_len": 0,
                    "extra_key": (
                        f"probe-{uuid.uuid4().hex}"
                    ),  # nothing cached has it: all of it is computed by the weights of now
                    "sampling_params": Sampling(max_new_tokens=1, temperature=0.0).to_json(),
                },
            )
        entries = answer["meta_info"]["input_token_logprobs"]
        if len(entries) != len(input_ids):
            raise EngineError(
                f"{self.url} returned {len(entries)} input logprobs for a prompt of"
                f" {len(input_ids)} tokens; its cache must be flushed before scoring"
            )
        return [0.0] + [float(entry[0]) for entry in entries[1:]]

    async def pause(self, mode: str = "abort") -> None:
        """Stops sampling.

        Running requests: "abort" returns them as they are, "retract" starts them over later,
        "in_place" freezes them.
        """
        async with self._deadline(CONTROL_SECONDS, f"pause({mode})"):
            await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        async with self._deadline(CONTROL_SECONDS, "continue"):
            await self._post("/continue_generation", {})

    async def update_weights(self, path: str, version: int, *, flush: bool = True) -> None:
        """Loads an HF-layout directory that the server can read.

        Check it (`model_info`, `score`) before resuming.

        Args:
          flush: forget cached prefixes. Frozen requests (pause "in_place") forbid it: SGLang 0.5.23
            then answers 400 although the weights changed.
        """
        async with self._deadline(UPDATE_SECONDS, "a weight update"):
            answer = await self._post(
                "/update_weights_from_disk",
                {
                    "model_path": str(path),
                    "weight_version": str(version),
                    "flush_cache": flush,
                    "abort_all_requests": False,
                },
            )
        if not answer.get("success"):
            raise EngineError(
                f"{self.url} did not take weights {version} from {path}: {answer.get('message')}"
            )

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

    async def release_memory(self, tags: tuple[str, ...] = ("weights", "kv_cache")) -> None:
        """Frees the device for somebody else.

        The engine must be idle and stays paused; SGLang needs --enable-memory-saver.
        """
        async with self._deadline(CONTROL_SECONDS, "release_memory_occupation"):
            await self._post("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: tuple[str, ...] = ("weights", "kv_cache")) -> None:
        """Takes the memory back.

        What it holds is undefined: weights must be loaded and proven before anything is sampled.
        """
        async with self._deadline(CONTROL_SECONDS, "resume_memory_occupation"):
            await self._post("/resume_memory_occupation", {"tags": list(tags)})

    async def dialect(self) -> Dialect:
        """Asked anew each time: a server may have been replaced by another version.

        Raises EngineError for one that is too old.
        """
        info = await self.server_info()
        if int(info.get("tokenizer_worker_num") or 1) > 1:
            raise EngineError(
                f"{self.url} runs {info['tokenizer_worker_num']} tokenizer workers: a pause and an"
                " update may meet different ones; start it with --tokenizer-worker-num 1"
            )
        return dialect_of(
            self.url, str(info.get("version", "")), info.get("engine") == "rome.serve"
        )

    async def health(self, seconds: float = HEALTH_SECONDS) -> Health:
        """How the server is. Never raises for one that is not well.

        Args:
          seconds: before it counts as hung. SGLang generates a token to answer and may need 20 s; a
            shorter wait condemns busy servers.
        """
        try:
            async with asyncio.timeout(seconds):
                async with self._client().get(
                    self.url + "/health_generate", headers=self._headers
                ) as response:
                    return (
                        "well"
                        if response.status == 200
                        else "busy"
                        if response.status in RETRY_STATUS
                        else "gone"
                    )
        except TimeoutError:  # also aiohttp's own, of a connection that was not taken
            return "hung"
        except (aiohttp.ClientError, OSError):
            return "gone"

    async def _info(self, name: str) -> dict[str, Any]:
        """New servers call it /model_info, old ones /get_model_info: whichever is there is
        remembered.
        """
        async with self._deadline(CONTROL_SECONDS, name):
            if name not in self._info_routes:
                status, answer, _ = await self._request("GET", f"/{name}", None)
                if status == 200:
                    self._info_routes[name] = f"/{name}"
                    return answer
                self._info_routes[name] = f"/get_{name}"
            status, answer, _ = await self._request("GET", self._info_routes[name], None)
            if status != 200:
                raise EngineError(
                    f"{self.url}{self._info_routes.pop(name)} answered {status}:"
                    f" {_error_text(answer)}; is this an SGLang server?"
                )
            return answer

    async def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, after as many attempts as back-pressure asks for.

        Ends by success, EngineError, or the caller's deadline.
        """
        wait = 0.1
        while True:
            status, answer, retry_after_s = await self._request("POST", route, body)
            if status == 200:
                return answer
            if status not in RETRY_STATUS:
                raise EngineError(f"{self.url}{route} answered {status}: {_error_text(answer)}")
            await asyncio.sleep(
                max(wait, retry_after_s) * random.uniform(1.0, 1.5)
            )  # jitter: whoever was refused at once must not return at once
            wait = min(2 * wait, 5.0)

    async def _request(
        self, method: str, route: str, body: dict[str, Any] | None
    ) -> tuple[int, Any, float]:
        """(status, parsed body, seconds of Retry-After).

        Broken connections are tried again for `dead_after_s`, then the server is dead.
        """
        give_up, wait = time.monotonic() + self.dead_after_s, 0.1
        while True:
            try:
                async with self._client().request(
                    method, self.url + route, json=body, headers=self._headers
                ) as response:
                    is_json = response.content_type == "application/json"
                    return (
                        response.status,
                        (await response.json() if is_json else await response.text()),
                        _retry_after(response.headers.get("Retry-After")),
                    )
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
                if time.monotonic() + wait > give_up:
                    raise EngineDead(
                        f"engine {self.url} is dead: {type(error).__name__} {error}; see its log,"
                        " start it again, and resume"
                    ) from error
            except (aiohttp.ClientError, ValueError) as error:
                raise EngineError(
                    f"{self.url}{route} did not answer in HTTP and JSON ({type(error).__name__}"
                    f" {error}); is this an SGLang server?"
                ) from error
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, 2.0)

    def _client(self) -> aiohttp.ClientSession:
        """The session of the running event loop.

        One of an earlier, finished loop is forgotten: its sockets went with it.
        """
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop or self._session.closed:
            if self._session is not None and not self._session.closed:
                self._session.detach()
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=10
            )  # totals are the callers' deadlines
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
            )
            self._loop = loop
        return self._session

    def _deadline(self, seconds: float, what: str) -> _Deadline:
        return _Deadline(
            seconds,
            f"{self.url} did not give {what} within {seconds:g} s; is it paused, overloaded or"
            " stuck? See its log",
        )

    def _require_proven(self, meta: dict[str, Any], known: list[int]) -> None:
        """Raises EngineUnproven for an answer by other weights than those that were proven last
        when it was asked for, or since.
        """
        if not known or not meta.get("output_token_logprobs"):
            return
        allowed = self._proven[len(self._proven) - 1 - self._proven[::-1].index(known[0]) :]
        for span in meta.get("weight_versions") or [{"version": meta["weight_version"]}]:
            if self._version(span["version"]) not in allowed:
                if self._refused is not None:  # known already
                    raise EngineRefused(self._refused)
                raise EngineUnproven(
                    f"{self.url} answered with weights {span['version']!r}; proven there were"
                    f" {', '.join(map(str, allowed))}"
                )

    def _append(self, completion: Completion, answer: dict[str, Any]) -> None:
        """Adds one answer's tokens to what earlier, aborted answers brought."""
        meta, start = answer["meta_info"], len(completion.output_ids)
        ids = list(answer["output_ids"])
        entries = meta["output_token_logprobs"] if ids else []
        if [entry[1] for entry in entries] != ids:
            raise EngineError(
                f"{self.url} returned {len(entries)} logprobs for {len(ids)} tokens, or of other"
                " tokens; this engine cannot be trained on"
            )
        spans = meta.get("weight_versions") or [
            {"version": meta["weight_version"], "start": 0, "end": len(ids)}
        ]
        completion.cached_tokens = (
            completion.cached_tokens if start else int(meta.get("cached_tokens", 0))
        )
        completion.output_ids += ids
        completion.logprobs += [float(entry[0]) for entry in entries]
        completion.finish_reason = (meta["finish_reason"] or {}).get("type", "abort")
        for span in spans:
            _append_span(
                completion.versions,
                self._version(span["version"]),
                start + span["start"],
                start + span["end"],
            )

    def _route_fields(self, completion: Completion, sampling: Sampling) -> dict[str, Any]:
        """Asks for the routes that are not known yet.

        Servers that do not know the second field send those of the whole sequence.
        """
        if sampling.routes_from is None:
            return {}
        known = 0 if completion.routes is None else len(completion.routes)
        return {
            "return_routed_experts": True,
            "routed_experts_start_len": sampling.routes_from + known,
        }

    def _append_routes(
        self, completion: Completion, meta: dict[str, Any], start: int, prompt_length: int
    ) -> None:
        """Adds the routes of the tokens that have none yet: a token keeps those of the pass that
        its successor was sampled from, also when an abort made the server run it again.
        """
        config, known = self.model, 0 if completion.routes is None else len(completion.routes)
        if config is None:
            raise ValueError(
                "routes were asked for, but the model is unknown; make Engine(url, model=config)"
            )
        if not meta.get("routed_experts"):
            raise EngineError(
                f"{self.url} returned no routes; start the SGLang server with"
                " --enable-return-routed-experts (and no gateway before it that drops the field),"
                " or set routing_replay to off or recompute"
            )
        ids = np.frombuffer(
            base64.b64decode(meta["routed_experts"]),
            np.dtype(meta.get("routed_experts_dtype") or "int32"),
        )
        total, each = (
            prompt_length + len(completion.output_ids) - 1,
            config.num_layers * config.experts_per_token,
        )
        wanted = total - start - known
        if ids.size not in (wanted * each, total * each):
            raise EngineError(
                f"{self.url} returned {ids.size} expert ids; {wanted} tokens in {config.num_layers}"
                f" layers with {config.experts_per_token} experts each have another number. Does it"
                " serve another model?"
            )
        try:
            routes = encode_routes(
                ids.reshape(-1, config.num_layers, config.experts_per_token)[-wanted:], config
            )
        except ValueError as error:
            raise EngineError(
                f"routes from {self.url}: {error}. Does it serve another model?"
            ) from error
        completion.routes = (
            routes if completion.routes is None else np.concatenate([completion.routes, routes])
        )

    def _version(self, text: str) -> int:
        """SGLang's versions are strings; ours are numbers, and a server that was never updated says
        "default": version 0.
        """
        try:
            return 0 if text == "default" else int(text)
        except ValueError:
            raise EngineError(
                f"{self.url} has weight_version {text!r}, not a number; start it with"
                " --weight-version 0"
            ) from None


class _Deadline:
    """asyncio.timeout that raises EngineError with a sentence."""

    def __init__(self, seconds: float, sentence: str):
        self._sentence = sentence
        self._timeout = asyncio.timeout(max(seconds, 0.0))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
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


def dialect_of(url: str, version: str, embedded: bool = False) -> Dialect:
    """Raises EngineError, with what to install, for versions before OLDEST and for what is no
    version.
    """
    if embedded:
        return Dialect(version, True, True)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None or (number := tuple(map(int, match.groups()))) < OLDEST:
        raise EngineError(
            f"{url} runs SGLang {version or 'of unknown version'}; weight updates need"
            f" {'.'.join(map(str, OLDEST))} or newer (requirements-sglang.txt)"
        )
    return Dialect(version, False, number >= TELLS_SPANS)


def _retry_after(header: str | None) -> float:
    """Seconds; the header's other form, a date, is rare between programs and taken as nothing."""
    try:
        return min(max(float(header or 0), 0.0), RETRY_AFTER_SECONDS)
    except ValueError:
        return 0.0


def _error_text(answer: Any) -> str:
    """Both shapes of error bodies: {"error": "text"} and {"error": {"message": ...}}; updates
    answer {"message": ...}.
    """
    if not isinstance(answer, dict):
        return str(answer)[:500] or "no text"
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
