"""A model behind an OpenAI-compatible chat-completions URL plays with the environment's tools.

The conversation is kept here as messages and sent whole each turn; `prompt` tokens are therefore as
the endpoint bills them, turn by turn. Every request has a deadline; back-pressure (429, 5xx) and
broken connections are tried again with growing, random waits, as `Retry-After` asks where it does.
The API key comes from an environment variable, goes into one header and into no message, record or
log.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import random
import time
import urllib.parse
from typing import Any

import aiohttp

from envs.rock import SandboxConfig
from rome.evals.agents import Outcome, Started, spoiled, with_environment
from rome.evals.tasks import EvalTask

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)
MAX_REQUESTS = 8  # for one answer
LONGEST_WAIT_S = 60.0
MAX_ANSWER_BYTES = 8 << 20
MAX_CALLS = 16  # of one turn
SYSTEM = (
    "You solve a task in a Linux shell. Call the tool `bash` to look and to act: each call starts a"
    " new shell in the working directory. When the work is done, answer without a tool call; then"
    " it is graded."
)


class EndpointError(RuntimeError):
    """The endpoint gave no answer. `permanent`: asking again would not help."""

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ContextFull(Exception):
    """The conversation no longer fits into the model's context."""


@dataclasses.dataclass
class Endpoint:
    """url: up to and without /chat/completions, such as http://127.0.0.1:8000/v1. request_seconds:
    for one answer, with all its retries.

    temperature, max_tokens: not sent where None, for some models refuse them.
    """

    url: str
    model: str
    config: SandboxConfig
    api_key: str | None = dataclasses.field(default=None, repr=False)
    temperature: float | None = None
    max_tokens: int | None = None
    episode_seconds: float = 600.0
    request_seconds: float = 300.0
    first_wait_s: float = 0.5
    name: str = "endpoint"
    _session: aiohttp.ClientSession | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.query
        ):
            raise ValueError(
                "endpoint is not http(s)://HOST[:PORT][/PATH] without user, password and query"
                f" (scheme {parts.scheme!r}, host {parts.hostname!r}); a key goes into the"
                " environment variable of --api_key_env"
            )
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def play(self, task: EvalTask, attempt: int, seed: int) -> Outcome:
        clock = {"waited": 0.0}
        tokens = {"prompt": 0, "completion": 0}

        async def episode(started: Started) -> Outcome:
            return await self._converse(started, seed, clock, tokens)

        try:
            outcome = await with_environment(task, self.config, episode, self.episode_seconds)
        except EndpointError as error:
            outcome = spoiled("infra_engine", str(error), error.permanent)
        if (
            outcome.ending == "timeout" and clock["waited"] > self.episode_seconds / 2
        ):  # a slow endpoint is not the model's failure
            outcome = spoiled(
                "infra_engine",
                f"{outcome.note}, {clock['waited']:.1f} s of them waiting for the endpoint",
            )
        return dataclasses.replace(outcome, tokens=tokens)

    async def _converse(
        self, started: Started, seed: int, clock: dict[str, float], tokens: dict[str, int]
    ) -> Outcome:
        """Turn after turn to the end."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": getattr(started.env, "system", SYSTEM)},
            {"role": "user", "content": started.opening[0]},
        ]
        tools = started.opening[1]["tools"]
        while True:
            began = time.monotonic()
            try:
                choice, usage = await self._ask(messages, tools, seed)
            except ContextFull as error:
                return started.outcome(0.0, "truncated_tokens", str(error))
            finally:
                clock["waited"] += time.monotonic() - began
            for ours, theirs in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
                tokens[ours] += usage.get(theirs, 0) if isinstance(usage.get(theirs, 0), int) else 0
            if choice.get("finish_reason") == "length":
                return started.outcome(
                    0.0,
                    "truncated_tokens",
                    f"turn {started.turns + 1} did not end within the answer's limit",
                )
            message = choice["message"]
            calls = message.get("tool_calls") or []
            text = message.get("content") if isinstance(message.get("content"), str) else ""
            messages.append(
                {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
            )
            for call in calls[:MAX_CALLS] or [None]:
                observation, reward, terminated, truncated, info = await started.astep(
                    action_of(call) if call is not None else text
                )
                if terminated or truncated:
                    return started.outcome(reward, info["ending"])
                tools = info.get("tools", tools)  # some environments bring more of them later
                role = (
                    {"role": "user"}
                    if call is None
                    else {"role": "tool", "tool_call_id": call["id"]}
                )
                messages.append({**role, "content": observation})
            refusal = f"not run: a turn has at most {MAX_CALLS} calls"
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": refusal}
                for call in calls[MAX_CALLS:]
            ]

    async def _ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(first choice, usage) of one answer. Raises EndpointError; ContextFull."""
        optional = {
            "tools": tools or None,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }  # an empty list of tools is refused by some
        body = {
            "model": self.model,
            "messages": messages,
            "seed": seed,
            **{name: value for name, value in optional.items() if value is not None},
        }
        wait, problem = self.first_wait_s, "no request was made"
        try:
            async with asyncio.timeout(self.request_seconds):
                for _ in range(MAX_REQUESTS):
                    try:
                        status, headers, text = await self._post(body)
                    except (
                        aiohttp.ClientConnectionError,
                        aiohttp.ClientPayloadError,
                        OSError,
                    ) as error:
                        status, headers, problem = (
                            503,
                            {},
                            self._clean(f"{type(error).__name__}: {error}"),
                        )
                    else:
                        if status == 200:
                            return read_answer(text)
                        problem = self._clean(f"{self.url} answered {status}: {text[:300]}")
                        if status in (400, 413, 422) and is_context_full(text):
                            raise ContextFull(problem)
                        if status not in RETRY_STATUS:
                            raise EndpointError(problem, permanent=True)
                    await asyncio.sleep(
                        max(
                            retry_after(headers.get("Retry-After")), wait * random.uniform(0.5, 1.5)
                        )
                    )
                    wait = min(2 * wait, LONGEST_WAIT_S)
        except TimeoutError:
            raise EndpointError(
                f"no answer within {self.request_seconds:g} s; last: {problem}"
            ) from None
        raise EndpointError(f"no answer in {MAX_REQUESTS} requests; last: {problem}")

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, str]:
        """(status, headers, text). Redirects are not followed: the key goes to this URL only."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                connector=aiohttp.TCPConnector(limit=0),
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
            return response.status, response.headers, answer.decode(errors="replace")

    def _clean(self, text: str) -> str:
        """Without the key, should the other side repeat it."""
        return text.replace(self.api_key, "[key]") if self.api_key else text


def action_of(call: dict[str, Any]) -> str:
    """A tool call of the protocol as the turn that the environment reads.

    Arguments that are no JSON become the malformed call that they are.
    """
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = None
    body = (
        "arguments are not JSON"
        if not isinstance(arguments, dict)
        else json.dumps({"name": function["name"], "arguments": arguments})
    )
    return (  # a command may spell </tool_call> itself
        f"<tool_call>\n{body.replace('<', chr(92) + 'u003c')}\n</tool_call>"
    )


def read_answer(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(first choice, usage). Raises EndpointError where the text is no chat completion."""
    try:
        answer = json.loads(text)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        for call in choice["message"].get("tool_calls") or []:
            if not (
                isinstance(call["id"], str)
                and isinstance(call["function"]["name"], str)
                and isinstance(call["function"]["arguments"], str)
            ):
                raise TypeError("a tool call whose id, name or arguments are no text")
        return choice, usage if isinstance(usage, dict) else {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(
            f"the answer is no chat completion ({type(error).__name__}: {error}): {text[:200]!r}"
        ) from error


def is_context_full(text: str) -> bool:
    """Whether a refusal is about the conversation's length; servers say it in different words."""
    low = text.lower()
    return (
        "context_length_exceeded" in low
        or "context length" in low
        or "context window" in low
        or "maximum context" in low
    )


def retry_after(value: str | None) -> float:
    """Seconds that the header asks for, at most LONGEST_WAIT_S; 0 where there is none or it is
    unreadable.

    A number or an HTTP date.
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
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else 0.0
