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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from envs.proxies import environment_proxy
from rome.agent.session import ContextFull
from rome.engine.errors import EngineError

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)
TOO_LONG_STATUS = (400, 413, 422)  # of servers that refuse a conversation for its length
MAX_REQUESTS = 8  # for one answer
MAX_WAIT_SECONDS = 60.0
MAX_ANSWER_BYTES = 8 << 20


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
    status: int
    headers: Mapping[str, str]
    text: str


@dataclasses.dataclass
class ChatEndpoint:
    """The client of one model.

    Attributes:
      url: such as http://127.0.0.1:8000/v1; /chat/completions is added.
      model: name of the model, as the endpoint knows it.
      api_key: sent as a bearer token to this URL only.
      request_seconds: for one answer, with all its retries.
      first_wait_seconds: before the first retry; doubled each time.
    """

    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    request_seconds: float = 300.0
    first_wait_seconds: float = 0.5
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
        **settings: Any,
    ) -> Answer:
        """Return the answer to a conversation.

        Args:
          messages: all of it, as OpenAI's API has them.
          tools: their schemas.
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
                for _ in range(MAX_REQUESTS):
                    asked_wait = 0.0
                    try:
                        response = await self._post(body)
                    except (
                        aiohttp.ClientConnectionError,
                        aiohttp.ClientPayloadError,
                        OSError,
                    ) as error:
                        problem = self._hide_key(f"{type(error).__name__}: {error}")
                    else:
                        if response.status == 200:
                            return read_answer(response.text)
                        problem = self._describe_refusal(response)
                        asked_wait = retry_after(response.headers.get("Retry-After"))
                    await asyncio.sleep(max(asked_wait, wait * random.uniform(0.5, 1.5)))
                    wait = min(2 * wait, MAX_WAIT_SECONDS)
        except TimeoutError:
            raise EndpointError(
                f"no answer within {self.request_seconds:g} s; last: {problem}"
            ) from None
        raise EndpointError(f"no answer in {MAX_REQUESTS} requests; last: {problem}")

    def _describe_refusal(self, response: _Response) -> str:
        """Return what is wrong with an answer that may be retried; raise for any other one."""
        problem = self._hide_key(f"{self.url} answered {response.status}: {response.text[:300]}")
        if response.status in TOO_LONG_STATUS and is_context_full(response.text):
            raise ContextFull(problem)
        if response.status not in RETRY_STATUS:
            raise EndpointError(problem, permanent=True, status=response.status)
        return problem

    async def _post(self, body: dict[str, Any]) -> _Response:
        """Send one request. Redirects are not followed: the key goes to this URL only."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                connector=aiohttp.TCPConnector(limit=0),
                proxy=environment_proxy(self.url),
            )
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        async with self._session.post(
            f"{self.url}/chat/completions", json=body, headers=headers, allow_redirects=False
        ) as response:
            answer = bytearray()
            async for part in response.content.iter_chunked(1 << 16):
                answer += part
                if len(answer) > MAX_ANSWER_BYTES:
                    raise EndpointError(
                        f"{self.url} answered with more than {MAX_ANSWER_BYTES} bytes"
                    )
            text = answer.decode(errors="replace")
            return _Response(response.status, response.headers, text)

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
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        for call in choice["message"].get("tool_calls") or []:
            function = call["function"]
            fields = (call["id"], function["name"], function["arguments"])
            if not all(isinstance(field, str) for field in fields):
                raise TypeError("a tool call whose id, name or arguments are no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(
            f"the answer is no chat completion ({type(error).__name__}: {error}): {text[:200]!r}"
        ) from error
    return Answer(choice, usage if isinstance(usage, dict) else {})


def is_context_full(text: str) -> bool:
    """Return whether a refusal is about the conversation's length, in any server's words."""
    words = (
        "context_length_exceeded",
        "context length",
        "context window",
        "maximum context",
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
