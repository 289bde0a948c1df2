"""One end of the protocol: asks an admin or a worker over HTTP. Errors come back as the typed ones
of envs.rock.
"""

import asyncio
import contextlib
import json
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

import aiohttp
import yarl

from envs.rock.errors import SandboxError
from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.api import GRACE, TO_ADMIN, TO_WORKER, Disconnected, decode_error, parse_json

MAX_ANSWER_BYTES = 128 << 20  # the other end may be anyone
CONNECT_SECONDS, STALL_SECONDS = 10.0, 60.0
OPERATIONS = TO_WORKER | TO_ADMIN


class Pipe(Protocol):
    """Octets both ways; b"" is the end of one."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def write_eof(self) -> None: ...
    def close(self) -> None: ...


class Client:
    """Make and use it in one event loop; `close` it there."""

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
        return self._http.closed

    async def close(self) -> None:
        await self._http.close()

    async def call(
        self,
        op: str,
        arguments: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        """The answer; None: not finished, ask again (the same, or "wait").

        Disconnected: nobody knows, ask again.
        """
        del user  # the token says who we are
        body: dict[str, Any] = {
            "data": json.dumps(arguments).encode(),
            "headers": {"Content-Type": "application/json"},
        }
        if files:
            body = {"data": _form(arguments, files)}
        seconds = (
            max(
                float(arguments.get("wait") or 0),
                0 if "call" in arguments else float(arguments.get("timeout") or 0),
            )
            + GRACE
        )
        try:
            async with self._http.post(
                self._url(op),
                **body,
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS),
                allow_redirects=False,
            ) as answer:
                return await _answer(answer)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from error

    async def read(
        self, op: str, arguments: Mapping[str, Any], user: str = ""
    ) -> AsyncIterator[bytes]:
        """The octets of a file or an archive."""
        del user
        try:
            async with self._http.get(self._url(op, arguments), allow_redirects=False) as answer:
                if answer.status != 200:
                    await _answer(answer)
                async for piece in answer.content.iter_chunked(PIECE_BYTES):
                    yield piece
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from error

    async def write(
        self, op: str, arguments: Mapping[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        """Send octets. An error of `pieces` itself is raised as it is."""
        del user
        own: list[Exception] = []

        async def watched() -> AsyncIterator[bytes]:
            try:
                async for piece in pieces:
                    for start in range(
                        0, len(piece), PIECE_BYTES
                    ):  # one large piece would fill the socket's buffer whole
                        yield piece[start : start + PIECE_BYTES]
            except Exception as error:
                own.append(error)
                raise

        try:
            async with self._http.post(
                self._url(op, arguments),
                data=watched(),
                headers={"Content-Type": "application/octet-stream"},
                allow_redirects=False,
            ) as answer:
                return await _answer(answer) or {}
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if own:
                raise own[0] from None
            raise self._lost(error) from error

    async def connect(self, arguments: Mapping[str, Any], user: str = "") -> Pipe:
        """To a port in a sandbox."""
        del user
        try:
            return WebSocketPipe(
                await self._http.ws_connect(
                    self._url("connect", arguments),
                    max_msg_size=4 * PIECE_BYTES,
                    autoping=True,
                    heartbeat=STALL_SECONDS,
                )
            )
        except aiohttp.WSServerHandshakeError as error:
            raise SandboxError(
                f"no connection to port {arguments.get('port')}: HTTP status {error.status}"
            ) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from error

    def _url(self, op: str, query: Mapping[str, Any] | None = None) -> yarl.URL:
        text = self.url + OPERATIONS[op].path
        if query is not None:  # not by yarl: file names need not be UTF-8
            text += "?" + urllib.parse.urlencode(
                {name: str(value) for name, value in query.items()}, errors="surrogateescape"
            )
        return yarl.URL(text, encoded=True)

    def _lost(self, error: Exception) -> Disconnected:
        return Disconnected(f"no answer from {self.url}: {type(error).__name__} {error}".strip())


class WebSocketPipe:
    """A WebSocket as a pipe: binary messages are octets, the text "eof" ends one direction."""

    def __init__(self, socket: Any):
        self._socket = socket
        self._closing: asyncio.Task | None = None

    async def read(self) -> bytes:
        while True:
            message = await self._socket.receive()
            if message.type == aiohttp.WSMsgType.BINARY and message.data:
                return message.data
            if message.type != aiohttp.WSMsgType.BINARY:
                return b""

    async def write(self, data: bytes) -> None:
        await self._socket.send_bytes(data)

    async def write_eof(self) -> None:
        await self._socket.send_str("eof")

    def close(self) -> None:
        self._closing = asyncio.ensure_future(self._socket.close())


class StreamPipe:
    """A TCP connection as a pipe."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

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


async def join(one: Pipe, other: Pipe) -> None:
    """Pass everything on, both ways, until both have ended or one breaks."""

    async def pass_on(source: Pipe, target: Pipe) -> None:
        while data := await source.read():
            await target.write(data)
        await target.write_eof()

    try:
        with contextlib.suppress(OSError, aiohttp.ClientError, SandboxError):
            async with asyncio.TaskGroup() as ways:
                ways.create_task(_quiet(pass_on(one, other)))
                ways.create_task(_quiet(pass_on(other, one)))
    finally:
        one.close()
        other.close()


async def _quiet(way: Awaitable[None]) -> None:
    with contextlib.suppress(
        OSError, aiohttp.ClientError
    ):  # the other way ends by itself, or with the close
        await way


def _form(arguments: Mapping[str, Any], files: Mapping[str, bytes]) -> aiohttp.FormData:
    """The request, then the files in the order in which it names them."""
    form = aiohttp.FormData()
    form.add_field(
        "request", json.dumps({**arguments, "files": list(files)}), content_type="application/json"
    )
    for content in files.values():
        form.add_field("file", content, content_type="application/octet-stream", filename="file")
    return form


async def _answer(answer: aiohttp.ClientResponse) -> dict[str, Any] | None:
    data = bytearray()
    async for piece in answer.content.iter_chunked(PIECE_BYTES):
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise SandboxError(f"the service's answer has more than {MAX_ANSWER_BYTES} bytes")
    if answer.status == 202:
        return None
    try:
        body = parse_json(bytes(data))
    except ValueError:
        body = None
    if answer.status != 200:
        raise decode_error(answer.status, body)
    if not isinstance(body, dict):
        raise SandboxError("the service's answer is no JSON object")
    return body


async def patiently(ask: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Ask again where no answer came, for that long.

    For requests that may be carried out twice, or have a key.
    """
    deadline, pause = asyncio.get_running_loop().time() + seconds, 0.05
    while True:
        try:
            return await ask()
        except Disconnected:
            if asyncio.get_running_loop().time() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, 2.0)
