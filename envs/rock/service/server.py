"""The other end of the protocol: an aiohttp application that checks who asks and what, and hands it
to a service (a worker or an admin).
"""

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from envs.rock.service import openapi
from envs.rock.service.auth import Tokens
from envs.rock.service.metrics import CONTENT_TYPE, Metrics
from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.api import (
    MAX_FILES_BYTES,
    MAX_JSON_BYTES,
    WORKER,
    WORKER_USER,
    Operation,
    Refusal,
    check,
    encode_error,
    parse_json,
    parse_query,
)
from envs.rock.wire.client import Pipe, WebSocketPipe, join

log = logging.getLogger("rock.service")
OPEN = ("/health", "/openapi.json")  # to anybody
BODY_SECONDS = 30.0  # for all of a JSON body
STALL_SECONDS = 60.0  # between two pieces of a file
MAX_REQUESTS = 20_000  # served at once; starts that wait in the queue hold one each
# For web.AppRunner. A caller that leaves cancels what it asked for, those that wait in rounds come
# again after a shutdown, and a path of 4096 bytes fits in a query.
RUNNER = {
    "access_log": None,
    "shutdown_timeout": 2.0,
    "handler_cancellation": True,
    "max_line_size": 64 << 10,
}
USER = web.RequestKey("user", str) if hasattr(web, "RequestKey") else "user"


class Service(Protocol):
    """What an application serves. `user`: whose token the caller showed."""

    async def call(
        self, op: str, arguments: dict[str, Any], files: Mapping[str, bytes] | None, user: str
    ) -> dict[str, Any] | None:
        """None: not finished yet."""

    def read(self, op: str, arguments: dict[str, Any], user: str) -> AsyncIterator[bytes]: ...
    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str
    ) -> dict[str, Any]: ...
    async def connect(self, arguments: dict[str, Any], user: str) -> Pipe: ...


class Server:
    """Routes of `operations` over `service`.

    Args:
      tokens: None lets everybody in as "anyone"; for tests of a service alone.
      only_for: the one user that this is for; None: all but workers, who have the routes below
        WORKER to themselves.
    """

    def __init__(
        self,
        service: Service,
        operations: Mapping[str, Operation],
        tokens: Tokens,
        title: str,
        only_for: str | None = None,
        metrics: Metrics | None = None,
        max_requests: int = MAX_REQUESTS,
    ):
        self.service, self.operations, self.tokens, self.title, self.only_for = (
            service,
            operations,
            tokens,
            title,
            only_for,
        )
        self.metrics = metrics or Metrics()
        self._max_requests, self._busy = max_requests, 0
        self.more_documentation: dict[
            str, Any
        ] = {}  # of routes that others add to the application: path -> OpenAPI's item

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_JSON_BYTES)
        handlers = {
            "json": self._json,
            "read": self._read,
            "write": self._write,
            "connect": self._connect,
        }
        for name, operation in self.operations.items():
            app.router.add_route(
                operation.method, operation.path, _with(handlers[operation.shape], name, operation)
            )
        for path, handler in (
            ("/health", self._health),
            ("/openapi.json", self._openapi),
            ("/metrics", self._metrics),
        ):
            app.router.add_route("GET", path, handler)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Who may, how many at once, and every error in its shape.

        Nothing of a request but its route and its user's name is ever logged.
        """
        began, code = time.monotonic(), "ok"
        route = (
            request.match_info.route.resource.canonical
            if request.match_info.route.resource
            else "none"
        )
        self._busy += 1
        try:
            if self._busy > self._max_requests:
                raise Refusal("busy", f"{self._max_requests} requests are being served; come again")
            if request.path not in OPEN:
                self._admit(request)
            return await handler(request)
        except asyncio.CancelledError:
            code = "gone"
            raise
        except web.HTTPException as error:
            if error.status < 400:
                raise
            code = {404: "no_such_route", 405: "no_such_route", 413: "too_large"}.get(
                error.status, "bad_request"
            )
            return self._refuse(
                request, Refusal(code, f"{request.method} {request.path[:200]}: {error.reason}")
            )
        except Exception as error:
            status, body = encode_error(error)
            code = body["error"]["code"]
            if code == "internal":
                log.error("%s failed for %s", route, request.get(USER), exc_info=error)
            return self._refuse(request, error)
        finally:
            self._busy -= 1
            log.debug("%s %s by %s: %s", request.method, route, request.get(USER), code)
            self.metrics.count(
                "rock_requests_total", "Requests by route and outcome.", route=route, code=code
            )
            self.metrics.observe(
                "rock_request_seconds",
                "How long requests took, waiting included.",
                time.monotonic() - began,
                route=route,
            )

    def _admit(self, request: web.Request) -> None:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        user = self.tokens.user(
            token if kind.lower() == "bearer" else request.headers.get("X-API-Key")
        )
        if user is None:
            raise Refusal(
                "unauthorized",
                "this needs a token: Authorization: Bearer TOKEN, or X-API-Key: TOKEN",
            )
        request[USER] = user
        only_for = self.only_for or (WORKER_USER if request.path.startswith(WORKER) else None)
        if (only_for and user != only_for) or (only_for is None and user == WORKER_USER):
            raise Refusal("forbidden", f"{request.path[:200]} is not for {user}")

    def _refuse(self, request: web.Request, error: Exception) -> web.Response:
        """An error as an answer.

        Routes that speak another protocol (E2B's) tell it in their way.
        """
        status, body = encode_error(error)
        shape = request.match_info.route.handler
        response = web.json_response(
            getattr(shape, "error_shape", lambda status, body: body)(status, body), status=status
        )
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    # -- the shapes of operations

    async def _json(self, name: str, operation: Operation, request: web.Request) -> web.Response:
        files = None
        try:
            async with asyncio.timeout(BODY_SECONDS):
                if operation.takes_files and request.content_type.startswith("multipart/"):
                    given, files = await _parts(request)
                else:
                    given = parse_json(await request.read())
        except TimeoutError:
            raise Refusal(
                "slow_request", f"the body did not arrive within {BODY_SECONDS:.0f} s"
            ) from None
        arguments = check(operation.fields, given)
        if operation.takes_files:
            files = _named(arguments.pop("files", []), files or [])
        if (
            "wait" in arguments
            and "wait" in operation.fields
            and "call" in operation.fields
            and name != "wait"
            and "call" not in arguments
        ):
            raise ValueError("wait makes sense with call only")
        answer = await self.service.call(name, arguments, files, request.get(USER, ""))
        return web.json_response({}, status=202) if answer is None else web.json_response(answer)

    async def _read(
        self, name: str, operation: Operation, request: web.Request
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        async with contextlib.aclosing(
            self.service.read(name, _query(operation, request), request.get(USER, ""))
        ) as pieces:
            piece = await anext(pieces, b"")  # an error before the first byte is told in words
            await response.prepare(request)
            try:
                while piece:
                    async with asyncio.timeout(STALL_SECONDS):
                        await response.write(piece)
                    piece = await anext(pieces, b"")
                await response.write_eof()
            except Exception as error:
                log.debug("%s broke off: %s", name, type(error).__name__)
                if request.transport:
                    request.transport.abort()
        return response

    async def _write(self, name: str, operation: Operation, request: web.Request) -> web.Response:
        answer = await self.service.write(
            name, _query(operation, request), _body(request), request.get(USER, "")
        )
        return web.json_response(answer)

    async def _connect(
        self, name: str, operation: Operation, request: web.Request
    ) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=4 * PIECE_BYTES, heartbeat=STALL_SECONDS)
        if not socket.can_prepare(request).ok:
            raise ValueError("this is a WebSocket: ask for an upgrade")
        pipe = await self.service.connect(_query(operation, request), request.get(USER, ""))
        try:
            await socket.prepare(request)
            await join(WebSocketPipe(socket), pipe)
        finally:
            pipe.close()
        return socket

    # -- about itself

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(
            openapi.document(self.title, self.operations, self.more_documentation)
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text().encode(), headers={"Content-Type": CONTENT_TYPE}
        )


def _with(
    handler: Callable, name: str, operation: Operation
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(name, operation, request)

    return handle


def _query(operation: Operation, request: web.Request) -> dict[str, Any]:
    try:
        pairs = urllib.parse.parse_qsl(
            request.rel_url.raw_query_string,
            keep_blank_values=True,
            errors="surrogateescape",
            max_num_fields=50,
        )
    except ValueError as error:
        raise ValueError(f"the query makes no sense: {error}") from None
    return parse_query(operation.fields, pairs)


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """The octets of a request, as they come."""
    while True:
        try:
            piece = await asyncio.wait_for(request.content.readany(), STALL_SECONDS)
        except TimeoutError:
            raise Refusal("slow_request", f"nothing arrived for {STALL_SECONDS:.0f} s") from None
        except (
            aiohttp.ClientError,
            aiohttp.http_exceptions.HttpProcessingError,
            ConnectionError,
        ) as error:
            raise Refusal("bad_request", f"the body broke off: {type(error).__name__}") from error
        if not piece:
            return
        yield piece


async def _parts(request: web.Request) -> tuple[Any, list[bytes]]:
    """The request and its files, of a multipart body."""
    given, files, left = None, [], MAX_FILES_BYTES
    try:
        reader = await request.multipart()
        async for part in reader:
            if not isinstance(part, aiohttp.BodyPartReader) or part.name not in ("request", "file"):
                raise ValueError('the parts are one "request" and then "file"s')
            data = bytearray()
            while piece := await part.read_chunk(PIECE_BYTES):
                data += piece
                if len(data) > (left if part.name == "file" else MAX_JSON_BYTES):
                    raise Refusal(
                        "too_large",
                        f"a request has at most {MAX_JSON_BYTES} bytes and its files"
                        f" {MAX_FILES_BYTES}",
                    )
            if part.name == "request":
                given = parse_json(bytes(data))
            else:
                files.append(bytes(data))
                left -= len(data)
    except (
        AssertionError,
        RuntimeError,
        aiohttp.ClientError,
        aiohttp.http_exceptions.HttpProcessingError,
    ) as error:  # what aiohttp raises for malformed parts
        raise ValueError(f"the multipart body makes no sense: {type(error).__name__}") from None
    return given, files


def _named(names: list[str], files: list[bytes]) -> dict[str, bytes]:
    if len(names) != len(files) or len(set(names)) != len(names):
        raise ValueError(f"{len(files)} files came with {len(set(names))} different names")
    return dict(zip(names, files))
