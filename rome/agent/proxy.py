"""The model proxy: an unmodified agent asks the policy in its own dialect.

The proxy stands behind a door of the episode's sandbox (`ModelProxy.door`), where whoever calls is
known, or listens on HTTP (`ModelProxy.listen`), where a secret of the episode tells it; only the
secret's hash is kept, and it is revoked at the episode's end. All tokens are the dialogue's: the
proxy reads requests, asks, and writes answers in the shape that the agent expects.

An agent may be cut off at any time. Its answer then waits for the retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web

from envs.rock.doors import Door
from rome.agent.dialects import DIALECTS, BadRequest, Dialect, Request, anthropic, openai_responses
from rome.agent.dialects.openai_responses import Responses
from rome.agent.dialogue import Dialogue, DialogueError
from rome.agent.messages import Reply
from rome.engine.errors import EngineError

MAX_BODY_BYTES = 16 << 20
MAX_BODIES_BYTES = 32 << 20  # that one episode may send at once
BODY_SECONDS = 60.0
# An answer that takes no longer has its true status; then a stream begins, with pings.
FIRST_PING_SECONDS = 5.0
PING_SECONDS = 10.0
MAX_KEYS = 1024  # idempotency keys of one episode that are remembered
CODES = {
    "messages": "invalid_messages",
    "truncated": "truncated_answer",
    "context_full": "context_length_exceeded",
    "too_many_messages": "too_many_messages",
    "closed": "episode_over",
}
log = logging.getLogger(__name__)


class Refused(Exception):
    """A call that ends with an HTTP status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclasses.dataclass
class Budget:
    """What one episode's agent may ask for in all.

    Attributes:
      calls: answers.
      tokens: sampled tokens.
    """

    calls: int = 1000
    tokens: int = 1 << 20


class ProxiedEpisode:
    """One episode's agent, as the proxy sees it.

    Args:
      dialogue: answers its calls.
      model: name of the policy in the list of models.
      budget: beyond it calls are refused.

    Attributes:
      fault: the engine's first error; the episode is the infrastructure's then.
      refusals: calls that were refused, by code.
      responses: conversations that calls name instead of sending them.
      bytes_in_flight: of the bodies that are being read.
      counting: held while tokens are counted, so that one episode fills one thread at most.
    """

    def __init__(self, dialogue: Dialogue, model: str = "policy", budget: Budget | None = None):
        self.dialogue = dialogue
        self.model = model
        self.fault: EngineError | None = None
        self.refusals: dict[str, int] = {}
        self.responses = Responses()
        self.bytes_in_flight = 0
        self.counting = asyncio.Lock()
        self._budget = budget or Budget()
        self._working = 0
        self._last = time.monotonic()
        self._keys: dict[str, None] = {}  # in order of their arrival

    @property
    def is_exhausted(self) -> bool:
        """Whether the budget is used up."""
        return self._is_used_up(len(self.dialogue.session.chunks))

    @property
    def is_working(self) -> bool:
        """Whether a call is open."""
        return self._working > 0

    @property
    def idle_seconds(self) -> float:
        """How long no call has been open."""
        return 0.0 if self._working else time.monotonic() - self._last

    async def complete(self, request: Request, headers: Mapping[str, str]) -> Reply:
        """Answer a call.

        Raises:
          Refused: it cannot be answered.
        """
        self._working += 1
        try:
            return await self.dialogue.complete(
                request.messages,
                request.tools,
                max_new_tokens=request.max_new_tokens,
                retry=self._is_retry(headers),
                admit=self._admit,
            )
        except RecursionError as error:
            said = "it is nested too deep; send flatter arguments or schemas"
            raise self._refuse(400, "invalid_request", said) from error
        except DialogueError as error:
            raise self._refuse(400, CODES[error.reason], str(error)) from error
        except EngineError as error:
            self.fault = self.fault or error
            raise self._refuse(503, "engine_unavailable", str(error)) from error
        finally:
            self._working -= 1
            self._last = time.monotonic()

    def _is_used_up(self, calls: int) -> bool:
        sampled = sum(len(chunk.action_ids) for chunk in self.dialogue.session.chunks)
        return calls >= self._budget.calls or sampled >= self._budget.tokens

    def _admit(self) -> None:
        """Refuse a new answer where those that are there or begun use up the budget."""
        begun = len(self.dialogue.session.chunks) + self.dialogue.open_calls
        if self._is_used_up(begun):
            budget = self._budget
            said = f"this episode has had its {budget.calls} calls or {budget.tokens} tokens"
            raise self._refuse(400, "episode_limit", said)

    def _refuse(self, status: int, code: str, message: str) -> Refused:
        self.refusals[code] = self.refusals.get(code, 0) + 1
        return Refused(status, code, message)

    def _is_retry(self, headers: Mapping[str, str]) -> bool | None:
        """Return whether the client says that it repeats a call; None where it does not say."""
        key = headers.get("Idempotency-Key", "")[:200]
        if key:
            is_known = key in self._keys
            self._keys[key] = None
            if len(self._keys) > MAX_KEYS:
                del self._keys[next(iter(self._keys))]
            if is_known:
                return True
        count = headers.get("x-stainless-retry-count", "")[:9]
        return int(count) > 0 if count.isdecimal() else None


class ModelProxy:
    """Answers the agents of many episodes. Its episodes belong to one event loop."""

    def __init__(self) -> None:
        self._by_secret: dict[bytes, ProxiedEpisode] = {}

    def door(self, episode: ProxiedEpisode) -> Door:
        """Return a door of a sandbox at which this episode's agent is answered; no key is asked.

        It may be made outside of the event loop.
        """

        def make_protocol() -> Any:
            return web.Server(_Handler(lambda _: episode), handler_cancellation=True)()

        return Door.http(make_protocol)

    def admit(self, episode: ProxiedEpisode) -> str:
        """Return a new secret that stands for the episode over HTTP, until `revoke`."""
        secret = f"sk-{secrets.token_urlsafe(32)}"
        self._by_secret[_digest(secret)] = episode
        return secret

    def revoke(self, secret: str) -> None:
        """Forget a secret: calls with it get 401."""
        self._by_secret.pop(_digest(secret), None)

    @contextlib.asynccontextmanager
    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Serve over HTTP; yields the URL, without /v1."""
        server = web.Server(_Handler(self._episode_of), handler_cancellation=True)
        listening = await asyncio.get_running_loop().create_server(server, host, port)
        try:
            where = listening.sockets[0].getsockname()
            yield f"http://{where[0]}:{where[1]}"
        finally:
            listening.close()
            await server.shutdown(timeout=1.0)

    def _episode_of(self, request: web.BaseRequest) -> ProxiedEpisode:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        secret = given or request.headers.get("x-api-key", "")
        episode = self._by_secret.get(_digest(secret))
        if episode is None:
            raise Refused(401, "invalid_api_key", "the key is of no episode that is running")
        return episode


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


class _Handler:
    """Handles the requests of a server.

    Args:
      find: request -> the episode that it belongs to; Refused where there is none.
    """

    def __init__(self, find: Callable[[web.BaseRequest], ProxiedEpisode]) -> None:
        self._find = find

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path.rstrip("/")
        dialect = _BY_PATH.get(path, _BY_PATH["/v1/chat/completions"])
        try:
            episode = self._find(request)
            if request.method in ("GET", "HEAD"):
                return _get(path, episode)
            if request.method != "POST" or path not in _POSTS:
                raise Refused(404, "not_found", f"no route {request.method} {path[:200]}")
            body, size = await _read_body(request, episode)
            if dialect is openai_responses.DIALECT:
                body = episode.responses.resolve(body)
            asked = dialect.read(body)
            if path == COUNT_PATH:
                return await _count(episode, asked)
            identity = secrets.token_hex(12)

            async def answer() -> Reply:
                reply = await episode.complete(asked, request.headers)
                if dialect is openai_responses.DIALECT and body.get("store") is not False:
                    episode.responses.keep(body, size, reply, identity)
                return reply

            answering = asyncio.ensure_future(answer())
            return await _respond(request, dialect, asked, answering, identity)
        except BadRequest as error:
            return _error(dialect, Refused(400, "invalid_request", str(error)))
        except RecursionError:
            return _error(dialect, Refused(400, "invalid_request", "it is nested too deep"))
        except Refused as error:
            return _error(dialect, error)


async def _count(episode: ProxiedEpisode, asked: Request) -> web.Response:
    """Answer how many tokens a conversation has; counted beside the event loop."""
    count = episode.dialogue.count_tokens
    try:
        async with episode.counting:
            tokens = await asyncio.to_thread(count, asked.messages, asked.tools)
        return web.json_response({"input_tokens": tokens})
    except DialogueError as error:
        raise Refused(400, CODES[error.reason], str(error)) from error
    except ValueError as error:  # of the chat template
        raise Refused(400, "invalid_messages", str(error)) from error


async def _respond(
    request: web.BaseRequest,
    dialect: Dialect,
    asked: Request,
    answering: asyncio.Future[Reply],
    identity: str,
) -> web.StreamResponse:
    """Send the answer, whole or as a stream; the call is cancelled where its client goes away."""
    try:
        if not asked.stream:
            return web.json_response(dialect.answer(await answering, asked, identity))
        await asyncio.wait({answering}, timeout=FIRST_PING_SECONDS)
        if answering.done() and answering.exception() is not None:
            answering.result()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.headers["Cache-Control"] = "no-cache"
        await response.prepare(request)
        while not answering.done():
            await response.write(dialect.ping)
            await asyncio.wait({answering}, timeout=PING_SECONDS)
        for piece in _frames(dialect, asked, answering, identity):
            await response.write(piece)
        await response.write_eof()
        return response
    finally:
        answering.cancel()


def _frames(
    dialect: Dialect, asked: Request, answering: asyncio.Future[Reply], identity: str
) -> list[bytes]:
    """Return the frames of an answer, or of the error that it became after the stream began."""
    try:
        return list(dialect.events(answering.result(), asked, identity))
    except Refused as error:
        body = json.dumps(dialect.error(error.status, error.code, str(error)))
        return [f"event: error\ndata: {body}\n\n".encode()]


async def _read_body(
    request: web.BaseRequest, episode: ProxiedEpisode
) -> tuple[Mapping[str, Any], int]:
    """Return the JSON object of a request, and how many bytes it had."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                data += piece
                episode.bytes_in_flight += len(piece)
                if len(data) > MAX_BODY_BYTES:
                    raise Refused(
                        413, "request_too_large", f"the body has more than {MAX_BODY_BYTES} bytes"
                    )
                if episode.bytes_in_flight > MAX_BODIES_BYTES:
                    said = f"the bodies of all calls have more than {MAX_BODIES_BYTES} bytes"
                    raise Refused(503, "too_much_at_once", said)
    except TimeoutError:
        raise Refused(408, "timeout", f"the body did not come in {BODY_SECONDS:g} s") from None
    except web.RequestPayloadError as error:
        raise Refused(400, "invalid_body", f"the body cannot be read: {error}") from error
    finally:
        episode.bytes_in_flight -= len(data)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(body, Mapping):
        raise Refused(400, "invalid_json", "the body is no JSON object")
    return body, len(data)


def _get(path: str, episode: ProxiedEpisode) -> web.Response:
    """Answer what clients look at before they begin: the list of models, and whether we live."""
    model = {"id": episode.model, "object": "model", "created": 0, "owned_by": "rome"}
    if path == "/v1/models":
        return web.json_response({"object": "list", "data": [model]})
    if path.startswith("/v1/models/"):
        return web.json_response(model | {"id": path.removeprefix("/v1/models/")})
    if path in ("", "/health", "/v1"):
        return web.json_response({"status": "ok"})
    raise Refused(404, "not_found", f"no route GET {path[:200]}")


def _error(dialect: Dialect, error: Refused) -> web.Response:
    body = dialect.error(error.status, error.code, str(error))
    return web.json_response(body, status=error.status)


COUNT_PATH = "/v1/messages/count_tokens"
_BY_PATH: dict[str, Dialect] = {dialect.path: dialect for dialect in DIALECTS}
_BY_PATH[COUNT_PATH] = anthropic.DIALECT
_POSTS = frozenset(_BY_PATH)
