"""The agent without a terminal: `iflow -p TEXT`, for scripts, evaluations and other programs.

What it prints on standard output is one of

    text         the last answer
    json         one object: session, outcome, reason, result, turns, usage, seconds
    stream-json  each event of the session as it happens, one JSON object a line (`events`)

Programs that answer approvals and ask for further turns drive a session over ACP or HTTP
(`rome.agent.iflow.protocols`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, TextIO

from rome.agent.iflow import events
from rome.agent.iflow.events import EXIT_CODES, TurnFinished
from rome.agent.iflow.interfaces import InterfaceSession


async def run_headless(
    session: InterfaceSession,
    prompt: str,
    *,
    output: Literal["text", "json", "stream-json"] = "text",
    out: TextIO | None = None,
) -> int:
    """Play one turn, print what came of it, close the session, and return the exit status.

    A prompt of "" goes on with a turn that was not finished. SIGINT and SIGTERM end turn and
    session; what is there is printed all the same. So does a reader that goes away. A second
    signal, or one while the session is being closed, which hooks may delay, ends that at once.
    """
    agent = session.agent
    stopped: list[str] = []  # why the program was told to end
    is_closing = False
    playing = asyncio.current_task()
    assert playing is not None

    def stop(reason: str) -> None:
        stopped.append(reason)
        agent.cancel(reason)

    def on_signal(name: str) -> None:
        if stopped or is_closing:
            playing.cancel()
        stop(f"{name} was received")

    printer = _Printer(out or sys.stdout, stop)
    if output == "stream-json":
        agent.log.listen(lambda event: printer.print(json.dumps(event.to_json())))
    for notice in session.notices:
        agent.log.append(events.Notice(text=notice, level="warning"))
        print(f"iflow: {notice}", file=sys.stderr)
    finished = TurnFinished(outcome="finished")
    with _signals(on_signal):
        try:
            finished = await agent.run(prompt)
            problem = await session.keep()
            if problem and finished.outcome == "finished":
                finished = TurnFinished(outcome="infrastructure", reason=problem)
            if output == "text":
                printer.print(_last_answer(session))
            elif output == "json":
                printer.print(json.dumps(summary(session, finished)))
        finally:
            is_closing = True
            await session.close(finished.outcome)
    if stopped and finished.outcome == "finished":  # what came of it may not be printed
        finished = TurnFinished(outcome="aborted", reason=stopped[0])
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


@contextlib.contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop` with the signal's name at SIGINT and SIGTERM meanwhile."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop, number.name)
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
    """Prints, until what reads the output goes away: then `stop` is called."""

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

    def _forget_the_rest(self) -> None:
        """Let what is still buffered go nowhere: at its end Python writes it once more."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._out.fileno())
            os.close(nowhere)
