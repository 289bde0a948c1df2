"""A scripted model: a real HTTP server that speaks OpenAI's chat API and says what a test wrote.

    with ScriptedEndpoint([call("shell", command="ls"), "There are two files."]) as endpoint:
        ...  # endpoint.url, such as http://127.0.0.1:40123/v1
    endpoint.requests[0]["messages"]

It runs in a thread of its own, so both plain and asynchronous tests may use it, and so may programs
that a test starts. Answers are given in the order of requests:

    "text"                        says so and makes no call
    call("shell", command="ls")   makes one call
    Say(text, calls, ...)         all that an answer may have, delays included
    Fail(status, message)         refuses
    Break(text)                   breaks the connection after that text
    Raw(lines)                    sends these events of a stream as they are, then waits
    function(messages) -> one of these
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web


@dataclasses.dataclass(frozen=True)
class Say:
    """An answer.

    Args:
      text: what it says.
      calls: (name, arguments); arguments that are a text are sent as they are, valid JSON or not.
      reasoning: its thoughts.
      finish: the reason of its end; None: "tool_calls" or "stop".
      usage: as the server reports it; None counts four characters a token.
      delay: seconds before the first piece.
      pause: seconds between two pieces.
      pieces: into which text and arguments are cut.
    """

    text: str = ""
    calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()
    reasoning: str = ""
    finish: str | None = None
    usage: Mapping[str, Any] | None = None
    delay: float = 0.0
    pause: float = 0.0
    pieces: int = 3


@dataclasses.dataclass(frozen=True)
class Fail:
    """A refusal: an HTTP status with a message."""

    status: int
    message: str = "the script says so"
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Break:
    """A connection that breaks after some text."""

    text: str = ""


@dataclasses.dataclass(frozen=True)
class Raw:
    """Lines of a stream, as they are.

    Args:
      lines: each is a text, or an object that is sent as `data:`.
      wait: seconds until the response ends.
    """

    lines: Sequence[str | Mapping[str, Any]]
    wait: float = 0.0


Given = str | Say | Fail | Break | Raw
Answer = Given | Callable[[list[dict[str, Any]]], Given]


def call(name: str, /, **arguments: Any) -> Say:
    """Return an answer that makes one call."""
    return Say(calls=[(name, arguments)])


class ScriptedEndpoint:
    """The server.

    Args:
      answers: one for each request, in order; a request more is refused with status 400. A function
        alone answers all requests.
      model: its name, under /v1/models.

    Attributes:
      url: base of the API; valid within `with`.
      requests: bodies of all chat requests so far.
      keys: Authorization header of each of them.
    """

    def __init__(
        self, answers: Sequence[Answer] | Callable[..., Given], model: str = "scripted"
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.model = model
        self.url = ""
        self._answers = answers
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ScriptedEndpoint:
        self._thread.start()
        assert self._is_up.wait(30), "the scripted endpoint did not start within 30 s"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        """Return the messages of all requests so far."""
        return [request["messages"] for request in self.requests]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._is_up.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        answer = self._next(number, body)
        if isinstance(answer, str):
            answer = Say(answer)
        if isinstance(answer, Fail):
            error = {"error": {"message": answer.message, "type": "scripted"}}
            return web.json_response(error, status=answer.status, headers=answer.headers)
        if isinstance(answer, Break) and not body.get("stream"):
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(answer, Say):
            await asyncio.sleep(answer.delay)
        if not body.get("stream"):
            assert isinstance(answer, Say)
            return web.json_response(_whole(answer, number, body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if isinstance(answer, Raw):
            for line in answer.lines:
                text = line if isinstance(line, str) else f"data: {json.dumps(line)}"
                await response.write(f"{text}\n\n".encode())
            await asyncio.sleep(answer.wait)
            return response
        if isinstance(answer, Break):
            await _send(response, number, {"content": answer.text})
            assert request.transport is not None
            request.transport.abort()
            return response
        for delta in _deltas(answer, number):
            await _send(response, number, delta)
            await asyncio.sleep(answer.pause)
        await _send(response, number, {}, finish=_finish(answer))
        if body.get("stream_options", {}).get("include_usage"):
            await _send(response, number, None, usage=_usage(answer, body))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _next(self, number: int, body: Mapping[str, Any]) -> Given:
        answers = self._answers
        if callable(answers):
            return answers(body["messages"])
        if number >= len(answers):
            return Fail(400, f"the script has {len(answers)} answers and was asked once more")
        answer = answers[number]
        return answer(body["messages"]) if callable(answer) else answer


def _arguments(given: Mapping[str, Any] | str) -> str:
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _finish(answer: Say) -> str:
    return answer.finish or ("tool_calls" if answer.calls else "stop")


def _usage(answer: Say, body: Mapping[str, Any]) -> Mapping[str, Any]:
    if answer.usage is not None:
        return answer.usage
    written = answer.text + answer.reasoning + "".join(_arguments(call[1]) for call in answer.calls)
    read = json.dumps([body["messages"], body.get("tools", [])])
    return {"prompt_tokens": len(read) // 4, "completion_tokens": len(written) // 4 + 1}


def _calls(answer: Say, number: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{number}_{place}",
            "type": "function",
            "function": {"name": name, "arguments": _arguments(arguments)},
        }
        for place, (name, arguments) in enumerate(answer.calls)
    ]


def _whole(answer: Say, number: int, body: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = _calls(answer, number)
    choice = {"index": 0, "message": message, "finish_reason": _finish(answer)}
    return {"id": f"chat-{number}", "choices": [choice], "usage": _usage(answer, body)}


def _deltas(answer: Say, number: int) -> list[dict[str, Any]]:
    """Return the pieces of an answer, as servers stream them."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for member, text in (("reasoning_content", answer.reasoning), ("content", answer.text)):
        deltas += [{member: piece} for piece in _cut(text, answer.pieces)]
    for place, made in enumerate(_calls(answer, number)):
        function = made["function"]
        first = made | {"index": place, "function": {"name": function["name"], "arguments": ""}}
        deltas.append({"tool_calls": [first]})
        for piece in _cut(function["arguments"], answer.pieces):
            more = {"index": place, "function": {"arguments": piece}}
            deltas.append({"tool_calls": [more]})
    return deltas


def _cut(text: str, pieces: int) -> list[str]:
    size = max(1, -(-len(text) // pieces))
    return [text[start : start + size] for start in range(0, len(text), size)]


async def _send(
    response: web.StreamResponse,
    number: int,
    delta: Mapping[str, Any] | None,
    *,
    finish: str | None = None,
    usage: Mapping[str, Any] | None = None,
) -> None:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    event: dict[str, Any] = {"id": f"chat-{number}", "choices": choices}
    if usage is not None:
        event["usage"] = usage
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
