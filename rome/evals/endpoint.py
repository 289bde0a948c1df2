"""A model behind an OpenAI-compatible chat-completions URL as an agent.

It plays with the tools of the environment. The conversation is kept here as messages and sent in
full each turn; `prompt` tokens are therefore as the endpoint bills them, turn by turn. Every
request has a deadline; back-pressure (429, 5xx) and broken connections are retried with growing,
random waits, as `Retry-After` asks where it does. The API key is sent in one header and appears in
no message, record or log.
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
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp

from envs.gem.episode import OutOfTime, PlayedEnv, Turn
from envs.proxies import environment_proxy
from envs.rock import SandboxConfig
from envs.sources import Task
from rome.evals.agents import Outcome, StartedEnv, play_in_environment, spoiled

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)
TOO_LONG_STATUS = (400, 413, 422)  # of servers that refuse a conversation for its length
MAX_REQUESTS = 8  # for one answer
MAX_WAIT_SECONDS = 60.0
MAX_ANSWER_BYTES = 8 << 20
MAX_CALLS = 16  # of one turn


class EndpointError(RuntimeError):
    """The endpoint gave no answer.

    Attributes:
      permanent: whether another request would fail too.
    """

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ContextFull(Exception):
    """The conversation no longer fits into the model's context."""


class _Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str


@dataclasses.dataclass
class _Usage:
    """What one attempt has used so far."""

    tokens: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"prompt": 0, "completion": 0}
    )

    def add(self, usage: dict[str, Any]) -> None:
        """Add the `usage` of one answer; fields that are missing or no integers count as 0."""
        for ours, theirs in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
            amount = usage.get(theirs, 0)
            if isinstance(amount, int):
                self.tokens[ours] += amount


@dataclasses.dataclass
class Endpoint:
    """An agent that asks a chat-completions endpoint for its turns.

    Attributes:
      url: such as http://127.0.0.1:8000/v1; /chat/completions is added.
      model: name of the model, as the endpoint knows it.
      config: of the sandboxes.
      api_key: sent as a bearer token to this URL only.
      temperature: of sampling; not sent if None, since some models refuse it.
      max_tokens: of one answer; not sent if None.
      episode_seconds: for which the environment may work in one attempt; the endpoint's own time
        does not count.
      request_seconds: for one answer, with all its retries.
      first_wait_seconds: before the first retry; doubled each time.
      name: recorded with each attempt.
    """

    url: str
    model: str
    config: SandboxConfig
    api_key: str | None = dataclasses.field(default=None, repr=False)
    temperature: float | None = None
    max_tokens: int | None = None
    episode_seconds: float = 600.0
    request_seconds: float = 300.0
    first_wait_seconds: float = 0.5
    name: str = "endpoint"
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

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; a slow or failing endpoint spoils it."""
        usage = _Usage()

        async def converse(started: StartedEnv) -> Outcome:
            return await self._converse(started, seed, usage)

        try:
            outcome = await play_in_environment(task, self.config, converse, math.inf)
        except EndpointError as error:
            outcome = spoiled("infra_engine", str(error), error.permanent)
        return dataclasses.replace(outcome, tokens=usage.tokens)

    async def _converse(self, started: StartedEnv, seed: int, usage: _Usage) -> Outcome:
        """Play turn after turn to the end of the attempt; a limit has its work judged."""
        played = PlayedEnv(started, self.episode_seconds, started.task.start_seconds)
        opening, info = await played.start()
        tools = info.get("tools", [])
        messages: list[dict[str, Any]] = [{"role": "user", "content": opening}]
        if started.system is not None:
            messages.insert(0, {"role": "system", "content": started.system})
        while True:
            try:
                choice, answer_usage = await self._ask(messages, tools, seed)
            except ContextFull as error:
                return _outcome(started, await played.judge("truncated_tokens", str(error)))
            usage.add(answer_usage)
            if choice.get("finish_reason") == "length":
                note = f"turn {started.turns + 1} did not end within the answer's limit"
                return _outcome(started, await played.judge("truncated_tokens", note))
            message = choice["message"]
            calls = message.get("tool_calls") or []
            text = message.get("content") if isinstance(message.get("content"), str) else ""
            said = {"role": "assistant", "content": text}
            messages.append(said | {"tool_calls": calls} if calls else said)
            for call in calls[:MAX_CALLS] or [None]:
                action = text if call is None else action_of(call)
                try:
                    turn = await played.step(action)
                except OutOfTime as error:
                    return _outcome(started, await played.judge("timeout", str(error)))
                if turn.ending:
                    return _outcome(started, turn)
                # some environments offer more of them later
                tools = started.last_info.get("tools", tools)
                messages.append(_observation_message(call, turn.observation))
            refusal = f"not run: a turn has at most {MAX_CALLS} calls"
            for call in calls[MAX_CALLS:]:
                messages.append(_observation_message(call, refusal))

    async def _ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (first choice, usage) of one answer.

        Raises:
          EndpointError: no answer came within the limits.
          ContextFull: the endpoint refused the conversation for its length.
        """
        body = self._make_body(messages, tools, seed)
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

    def _make_body(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], seed: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": messages, "seed": seed}
        if tools:  # an empty list is refused by some endpoints
            body["tools"] = tools
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body

    def _describe_refusal(self, response: _Response) -> str:
        """Return what is wrong with an answer that may be retried; raise for any other one."""
        problem = self._hide_key(f"{self.url} answered {response.status}: {response.text[:300]}")
        if response.status in TOO_LONG_STATUS and is_context_full(response.text):
            raise ContextFull(problem)
        if response.status not in RETRY_STATUS:
            raise EndpointError(problem, permanent=True)
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


def _outcome(started: StartedEnv, turn: Turn) -> Outcome:
    return started.outcome(started.reward, turn.ending, turn.note)


def _observation_message(call: dict[str, Any] | None, observation: str) -> dict[str, Any]:
    """Return the message that answers a tool call, or a turn without one."""
    if call is None:
        return {"role": "user", "content": observation}
    return {"role": "tool", "tool_call_id": call["id"], "content": observation}


def action_of(call: dict[str, Any]) -> str:
    """Return a tool call of the protocol as the turn that the environment reads.

    Arguments are passed on as they came: the environment says what is wrong with them.
    """
    function = call["function"]
    name = json.dumps(function["name"])
    arguments = function["arguments"] or "{}"
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def read_answer(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (first choice, usage) of a chat completion.

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
    return choice, usage if isinstance(usage, dict) else {}


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
