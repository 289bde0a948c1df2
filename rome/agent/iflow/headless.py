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
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, TextIO

from rome.agent.iflow import events
from rome.agent.iflow.events import EXIT_CODES, TurnFinished
from rome.agent.iflow.interfaces import InterfaceSession

Format = Literal["text", "json", "stream-json"]
FORMATS: tuple[Format, ...] = ("text", "json", "stream-json")
MAX_LINE = 64 << 20  # bytes of one line of the input


async def run_headless(
    session: InterfaceSession,
    prompt: str,
    *,
    output: Format = "text",
    has_input: bool = False,
    out: TextIO | None = None,
) -> int:
    """Play the turns that the caller asks for, print what came of them, and end the session.

    SIGINT and SIGTERM end the turn and the session; what is there is printed all the same. So does
    a reader of the output that goes away.

    Args:
      session: the agent; closed here.
      prompt: the first turn; "" goes on with a turn that was not finished, or with the input alone.
      output: what is printed.
      has_input: whether standard input has further turns, as stream-json.
      out: where to print; standard output where None.

    Returns:
      The exit status of `events.EXIT_CODES`.
    """
    agent = session.agent
    stop = _Stop(agent.cancel)
    printer = _Printer(out or sys.stdout, stop)
    if output == "stream-json":
        agent.log.listen(lambda event: printer.print_json(event.to_json()))
    for notice in session.notices:
        agent.log.append(events.Notice(text=notice, level="warning"))
        print(f"iflow: {notice}", file=sys.stderr)
    finished = TurnFinished(outcome="finished")
    with _signals(stop):
        try:
            if prompt or not has_input:
                finished = await _play(session, prompt)
            if has_input:
                finished = await _follow_input(session, finished, stop)
        finally:
            await session.close(finished.outcome)
    if output == "text":
        printer.print(_last_answer(session))
    elif output == "json":
        printer.print_json(summary(session, finished))
    if stop.reason and finished.outcome == "finished":  # what came of it may not be printed
        finished = TurnFinished(outcome="aborted", reason=stop.reason)
    if finished.outcome != "finished":
        print(f"iflow: {finished.outcome}: {finished.reason}", file=sys.stderr)
    return EXIT_CODES[finished.outcome]


def summary(session: InterfaceSession, finished: TurnFinished) -> dict[str, Any]:
    """Return what `--output-format json` prints."""
    conversation = session.agent.conversation
    return {
        "session": session.agent.session,
        "outcome": finished.outcome,
        "reason": finished.reason,
        "result": _last_answer(session),
        "turns": conversation.turn_answers,
        "usage": dataclasses.asdict(conversation.usage),
        "seconds": finished.seconds,
    }


async def _play(session: InterfaceSession, prompt: str) -> TurnFinished:
    """Play one turn, and keep what it left outside of the events."""
    finished = await session.agent.run(prompt)
    problem = await session.keep()
    if problem and finished.outcome == "finished":
        return TurnFinished(outcome="infrastructure", reason=problem)
    return finished


class _Stop:
    """Ends the turn and the session, when the program is told to end.

    Attributes:
      reason: why; "" as long as it was not called.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self.reason = ""
        self.was_called = asyncio.Event()
        self._cancel = cancel

    def __call__(self, reason: str) -> None:
        """End it."""
        self.reason = self.reason or reason
        self.was_called.set()
        self._cancel(reason)


async def _follow_input(
    session: InterfaceSession, finished: TurnFinished, stop: _Stop
) -> TurnFinished:
    """Do what the lines of standard input say; return how the last turn ended."""
    agent = session.agent
    prompts: asyncio.Queue[str | None] = asyncio.Queue()
    stop_listening = agent.log.listen(functools.partial(_wake, prompts))
    tasks = [
        asyncio.create_task(_read_input(session, prompts)),
        asyncio.create_task(_end_when(stop, prompts)),
    ]
    try:
        while not stop.reason and (prompt := await prompts.get()) is not None:
            if not prompt and not agent.has_unread:
                continue
            finished = await _play(session, prompt)
            if finished.outcome == "infrastructure":
                return finished
    finally:
        stop_listening()
        for task in tasks:
            task.cancel()
        agent.desk.leave()
    return finished


async def _end_when(stop: _Stop, prompts: asyncio.Queue[str | None]) -> None:
    await stop.was_called.wait()
    prompts.put_nowait(None)


def _wake(prompts: asyncio.Queue[str | None], event: events.Event) -> None:
    """Let the agent read what came of its background, in a turn of its own where it is idle."""
    if isinstance(event, events.SubagentFinished | events.JobFinished):
        asyncio.get_running_loop().call_soon(prompts.put_nowait, "")


async def _read_input(session: InterfaceSession, prompts: asyncio.Queue[str | None]) -> None:
    """Do what each line says; once there are no more, nothing that the agent asks is answered."""
    agent = session.agent
    try:
        async for line in _lines():
            try:
                _take_line(session, prompts, line)
            except (ValueError, LookupError, TypeError) as error:
                agent.log.append(
                    events.Notice(
                        text=f"a line of the input was passed over: {error!r}", level="error"
                    )
                )
    except (OSError, ValueError) as error:
        agent.log.append(
            events.Notice(text=f"the input cannot be read further: {error}", level="error")
        )
    finally:
        agent.desk.leave()
        prompts.put_nowait(None)


def _take_line(session: InterfaceSession, prompts: asyncio.Queue[str | None], line: bytes) -> None:
    """Do what a line of the input says.

    Raises:
      ValueError, LookupError, TypeError: it says nothing that is known.
    """
    agent = session.agent
    given = json.loads(line)
    kind = given["kind"]
    if kind == "user":
        prompts.put_nowait(str(given["text"]))
    elif kind == "steer":
        agent.steer(str(given["text"]))
    elif kind == "approval":
        agent.desk.respond(
            given["request"],
            given["decision"],
            scope=given.get("scope", "once"),
            note=given.get("note", ""),
        )
    elif kind == "answer":
        agent.desk.respond(given["request"], answer=str(given["answer"]))
    elif kind == "cancel":
        agent.cancel()
    else:
        raise ValueError(f"kind {kind!r} unknown")


async def _lines() -> AsyncIterator[bytes]:
    """Yield the lines of standard input: a pipe, a terminal or a file.

    Raises:
      ValueError: one is longer than MAX_LINE.
    """
    reader = asyncio.StreamReader(limit=MAX_LINE)
    loop = asyncio.get_running_loop()
    # A thread reads, since the loop cannot wait for a file; it ends with the process.
    threading.Thread(target=_feed, args=(reader, loop), daemon=True).start()
    async for line in reader:
        if line.strip():
            yield line


def _feed(reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
    # Not through sys.stdin, whose lock a thread that waits would hold at the end of the process.
    with contextlib.suppress(RuntimeError):  # the loop has ended
        with contextlib.suppress(OSError):  # it is closed
            while data := os.read(0, 1 << 16):
                loop.call_soon_threadsafe(reader.feed_data, data)
        loop.call_soon_threadsafe(reader.feed_eof)


@contextlib.contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop` at SIGINT and SIGTERM meanwhile."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop, f"{number.name} was received")
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _last_answer(session: InterfaceSession) -> str:
    """Return the last answer to the last message of the user; "" where there is none."""
    for entry in reversed(session.agent.conversation.entries):
        if entry.message.role == "assistant":
            return entry.message.content
        if entry.source == "user":
            break
    return ""


class _Printer:
    """Prints, until what reads the output goes away: then the session ends.

    Args:
      out: where to print.
      stop: called then.
    """

    def __init__(self, out: TextIO, stop: Callable[[str], None]) -> None:
        self._out = out
        self._stop = stop
        self._is_open = True

    def print(self, text: str) -> None:
        """Print a text and a new line."""
        if not self._is_open:
            return
        encoding = self._out.encoding or "utf-8"  # which may lack a letter, or a lone surrogate
        try:
            shown = text.encode(encoding, "replace").decode(encoding)
            print(shown, file=self._out, flush=True)
        except (OSError, ValueError) as error:
            self._is_open = False
            self._forget_the_rest()
            self._stop(f"the output cannot be written: {error}")

    def print_json(self, values: dict[str, Any]) -> None:
        """Print an object on one line."""
        self.print(json.dumps(values))

    def _forget_the_rest(self) -> None:
        """Let what is still buffered go nowhere: at its end Python writes it once more."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._out.fileno())
            os.close(nowhere)
