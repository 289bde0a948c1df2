"""The client's end of the ROCK protocol: sends requests to an admin or a worker over HTTP.

Errors of the service are raised as the exception types of envs.rock.errors.
"""

import asyncio
import contextlib
import json
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import aiohttp
import yarl

from envs.rock.errors import SandboxError
from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.errors import (
    NO_ANSWER,
    Disconnected,
    decode_error,
    decode_foreign,
    is_ours,
)
from envs.rock.wire.fields import parse_json
from envs.rock.wire.operations import GRACE_SECONDS, TO_ADMIN, TO_WORKER

T = TypeVar("T")
MAX_ANSWER_BYTES = 128 << 20  # the other end is not trusted
CONNECT_SECONDS = 10.0
STALL_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.05  # of retry_for, doubled after each attempt
MAX_PAUSE_SECONDS = 2.0
OPERATIONS = TO_WORKER | TO_ADMIN
_CONNECTION_ERRORS = (TimeoutError, aiohttp.ClientError, OSError)


class Pipe(Protocol):
    """A two-way stream of bytes; reading b"" means that the other direction has ended."""

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end."""

    async def write(self, data: bytes) -> None:
        """Send bytes."""

    async def write_eof(self) -> None:
        """End this direction; the other one may go on."""

    def close(self) -> None:
        """End both directions."""


class Client:
    """A connection pool to one service, with the token that requests carry.

    Create it, use it and `close` it in one event loop.
    """

    def __init__(self, url: str, token: str):
        self.url = url.rstrip("/")
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS
        )
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout,
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._http.closed

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    async def call(
        self,
        op: str,
        arguments: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        """Send a request with a JSON body.

        Args:
          op: a key of OPERATIONS.
          arguments: members of the request.
          files: content by name, for an operation that takes files.
          user: ignored; the token says who asks.

        Returns:
          The response; None if the call has not finished: send the request again, or "wait".

        Raises:
          Disconnected: no response came; whether the request was carried out is unknown.
          SandboxError, ValueError: the service reported an error (see wire.errors.CODES).
        """
        del user
        body: dict[str, Any] = {
            "data": json.dumps(arguments).encode(),
            "headers": {"Content-Type": "application/json"},
        }
        if files:
            body = {"data": _make_form(arguments, files)}
        timeout = aiohttp.ClientTimeout(
            total=_max_duration(arguments) + GRACE_SECONDS, sock_connect=CONNECT_SECONDS
        )
        try:
            async with self._http.post(
                self._url(op), **body, timeout=timeout, allow_redirects=False
            ) as response:
                return await self._read_answer(response)
        except _CONNECTION_ERRORS as error:
            raise self._lost(error) from error

    async def ask(self, op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request that is answered at once: `call`, where None would be an error."""
        answer = await self.call(op, arguments)
        if answer is None:
            raise SandboxError(f"the service has not finished {op}, which cannot be waited for")
        return answer

    async def read(
        self, op: str, arguments: Mapping[str, Any], user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file or an archive; errors as in `call`."""
        del user
        try:
            async with self._http.get(self._url(op, arguments), allow_redirects=False) as response:
                is_file = response.content_type == "application/octet-stream"
                if response.status != 200 or not is_file:
                    await self._read_answer(response)
                    raise decode_foreign(response.status, self.url)
                async for piece in response.content.iter_chunked(PIECE_BYTES):
                    yield piece
        except _CONNECTION_ERRORS as error:
            raise self._lost(error) from error

    async def write(
        self, op: str, arguments: Mapping[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        """Send bytes and return the response; errors as in `call`.

        An exception that `pieces` raises is passed on unchanged.
        """
        del user
        source_errors: list[Exception] = []

        async def watched() -> AsyncIterator[bytes]:
            try:
                async for piece in pieces:
                    # one large piece would fill the socket's buffer whole
                    for start in range(0, len(piece), PIECE_BYTES):
                        yield piece[start : start + PIECE_BYTES]
            except Exception as error:
                source_errors.append(error)
                raise

        try:
            async with self._http.post(
                self._url(op, arguments),
                data=watched(),
                headers={"Content-Type": "application/octet-stream"},
                allow_redirects=False,
            ) as response:
                return await self._read_answer(response) or {}
        except _CONNECTION_ERRORS as error:
            if source_errors:
                raise source_errors[0] from None
            raise self._lost(error) from error

    async def connect(self, arguments: Mapping[str, Any], user: str = "") -> Pipe:
        """Open a connection to a port inside a sandbox, or await one from it at a door."""
        del user
        try:
            socket = await self._http.ws_connect(
                self._url("connect", arguments),
                max_msg_size=4 * PIECE_BYTES,
                autoping=True,
                heartbeat=STALL_SECONDS,
            )
        except aiohttp.WSServerHandshakeError as error:
            # The handshake's answer has no body by which to know whose it is.
            if error.status in NO_ANSWER:
                raise decode_foreign(error.status, self.url) from error
            raise SandboxError(
                f"no connection to {arguments.get('door') or arguments.get('port')} of the"
                f" sandbox: HTTP status {error.status}"
            ) from error
        except _CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        return WebSocketPipe(socket)

    async def _read_answer(self, response: aiohttp.ClientResponse) -> dict[str, Any] | None:
        data = bytearray()
        async for piece in response.content.iter_chunked(PIECE_BYTES):
            data += piece
            if len(data) > MAX_ANSWER_BYTES:
                raise SandboxError(f"the service's answer has more than {MAX_ANSWER_BYTES} bytes")
        if response.status == 202:
            return None
        try:
            body = parse_json(bytes(data))
        except ValueError:
            body = None
        if not is_ours(response.status, body):
            raise decode_foreign(response.status, self.url)
        if response.status != 200:
            raise decode_error(response.status, body)
        return body

    def _url(self, op: str, query: Mapping[str, Any] | None = None) -> yarl.URL:
        text = self.url + OPERATIONS[op].path
        if query is not None:
            # yarl would reject file names that are not UTF-8
            values = {name: str(value) for name, value in query.items()}
            text += "?" + urllib.parse.urlencode(values, errors="surrogateescape")
        return yarl.URL(text, encoded=True)

    def _lost(self, error: Exception) -> Disconnected:
        return Disconnected(f"no answer from {self.url}: {type(error).__name__} {error}".strip())


def _max_duration(arguments: Mapping[str, Any]) -> float:
    """Return how long the service may hold a request open, in seconds."""
    wait = float(arguments.get("wait") or 0)
    if "call" in arguments:
        return wait
    return max(wait, float(arguments.get("timeout") or 0))


def _make_form(arguments: Mapping[str, Any], files: Mapping[str, bytes]) -> aiohttp.FormData:
    """Return a multipart body: the request, then the files in the order in which it names them."""
    form = aiohttp.FormData()
    request = json.dumps({**arguments, "files": list(files)})
    form.add_field("request", request, content_type="application/json")
    for content in files.values():
        form.add_field("file", content, content_type="application/octet-stream", filename="file")
    return form


async def retry_for(seconds: float, request: Callable[[], Awaitable[T]]) -> T:
    """Await `request()` again, for up to `seconds`, while its connection breaks.

    Only for requests that may be carried out twice, or that carry a key.

    Raises:
      Disconnected: the last attempt's, when the time is over.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await request()
        except Disconnected:
            if loop.time() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


class WebSocketPipe:
    """A WebSocket as a Pipe: binary messages are data, the text "eof" ends one direction."""

    def __init__(self, socket: Any):
        self._socket = socket
        self._closing: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        while True:
            message = await self._socket.receive()
            if message.type != aiohttp.WSMsgType.BINARY:
                return b""
            if message.data:
                return message.data

    async def write(self, data: bytes) -> None:
        await self._socket.send_bytes(data)

    async def write_eof(self) -> None:
        await self._socket.send_str("eof")

    def close(self) -> None:
        self._closing = asyncio.ensure_future(self._socket.close())


class StreamPipe:
    """A TCP connection as a Pipe."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        return await self._reader.read(PIECE_BYTES)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def write_eof(self) -> None:
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()


async def relay(one: Pipe, other: Pipe) -> None:
    """Copy data between two pipes, both ways, until both directions have ended or one breaks."""
    try:
        with contextlib.suppress(OSError, aiohttp.ClientError, SandboxError):
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(one, other))
                group.create_task(_copy(other, one))
    finally:
        one.close()
        other.close()


async def _copy(source: Pipe, target: Pipe) -> None:
    # a broken direction is no error here: the other one ends by itself, or when both are closed
    with contextlib.suppress(OSError, aiohttp.ClientError):
        while data := await source.read():
            await target.write(data)
        await target.write_eof()
