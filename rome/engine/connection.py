"""HTTP requests to one engine: retries, back-pressure and deadlines.

A status of `RETRY_STATUS` is back-pressure: the request is repeated until the caller's deadline.
A refused or broken connection is retried for a short while only, then the server counts as dead.
A request that is sent again has a new `rid`: a server that has not noticed yet that the connection
of the first one broke would refuse the second as a duplicate.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from typing import Any, NamedTuple, Protocol

import aiohttp

from envs.proxies import environment_proxy
from rome.engine.errors import EngineDead, EngineError, EngineFailed, RequestRejected

RETRY_STATUS = (429, 502, 503, 504)  # back-pressure of a server, or of a router in front of it
MAX_RETRY_AFTER_SECONDS = 30.0  # a longer Retry-After of a server is cut to this
FIRST_WAIT_SECONDS = 0.1  # before something is tried again; then twice as long each time
MAX_DOUBLINGS = 20
MAX_BUSY_WAIT_SECONDS = 5.0
MAX_BROKEN_WAIT_SECONDS = 2.0
CONNECT_SECONDS = 10.0
UPDATE_SECONDS = 600.0  # deadline of a weight update, or of a copy of the weights
MAX_ERROR_CHARACTERS = 500


class Response(NamedTuple):
    """An HTTP answer; `body` is parsed JSON where the server says it is JSON, else text."""

    status: int
    body: Any
    retry_after_seconds: float


class Wire(Protocol):
    """What carries the requests of a client to its engine: HTTP, or a call in the same process."""

    async def close(self) -> None: ...
    def deadline(self, seconds: float, what: str) -> Deadline: ...
    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]: ...
    async def post_for_any(self, route: str, body: dict[str, Any]) -> Any: ...
    async def request(self, method: str, route: str, body: dict[str, Any] | None) -> Response: ...
    async def status(self, route: str) -> int: ...


class Connection:
    """Sends HTTP requests to one server.

    Args:
      url: such as http://127.0.0.1:30000, without a slash at the end.
      api_key: sent as a bearer token.
      dead_after_seconds: how long refused or broken connections are retried before the server
        counts as dead.
    """

    def __init__(self, url: str, *, api_key: str | None, dead_after_seconds: float):
        self.url = url
        self.dead_after_seconds = dead_after_seconds
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Close the sockets that belong to the running event loop."""
        if self._session is not None and self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._session = None
        self._loop = None

    def deadline(self, seconds: float, what: str) -> Deadline:
        """Return a context that raises EngineError when `what` takes longer than `seconds`."""
        message = (
            f"{self.url} did not give {what} within {seconds:g} s; is it paused, overloaded or"
            " stuck? See its log"
        )
        return Deadline(seconds, message)

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object of a successful answer; see `post_for_any`.

        Raises:
          EngineFailed: the answer is not a JSON object, too.
        """
        return require_object(self.url, route, await self.post_for_any(route, body))

    async def post_for_any(self, route: str, body: dict[str, Any]) -> Any:
        """Return the body of a successful answer, repeating the request under back-pressure.

        There is no deadline here: wrap the call in `deadline`.

        Raises:
          RequestRejected: the server answered 4xx.
          EngineFailed: the server answered with another error, or not in HTTP and JSON.
          EngineDead: the server cannot be reached.
        """
        attempt = 0
        while True:
            response = await self.request("POST", route, body)
            if response.status == 200:
                return response.body
            if response.status not in RETRY_STATUS:
                text = error_text(response.body)
                kind = RequestRejected if 400 <= response.status < 500 else EngineFailed
                raise kind(f"{self.url}{route} answered {response.status}: {text}")
            await asyncio.sleep(
                growing_wait(attempt, MAX_BUSY_WAIT_SECONDS, response.retry_after_seconds)
            )
            body = with_new_rid(body)
            attempt += 1

    async def request(self, method: str, route: str, body: dict[str, Any] | None) -> Response:
        """Return one answer, whatever its status.

        Raises:
          EngineDead: connections were refused or broken for `dead_after_seconds`.
          EngineFailed: the answer is not HTTP or not the JSON that it claims to be.
        """
        give_up = time.monotonic() + self.dead_after_seconds
        attempt = 0
        while True:
            wait = growing_wait(attempt, MAX_BROKEN_WAIT_SECONDS)
            try:
                return await self._request_once(method, route, body)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
                if time.monotonic() + wait > give_up:
                    raise EngineDead(
                        f"engine {self.url} is dead: {type(error).__name__} {error}; see its log,"
                        " start it again, and resume"
                    ) from error
            except (aiohttp.ClientError, RecursionError, ValueError) as error:
                raise EngineFailed(
                    f"{self.url}{route} did not answer in HTTP and JSON ({type(error).__name__}"
                    f" {error}); is this an SGLang server?"
                ) from error
            await asyncio.sleep(wait)
            body = None if body is None else with_new_rid(body)
            attempt += 1

    async def status(self, route: str) -> int:
        """Return the status of one GET, without retries."""
        async with self._open_session().get(self.url + route, headers=self._headers) as response:
            return response.status

    async def _request_once(self, method: str, route: str, body: dict[str, Any] | None) -> Response:
        session = self._open_session()
        async with session.request(
            method, self.url + route, json=body, headers=self._headers
        ) as response:
            if response.content_type == "application/json":
                answer = await response.json()
            else:
                answer = await response.text()
            retry_after_seconds = _parse_retry_after(response.headers.get("Retry-After"))
            return Response(response.status, answer, retry_after_seconds)

    def _open_session(self) -> aiohttp.ClientSession:
        """Return the HTTP session of the running event loop.

        A session of an earlier, finished loop is dropped: its sockets were closed with the loop.
        """
        loop = asyncio.get_running_loop()
        session = self._session
        if session is not None and self._loop is loop and not session.closed:
            return session
        if session is not None and not session.closed:
            session.detach()
        timeout = aiohttp.ClientTimeout(  # the total is the caller's deadline
            total=None, sock_connect=CONNECT_SECONDS
        )
        session = aiohttp.ClientSession(
            timeout=timeout,
            connector=aiohttp.TCPConnector(limit=0),
            proxy=environment_proxy(self.url),
        )
        self._session = session
        self._loop = loop
        return session


class Deadline:
    """An `asyncio.timeout` that raises EngineError with a message instead of TimeoutError.

    Attributes:
      seconds_stopped: for which it stood still so far.
    """

    def __init__(self, seconds: float, message: str):
        self.seconds_stopped = 0.0
        self._message = message
        self._timeout = asyncio.timeout(max(seconds, 0.0))
        self._stopped_at: float | None = None
        self._left = 0.0  # when it was stopped

    def stop(self) -> None:
        """Let its time stand still until `go_on`."""
        when = self._timeout.when()
        if when is None or self._timeout.expired():  # it stands still, or has passed already
            return
        self._stopped_at = asyncio.get_running_loop().time()
        self._left = when - self._stopped_at
        self._timeout.reschedule(None)

    def go_on(self) -> None:
        """End what `stop` began."""
        if self._stopped_at is None:
            return
        now = asyncio.get_running_loop().time()
        self.seconds_stopped += now - self._stopped_at
        self._stopped_at = None
        self._timeout.reschedule(now + self._left)

    async def __aenter__(self) -> Deadline:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise EngineError(self._message) from None


def growing_wait(attempt: int, at_most: float, at_least: float = 0.0) -> float:
    """Return the seconds to wait before trying again, twice as long each time.

    Clients that failed at the same moment do not return at the same one: up to half is added.

    Args:
      attempt: how often it was tried again before.
      at_most: bounds the growth.
      at_least: what a server asked for, above `at_most` too.
    """
    doublings = min(attempt, MAX_DOUBLINGS)
    wait = min(FIRST_WAIT_SECONDS * 2**doublings, at_most)
    return max(wait, at_least) * random.uniform(1.0, 1.5)


def with_new_rid(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with another request id, where it has one."""
    return body | {"rid": uuid.uuid4().hex} if "rid" in body else body


def require_object(url: str, route: str, body: Any) -> dict[str, Any]:
    """Return the body of an answer if it is a JSON object.

    Raises:
      EngineFailed: it is something else, such as the page of a proxy.
    """
    if isinstance(body, dict):
        return body
    raise EngineFailed(
        f"{url}{route} answered with {str(body)[:100]!r}, which is no JSON object; does a proxy or"
        " another program answer there?"
    )


def error_text(answer: Any) -> str:
    """Return the message of an error body, cut to `MAX_ERROR_CHARACTERS`.

    Servers send {"error": "text"}, {"error": {"message": "text"}} or, for weight updates,
    {"message": "text"}.
    """
    if not isinstance(answer, dict):
        return str(answer)[:MAX_ERROR_CHARACTERS] or "no text"
    error = answer.get("error", answer)
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:MAX_ERROR_CHARACTERS]


def _parse_retry_after(header: str | None) -> float:
    """Return the seconds of a Retry-After header; a date, its rare other form, counts as 0."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
