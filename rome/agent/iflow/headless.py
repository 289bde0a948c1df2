"""The agent without a terminal: `iflow -p TEXT`, for scripts, evaluations and other programs.

What it prints on standard output is one of

    text         the last answer
    json         one object: session, outcome, reason, result, turns, usage, seconds
    stream-json  each event of the session as it happens, one JSON object a line (`events`)

With the input `stream-json`, standard input has one JSON object a line, until it ends:

    {"kind": "user", "text": "..."}                        a turn, after the one before it
    {"kind": "steer", "text": "..."}                       to the agent while it works
    {"kind": "approval", "request": "...", "decision": "allow", "scope": "once", "note": ""}
    {"kind": "answer", "request": "...", "answer": "..."}  to a question
    {"kind": "cancel"}                                     ends the turn

What a sub-agent or a command of the background brings while the agent is idle begins a turn too.
"""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, TextIO

from rome.agent.iflow import events
from rome.agent.iflow.assemble import Assembled
from rome.agent.iflow.desk import UnknownRequest
from rome.agent.iflow.events import EXIT_CODES, TurnFinished
from rome.agent.iflow.places.workspace import WorkspaceError

Format = Literal["text", "json", "stream-json"]
FORMATS: tuple[Format, ...] = ("text", "json", "stream-json")
MAX_LINE = 64 << 20  # bytes of one line of the input


async def run_headless(
    assembled: Assembled,
    prompt: str,
    *,
    output: Format = "text",
    has_input: bool = False,
    out: TextIO | None = None,
) -> int:
    """Play the turns that the caller asks for, print what came of them, and end the session.

    SIGINT and SIGTERM end the turn; what is there is printed all the same.

    Args:
      assembled: the agent; closed here.
      prompt: the first turn; "" goes on with a turn that was not finished, or with the input alone.
      output: what is printed.
      has_input: whether standard input has further turns, as stream-json.
      out: where to print; standard output where None.

    Returns:
      The exit status of `events.EXIT_CODES`.
    """
    out = out or sys.stdout
    agent = assembled.agent
    if output == "stream-json":
        agent.log.listen(lambda event: _print(event.to_json(), out))
    for notice in assembled.notices:
        agent.log.append(events.Notice(text=notice, level="warning"))
        print(f"iflow: {notice}", file=sys.stderr)
    finished = TurnFinished(outcome="finished")
    with _signals(agent.cancel):
        try:
            if prompt or not has_input:
                finished = await _play(assembled, prompt)
            if has_input:
                finished = await _follow_input(assembled, finished)
        finally:
            await assembled.aclose(finished.outcome)
    if output == "text":
        print(_last_answer(assembled), file=out)
    elif output == "json":
        _print(summary(assembled, finished), out)
    if finished.outcome != "finished":
        print(f"iflow: {finished.outcome}: {finished.reason}", file=sys.stderr)
    return EXIT_CODES[finished.outcome]


def summary(assembled: Assembled, finished: TurnFinished) -> dict[str, Any]:
    """Return what `--output-format json` prints."""
    conversation = assembled.agent.conversation
    usage = conversation.usage
    return {
        "session": assembled.session.id,
        "outcome": finished.outcome,
        "reason": finished.reason,
        "result": _last_answer(assembled),
        "turns": conversation.turn_answers,
        "usage": {
            "prompt": usage.prompt,
            "completion": usage.completion,
            "cached": usage.cached,
            "price": usage.price,
        },
        "seconds": finished.seconds,
    }


async def _play(assembled: Assembled, prompt: str) -> TurnFinished:
    """Play one turn, and keep what it left outside of the events."""
    finished = await assembled.agent.run(prompt)
    try:
        await assembled.keep()
    except WorkspaceError as error:
        assembled.agent.log.append(events.Notice(text=str(error), level="error"))
        if finished.outcome == "finished":
            return TurnFinished(outcome="infrastructure", reason=str(error))
    return finished


async def _follow_input(assembled: Assembled, finished: TurnFinished) -> TurnFinished:
    """Do what the lines of standard input say; return how the last turn ended."""
    agent = assembled.agent
    prompts: asyncio.Queue[str | None] = asyncio.Queue()
    stop_listening = agent.log.listen(functools.partial(_wake, prompts))
    reading = asyncio.create_task(_read_input(assembled, prompts))
    try:
        while (prompt := await prompts.get()) is not None:
            if not prompt and not agent.has_unread:
                continue
            finished = await _play(assembled, prompt)
            if finished.outcome == "infrastructure":
                return finished
    finally:
        stop_listening()
        reading.cancel()
        agent.desk.is_attended = False
    return finished


def _wake(prompts: asyncio.Queue[str | None], event: events.Event) -> None:
    """Let the agent read what came of its background, in a turn of its own where it is idle."""
    if isinstance(event, events.SubagentFinished | events.JobFinished):
        asyncio.get_running_loop().call_soon(prompts.put_nowait, "")


async def _read_input(assembled: Assembled, prompts: asyncio.Queue[str | None]) -> None:
    agent = assembled.agent
    async for line in _lines():
        try:
            given = json.loads(line)
            kind = given["kind"]
            if kind == "user":
                prompts.put_nowait(str(given["text"]))
            elif kind == "steer":
                agent.steer(str(given["text"]))
            elif kind == "approval":
                agent.respond(
                    given["request"],
                    given["decision"],
                    scope=given.get("scope", "once"),
                    note=given.get("note", ""),
                )
            elif kind == "answer":
                agent.respond(given["request"], answer=str(given["answer"]))
            elif kind == "cancel":
                agent.cancel()
            else:
                raise ValueError(f"kind {kind!r} unknown")
        except (ValueError, LookupError, TypeError, UnknownRequest) as error:
            text = f"a line of the input was passed over: {type(error).__name__}: {error}"
            agent.log.append(events.Notice(text=text, level="error"))
    prompts.put_nowait(None)


async def _lines() -> AsyncIterator[bytes]:
    """Yield the lines of standard input."""
    reader = asyncio.StreamReader(limit=MAX_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        if line.strip():
            yield line


class _signals:
    """Ends the turn at SIGINT and SIGTERM, as long as it is entered."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self._cancel = cancel

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._cancel, f"{number.name} was received")

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _last_answer(assembled: Assembled) -> str:
    for entry in reversed(assembled.agent.conversation.entries):
        if entry.message.role == "assistant":
            return entry.message.content
    return ""


def _print(values: dict[str, Any], out: TextIO) -> None:
    print(json.dumps(values), file=out, flush=True)
