"""A model behind an OpenAI-compatible chat-completions URL.

Every request has a deadline; back-pressure (429, 5xx) and broken connections are retried with
growing, random waits, as `Retry-After` asks where it does. The API key is sent in one header and
appears in no message, record or log.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import random
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from envs.proxies import environment_proxy
from rome.agent.session import ContextFull
from rome.agent.streaming import ListenerError, OnText, StreamedAnswer, StreamError
from rome.engine.errors import EngineError

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)
TOO_LONG_STATUS = (400, 413, 422)  # of servers that refuse a conversation for its length
MAX_REQUESTS = 8  # for one answer
MAX_WAIT_SECONDS = 60.0
MAX_ANSWER_BYTES = 8 << 20
MAX_STREAM_BYTES = 64 << 20  # each token comes with some hundred bytes around it


class EndpointError(EngineError):
    """The endpoint gave no answer.

    Attributes:
      permanent: whether another request would fail too.
      status: of HTTP, where the endpoint refused the request; else 0.
    """

    def __init__(self, message: str, permanent: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.status = status


class Answer(NamedTuple):
    """One chat completion: its first choice, and its usage, as they came."""

    choice: dict[str, Any]
    usage: dict[str, Any]


class _Response(NamedTuple):
    """A response; `streamed` is the answer of one that came in pieces."""

    status: int
    headers: Mapping[str, str]
    text: str
    streamed: Answer | None = None


OnRetry = Callable[[str, int, float], None]  # what went wrong, requests so far, seconds to wait


@dataclasses.dataclass
class ChatEndpoint:
    """The client of one model.

    Attributes:
      url: such as http://127.0.0.1:8000/v1; /chat/completions is added.
      model: name of the model, as the endpoint knows it.
      api_key: sent as a bearer token to this URL only.
      request_seconds: for one answer, with all its retries.
      first_wait_seconds: before the first retry; doubled each time.
      max_requests: for one answer.
    """

    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    request_seconds: float = 300.0
    first_wait_seconds: float = 0.5
    max_requests: int = MAX_REQUESTS
    _session: aiohttp.ClientSession | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        is_http = parts.scheme in ("http", "https") and parts.hostname
        if not is_http or parts.username or parts.query:
            raise ValueError(
                "endpoint is not http(s)://HOST[:PORT][/PATH] without user, password and query"
                f" (scheme {parts.scheme!r}, host {parts.hostname!r}); a key goes into the"
                " environment variable of --api_key_env"
            )
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        on_text: OnText | None = None,
        on_retry: OnRetry | None = None,
        **settings: Any,
    ) -> Answer:
        """Return the answer to a conversation.

        Args:
          messages: all of it, as OpenAI's API has them.
          tools: their schemas.
          on_text: called with each piece of text as it comes; None asks for the answer in one
            piece. A retry begins from the start.
          on_retry: called before each retry.
          settings: members of the request; those that are None are not sent.

        Raises:
          EndpointError: no answer came within the limits.
          ContextFull: the endpoint refused the conversation for its length.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if tools:  # an empty list is refused by some endpoints
            body["tools"] = tools
        body |= {name: value for name, value in settings.items() if value is not None}
        wait = self.first_wait_seconds
        problem = "no request was made"
        try:
            async with asyncio.timeout(self.request_seconds):
                for number in range(1, self.max_requests + 1):
                    asked_wait = 0.0
                    try:
                        response = await self._post(body, on_text)
                    except ListenerError as error:
                        raise error.__cause__ or error from None
                    except (
                        aiohttp.ClientConnectionError,
                        aiohttp.ClientPayloadError,
                        OSError,
                        StreamError,
                    ) as error:
                        problem = self._hide_key(f"{type(error).__name__}: {error}")
                        if isinstance(error, StreamError) and is_context_full(problem):
                            raise ContextFull(problem) from error
                    else:
                        if response.streamed is not None:
                            return response.streamed
                        if response.status == 200:
                            return read_answer(response.text)
                        problem = self._describe_refusal(response)
                        asked_wait = retry_after(response.headers.get("Retry-After"))
                    if number == self.max_requests:
                        break
                    seconds = max(asked_wait, wait * random.uniform(0.5, 1.5))
                    if on_retry is not None:
                        on_retry(problem, number, seconds)
                    await asyncio.sleep(seconds)
                    wait = min(2 * wait, MAX_WAIT_SECONDS)
        except TimeoutError:
            raise EndpointError(
                f"no answer within {self.request_seconds:g} s; last: {problem}"
            ) from None
        raise EndpointError(f"no answer in {self.max_requests} requests; last: {problem}")

    async def models(self, seconds: float = 10.0) -> list[dict[str, Any]]:
        """Return what the endpoint says of its models; [] where it does not say.

        Raises:
          EndpointError: there is no server, or it does not take the key.
        """
        try:
            async with (
                asyncio.timeout(seconds),
                self._connections().get(
                    f"{self.url}/models", headers=self._headers(), allow_redirects=False
                ) as response,
            ):
                if response.status in (401, 403):
                    text = (await response.text(errors="replace"))[:200]
                    problem = self._hide_key(f"{self.url} answered {response.status}: {text}")
                    raise EndpointError(problem, permanent=True, status=response.status)
                if response.status != 200:
                    return []
                found = (await response.json(content_type=None))["data"]
                return [one for one in found if isinstance(one.get("id"), str)]
        except (ValueError, LookupError, TypeError, AttributeError):
            return []
        except (aiohttp.ClientError, OSError) as error:
            reason = self._hide_key(str(error)) or f"no answer within {seconds:g} s"
            raise EndpointError(f"there is no server at {self.url}: {reason}") from error

    def _describe_refusal(self, response: _Response) -> str:
        """Return what is wrong with an answer that may be retried; raise for any other one."""
        problem = self._hide_key(f"{self.url} answered {response.status}: {response.text[:300]}")
        if response.status in TOO_LONG_STATUS and is_context_full(response.text):
            raise ContextFull(problem)
        if response.status not in RETRY_STATUS:
            raise EndpointError(problem, permanent=True, status=response.status)
        return problem

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                connector=aiohttp.TCPConnector(limit=0),
                proxy=environment_proxy(self.url),
                read_bufsize=1 << 20,
            )
        return self._session

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def _post(self, body: dict[str, Any], on_text: OnText | None = None) -> _Response:
        """Send one request. Redirects are not followed: the key goes to this URL only."""
        if on_text is not None:
            body = body | {"stream": True}
        async with self._connections().post(
            f"{self.url}/chat/completions",
            json=body,
            headers=self._headers(),
            allow_redirects=False,
        ) as response:
            is_stream = response.content_type == "text/event-stream"
            if on_text is not None and response.status == 200 and is_stream:
                streamed = await self._read_stream(response, on_text)
                return _Response(200, response.headers, "", streamed)
            answer = bytearray()
            async for part in response.content.iter_chunked(1 << 16):
                answer += part
                if len(answer) > MAX_ANSWER_BYTES:
                    raise EndpointError(
                        f"{self.url} answered with more than {MAX_ANSWER_BYTES} bytes"
                    )
            text = answer.decode(errors="replace")
            return _Response(response.status, response.headers, text)

    async def _read_stream(self, response: aiohttp.ClientResponse, on_text: OnText) -> Answer:
        """Read an answer that comes in pieces.

        Raises:
          StreamError: it is no answer, or not whole.
          EndpointError: it is too long.
        """
        streamed = StreamedAnswer(on_text)
        size = 0
        async for line in _lines(response):
            size += len(line)
            if size > MAX_STREAM_BYTES:
                raise EndpointError(f"{self.url} answered with more than {MAX_STREAM_BYTES} bytes")
            streamed.take(line.decode(errors="replace"))
            if streamed.has_ended:  # the connection may stay open for long
                break
        return Answer(_checked(streamed.choice()), streamed.usage)

    def _hide_key(self, text: str) -> str:
        """Return the text without the API key, in case the endpoint repeats it."""
        return text.replace(self.api_key, "[key]") if self.api_key else text


def read_answer(text: str) -> Answer:
    """Return a chat completion.

    Raises:
      EndpointError: the text is not a chat completion.
    """
    try:
        answer = json.loads(text)
        choice = _checked(answer["choices"][0])
        usage = answer.get("usage") or {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(
            f"the answer is no chat completion ({type(error).__name__}: {error}): {text[:200]!r}"
        ) from error
    return Answer(choice, usage if isinstance(usage, dict) else {})


def _checked(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice whose calls have texts as id, name and arguments.

    Raises:
      LookupError, TypeError: they do not.
    """
    for call in choice["message"].get("tool_calls") or []:
        function = call["function"]
        fields = (call["id"], function["name"], function["arguments"])
        if not all(isinstance(field, str) for field in fields):
            raise TypeError("a tool call whose id, name or arguments are no text")
    return choice


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the lines of a body, of any length."""
    rest = b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def is_context_full(text: str) -> bool:
    """Return whether a refusal is about the conversation's length, in any server's words."""
    words = (
        "context_length_exceeded",
        "context length",
        "context window",
        "maximum context",
        "context size",
        "prompt is too long",
    )
    return any(word in text.lower() for word in words)


def retry_after(value: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, at most MAX_WAIT_SECONDS.

    Args:
      value: a number or an HTTP date; anything else counts as 0.
    """
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    if math.isnan(seconds):
        return 0.0
    return min(max(seconds, 0.0), MAX_WAIT_SECONDS)
