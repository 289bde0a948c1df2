"""The server's end of the ROCK protocol: checks who asks and what, then calls a service.

The service behind it is a worker or an admin.
"""

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from envs.rock.service import openapi
from envs.rock.service.auth import Tokens
from envs.rock.service.metrics import CONTENT_TYPE, Metrics
from envs.rock.service.multipart import read_parts
from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.client import Pipe, WebSocketPipe, relay
from envs.rock.wire.errors import Refusal, encode_error
from envs.rock.wire.fields import check, parse_json, parse_query
from envs.rock.wire.operations import MAX_JSON_BYTES, WORKER, WORKER_USER, Operation

log = logging.getLogger("rock.service")
PUBLIC_PATHS = ("/health", "/openapi.json")  # these need no token
BODY_SECONDS = 30.0  # within which all of a JSON body must arrive
STALL_SECONDS = 60.0  # between two pieces of a file
MAX_REQUESTS = 20_000  # served at once; a start that waits in the queue holds one
USER = web.RequestKey("user", str) if hasattr(web, "RequestKey") else "user"
# codes of the errors that aiohttp itself answers with, by HTTP status
_HTTP_CODES = {404: "no_such_route", 405: "no_such_route", 413: "too_large"}
_Handler = Callable[[str, Operation, web.Request], Awaitable[web.StreamResponse]]


class Service(Protocol):
    """What a Server serves. `user` is the name that belongs to the caller's token."""

    async def call(
        self, op: str, arguments: dict[str, Any], files: Mapping[str, bytes] | None, user: str
    ) -> dict[str, Any] | None:
        """Carry out an operation; None: it has not finished yet."""

    def read(self, op: str, arguments: dict[str, Any], user: str) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file or an archive."""

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str
    ) -> dict[str, Any]:
        """Take the bytes of a file or an archive."""

    async def connect(self, arguments: dict[str, Any], user: str) -> Pipe:
        """Open a connection to a port in a sandbox."""


class Server:
    """The routes of a table of operations over a service.

    Args:
      service: carries the operations out.
      operations: the table, by name.
      tokens: who may ask.
      title: of the OpenAPI document.
      only_for: the one user that may ask. None: everybody but the workers, to whom the routes below
        WORKER are reserved.
      metrics: what /metrics shows; its own by default.
    """

    def __init__(
        self,
        service: Service,
        operations: Mapping[str, Operation],
        tokens: Tokens,
        title: str,
        only_for: str | None = None,
        metrics: Metrics | None = None,
    ):
        self.service = service
        self.operations = operations
        self.tokens = tokens
        self.title = title
        self.only_for = only_for
        self.metrics = metrics or Metrics()
        self._busy = 0

    def app(self) -> web.Application:
        """Return the application, to which more routes may be added."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_JSON_BYTES)
        handlers: dict[str, _Handler] = {
            "json": self._json,
            "read": self._read,
            "write": self._write,
            "connect": self._connect,
        }
        for name, operation in self.operations.items():
            handler = _bind(handlers[operation.shape], name, operation)
            app.router.add_route(operation.method, operation.path, handler)
        app.router.add_route("GET", "/health", self._health)
        app.router.add_route("GET", "/openapi.json", self._openapi)
        app.router.add_route("GET", "/metrics", self._metrics)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Admit a request, limit how many are served at once, and report errors by their code.

        Of a request only its route and its user's name are ever logged.
        """
        began = time.monotonic()
        code = "ok"
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "none"
        self._busy += 1
        try:
            if self._busy > MAX_REQUESTS:
                raise Refusal("busy", f"{MAX_REQUESTS} requests are being served; come again")
            if request.path not in PUBLIC_PATHS:
                self._admit(request)
            return await handler(request)
        except asyncio.CancelledError:
            code = "gone"
            raise
        except web.HTTPException as error:
            if error.status < 400:
                raise
            code = _HTTP_CODES.get(error.status, "bad_request")
            message = f"{request.method} {request.path[:200]}: {error.reason}"
            return _refuse(request, Refusal(code, message))
        except Exception as error:
            _, body = encode_error(error)
            code = body["error"]["code"]
            if code == "internal":
                log.error("%s failed for %s", route, request.get(USER), exc_info=error)
            return _refuse(request, error)
        finally:
            self._busy -= 1
            log.debug("%s %s by %s: %s", request.method, route, request.get(USER), code)
            self._count_request(route, code, time.monotonic() - began)

    def _count_request(self, route: str, code: str, seconds: float) -> None:
        self.metrics.count(
            "rock_requests_total", "Requests by route and outcome.", route=route, code=code
        )
        self.metrics.observe(
            "rock_request_seconds",
            "How long requests took, waiting included.",
            seconds,
            route=route,
        )

    def _admit(self, request: web.Request) -> None:
        """Find the user of a request's token; Refusal if there is none, or the route is not his."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            user = self.tokens.user(token)
        else:
            user = self.tokens.user(request.headers.get("X-API-Key"))
        if user is None:
            raise Refusal(
                "unauthorized",
                "this needs a token: Authorization: Bearer TOKEN, or X-API-Key: TOKEN",
            )
        request[USER] = user
        only_for = self.only_for
        if only_for is None and request.path.startswith(WORKER):
            only_for = WORKER_USER
        may_ask = user == only_for if only_for else user != WORKER_USER
        if not may_ask:
            raise Refusal("forbidden", f"{request.path[:200]} is not for {user}")

    # -- one handler for each shape of operation

    async def _json(self, name: str, operation: Operation, request: web.Request) -> web.Response:
        given, files = await _read_request(operation, request)
        arguments = check(operation.fields, given)
        named_files = None
        if operation.takes_files:
            named_files = _name_files(arguments.pop("files", []), files)
        _check_wait(name, operation, arguments)
        answer = await self.service.call(name, arguments, named_files, request.get(USER, ""))
        if answer is None:
            return web.json_response({}, status=202)
        return web.json_response(answer)

    async def _read(
        self, name: str, operation: Operation, request: web.Request
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        source = self.service.read(name, _query(operation, request), request.get(USER, ""))
        async with contextlib.aclosing(source) as pieces:
            piece = await anext(pieces, b"")  # an error before the first byte becomes a response
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
        query = _query(operation, request)
        answer = await self.service.write(name, query, _body(request), request.get(USER, ""))
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
            await relay(WebSocketPipe(socket), pipe)
        finally:
            pipe.close()
        return socket

    # -- routes about the service itself

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _openapi(self, request: web.Request) -> web.Response:
        document = openapi.document(self.title, self.operations)
        return web.json_response(document)

    async def _metrics(self, request: web.Request) -> web.Response:
        text = self.metrics.text().encode()
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


def _bind(
    handler: _Handler, name: str, operation: Operation
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(name, operation, request)

    return handle


def _refuse(request: web.Request, error: Exception) -> web.Response:
    status, body = encode_error(error)
    response = web.json_response(body, status=status)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def _read_request(operation: Operation, request: web.Request) -> tuple[Any, list[bytes]]:
    """Return a request's JSON and the files that came with it."""
    is_multipart = request.content_type.startswith("multipart/")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if operation.takes_files and is_multipart:
                return await read_parts(request)
            return parse_json(await request.read()), []
    except TimeoutError:
        raise Refusal(
            "slow_request", f"the body did not arrive within {BODY_SECONDS:.0f} s"
        ) from None


def _name_files(names: list[str], files: list[bytes]) -> dict[str, bytes]:
    if len(names) != len(files) or len(set(names)) != len(names):
        raise ValueError(f"{len(files)} files came with {len(set(names))} different names")
    return dict(zip(names, files, strict=True))


def _check_wait(name: str, operation: Operation, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a request would wait for a call without a key to ask for it again."""
    has_calls = "wait" in operation.fields and "call" in operation.fields
    if has_calls and name != "wait" and "wait" in arguments and "call" not in arguments:
        raise ValueError("wait makes sense with call only")


def _query(operation: Operation, request: web.Request) -> dict[str, Any]:
    try:
        pairs = urllib.parse.parse_qsl(
            request.rel_url.raw_query_string,
            keep_blank_values=True,
            errors="surrogateescape",
            max_num_fields=50,
        )
    except ValueError as error:
        raise ValueError(f"the query is malformed: {error}") from None
    return parse_query(operation.fields, pairs)


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the bytes of a request's body as they arrive."""
    broken = (
        aiohttp.ClientError,
        aiohttp.http_exceptions.HttpProcessingError,
        ConnectionError,
    )
    while True:
        try:
            piece = await asyncio.wait_for(request.content.readany(), STALL_SECONDS)
        except TimeoutError:
            raise Refusal("slow_request", f"nothing arrived for {STALL_SECONDS:.0f} s") from None
        except broken as error:
            raise Refusal("bad_request", f"the body broke off: {type(error).__name__}") from error
        if not piece:
            return
        yield piece
