"""The terminal interface of a session: what the user types, and what is to be done with it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import pathlib
import signal
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from rich.console import Console

from rome.agent.iflow import events
from rome.agent.iflow.events import Event
from rome.agent.iflow.interfaces import MODES, InterfaceSession
from rome.agent.iflow.loop import AgentError
from rome.agent.iflow.opening import SessionOpener
from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.protocols.mcp_tools import printable
from rome.agent.iflow.tui import keyboard
from rome.agent.iflow.tui.screen import Screen
from rome.agent.iflow.user_input import expand

QUIT_SECONDS = 2.0  # between two Ctrl-C that end the program
TAIL_LINES = 6  # of an answer that is being written
SHELL_SECONDS = 600.0  # for a command of the user
REPLAYED = 6  # answers that are shown of a session that goes on
TICK_SECONDS = 0.25
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
BUSY = "the agent is working; cancel its turn (Ctrl-C) first"
HINT = "y yes, n no (n WORDS tells the agent why), s stop"


class ActionError(ValueError):
    """A slash command cannot do what it was asked for; the message says why."""


# What the user can cause, and is told of on one line.
FAILURES = (AgentError, WorkspaceError, ValueError, OSError)

Request = events.ApprovalRequested | events.QuestionAsked


@dataclasses.dataclass(frozen=True)
class Action:
    """A slash command: what it does, on one line, and what does it with the words after it."""

    help: str
    do: Callable[[Terminal, str], Awaitable[None]]


class Terminal:
    """One session after another on a terminal.

    Args:
      opener: opens other sessions.
      session: that is open.
      directory: of the project.
      actions: the slash commands, by name.
      history: file of earlier lines; None for none.
    """

    def __init__(
        self,
        opener: SessionOpener,
        session: InterfaceSession,
        directory: str,
        actions: Mapping[str, Action],
        *,
        history: pathlib.Path | None = None,
    ) -> None:
        self.opener = opener
        self.session = session
        self.directory = directory
        self.actions = actions
        is_rich = keyboard.is_rich_terminal()
        self.screen = Screen(Console(highlight=False, force_terminal=is_rich or None))
        self.queue: collections.deque[str] = collections.deque()  # for the time after this turn
        self._pending: dict[str, Request] = {}
        self._work: asyncio.Task[None] | None = None
        self._began = 0.0
        self._interrupted = -QUIT_SECONDS
        self._is_done = False
        self.keyboard: keyboard.Keyboard = keyboard.PlainKeyboard(self)
        if is_rich:
            self.keyboard = keyboard.RichKeyboard(self, history)
        self._stop_listening = session.agent.log.listen(self._take_event)

    async def run(self, first: str = "") -> int:
        """Talk with the user, who may say something first, and return the exit status."""
        agent = self.session.agent
        agent.desk.is_attended = self.keyboard.is_interactive
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._on_signal)
        with self.keyboard.shown():
            self._welcome()
            try:
                await self._talk(first)
            finally:
                await self.close_session()
        return 0

    async def _talk(self, line: str | None) -> None:
        """Take one line after the other, until the user ends it; the first may be ""."""
        if line:
            await self._take_line(line)
        while not self._is_done:
            if not self.keyboard.is_interactive and self._work is not None:
                await asyncio.wait([self._work])
            line = await self.keyboard.read(is_answer=bool(self._pending))
            if line is None:
                break
            await self._take_line(line)

    async def open(self, **choice: Any) -> None:
        """Go over to another session: a new one, or `resume` with its id.

        Raises:
          ValueError: there is no such session, or the agent works.
        """
        if self.is_working:
            raise ActionError(BUSY)
        if choice.get("resume") == self.session.agent.session:
            raise ActionError("this is that session")
        session = await self.opener.open(self.directory, **choice)
        await self.close_session()
        self.session = session
        self._pending.clear()
        self._stop_listening = session.agent.log.listen(self._take_event)
        session.agent.desk.is_attended = self.keyboard.is_interactive
        self._welcome()

    async def close_session(self) -> None:
        """End the session and what is being done in it."""
        self.session.agent.cancel("the user left")
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work], timeout=5)
        await self.session.close()
        self._stop_listening()

    def quit(self) -> None:
        """End the program after this line."""
        self._is_done = True

    @property
    def is_working(self) -> bool:
        """Whether the agent, or a command of the user, works."""
        return self._work is not None

    # -- what the user types

    async def _take_line(self, line: str) -> None:
        text = line.strip()
        try:
            if self._pending:
                self._answer(text)
            elif text:
                await self._obey(text)
        except FAILURES as error:
            self.screen.say(f"{error}", "red")
        self.keyboard.refresh()

    async def _obey(self, text: str) -> None:
        name, _, words = text[1:].partition(" ")
        if text.startswith("/") and name in self.actions:
            await self.actions[name].do(self, words.strip())
        elif text.startswith("!") and len(text) > 1:
            self.start(self._run_command(text[1:].strip()))
        elif self.is_working:
            self.session.agent.steer(await expand(text, self.session))
            self.screen.say("the agent reads this before its next step (/later waits for its end)")
        else:
            self.start(self.play(text))

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something while the user may go on typing; ActionError where something is done."""
        if self._work is not None:
            work.close()
            raise ActionError(BUSY)
        self._began = time.monotonic()
        self._work = asyncio.ensure_future(self._do(work))

    async def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something, then the next message that waits for its end."""
        ticking = asyncio.ensure_future(self._tick())
        try:
            await work
        except FAILURES as error:
            self.screen.say(str(error), "red")
        except Exception as error:  # a fault of the program must not end the session
            self.screen.say(f"{type(error).__name__}: {error}", "red")
        finally:
            ticking.cancel()
            self._work = None
            self._interrupted = -QUIT_SECONDS
            self.keyboard.refresh()
        if self.queue:
            self.start(self.play(self.queue.popleft()))

    async def _tick(self) -> None:
        """Show how the time passes."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.keyboard.refresh()

    async def play(self, text: str) -> None:
        """Play a turn, and turns for what the agent should know by then."""
        agent = self.session.agent
        finished = await agent.run(await expand(text, self.session))
        while finished.outcome == "finished" and agent.inbox:
            finished = await agent.run("")
        await self.session.keep()

    async def _run_command(self, command: str) -> None:
        """Run a command of the user's, and let the agent know of it."""
        self.screen.say(f"$ {command}", "bold")
        done = await self.session.workspace.execute(command, timeout=SHELL_SECONDS)
        output = printable(done.output).rstrip("\n")
        self.screen.console.print(output, markup=False, highlight=False)
        if done.exit_code:
            self.screen.say(f"status {done.exit_code}", "red")
        self.session.agent.notify(
            f"The user ran this command:\n$ {command}\n{done.output[:20_000]}"
        )

    # -- answers

    def _answer(self, text: str) -> None:
        """Answer the oldest approval or question that waits."""
        request = next(iter(self._pending.values()))
        agent = self.session.agent
        if isinstance(request, events.QuestionAsked):
            if not text:
                return
            choices = {str(number): one for number, one in enumerate(request.choices, 1)}
            agent.desk.respond(request.request, answer=choices.get(text, text))
            return
        word, _, note = text.partition(" ")
        word = word.lower()
        if word in ("y", "yes"):
            agent.desk.respond(request.request, "allow", note=note)
        elif word in ("a", "always", "p") and request.rule:
            scope = "project" if word == "p" else "session"
            agent.desk.respond(request.request, "allow", scope=scope)  # type: ignore[arg-type]
        elif word in ("n", "no"):
            agent.desk.respond(request.request, "deny", note=note)
        elif word in ("s", "stop"):
            agent.desk.respond(request.request, "stop", note=note)
        elif text:
            self.screen.say(self._hint(request), "yellow")

    def _hint(self, request: events.ApprovalRequested) -> str:
        if not request.rule:
            return HINT
        return f"y yes, a always {request.rule}, p always in this project, {HINT[7:]}"

    def _on_signal(self) -> None:
        """Take a Ctrl-C that came between two lines."""
        if self.interrupt():
            self.quit()
            self.keyboard.wake()

    # -- events

    def _take_event(self, event: Event) -> None:
        self.screen.take(event)
        if isinstance(event, Request):
            self._pending[event.request] = event
            if isinstance(event, events.ApprovalRequested) and self.keyboard.is_interactive:
                self.screen.say(self._hint(event), "yellow")
            self.keyboard.wake()
            if not self.screen.is_plain:  # a user who looks elsewhere hears of it
                self.screen.console.bell()
        elif isinstance(event, events.ApprovalAnswered | events.QuestionAnswered):
            was_shown = self._pending.pop(event.request, None) is not None
            if was_shown and not self._pending:
                self.keyboard.wake()
        self.keyboard.refresh()

    # -- controls, for the keyboard

    def prompt(self) -> str:
        """Return what stands before the cursor: what is being written, and what is being done."""
        request = next(iter(self._pending.values()), None)
        if isinstance(request, events.QuestionAsked):
            return "A number, or words: " if request.choices else "Your answer: "
        if request is not None:
            return "Allow? "
        lines = self._tail()
        if self._work is not None:
            seconds = time.monotonic() - self._began
            mark = SPINNER[int(seconds * 8) % len(SPINNER)]
            doing = self.screen.doing or "working"
            line = f"{mark} {seconds:.0f} s, Ctrl-C cancels: {doing}"
            is_long = len(line) > self._width
            lines.append(f"{line[: self._width - 1]}…" if is_long else line)
        lines.append("> ")
        return "\n".join(lines)

    def _tail(self) -> list[str]:
        """Return the end of the answer that is being written, in lines that fit into the window."""
        end = printable(self.screen.tail).rstrip("\n")[-TAIL_LINES * 400 :]
        lines: list[str] = []
        for line in end.splitlines():
            lines += textwrap.wrap(line, self._width) or [""]
        return lines[-TAIL_LINES:]

    @property
    def _width(self) -> int:
        return max(20, self.screen.console.width) - 1

    def status(self) -> str:
        """Return mode, model, context and price on one line; the most needed first."""
        agent = self.session.agent
        conversation = agent.conversation
        share = conversation.context_tokens / max(1, agent.model.context_tokens)
        parts = [conversation.mode, f"context {share:.0%}"]
        if conversation.usage.price:
            parts.append(f"cost {conversation.usage.price:.4g}")
        waiting = {
            "later": self.queue,
            "jobs": conversation.jobs,
            "sub-agents": conversation.subagents,
        }
        parts += [f"{len(some)} {what}" for what, some in waiting.items() if some]
        return " · ".join([*parts, agent.model.name])[: max(20, self.screen.console.width)]

    def interrupt(self) -> bool:
        """Take a Ctrl-C: it cancels what is being done; two without an effect end the program."""
        now = time.monotonic()
        is_again = now - self._interrupted < QUIT_SECONDS
        self._interrupted = now
        if self._work is not None:
            if is_again:  # what was cancelled does not end
                return True
            self.queue.clear()
            if self.session.agent.is_working:
                self.session.agent.cancel()
            else:
                self._work.cancel()
            return False
        if not is_again:
            self.screen.say("Ctrl-C once more ends the program")
        return is_again

    def next_mode(self) -> None:
        """Go on to the next mode of approval."""
        modes = list(MODES)
        place = modes.index(self.session.agent.conversation.mode)
        self.session.agent.set_mode(modes[(place + 1) % len(modes)])

    def command_names(self) -> Iterable[tuple[str, str]]:
        """Yield each slash command and what it does."""
        for name, action in self.actions.items():
            yield name, action.help
        for command in self.session.commands.values():
            yield command.name, command.description
        for skill in self.session.skills.values():
            yield skill.name, skill.description
        for prompt in self.session.servers.prompts if self.session.servers is not None else ():
            yield prompt.command, prompt.description

    def files(self, letters: str) -> Iterable[str]:
        """Return what a mention may mean: the project's files that hold these letters."""
        return keyboard.files_with(letters, self.directory)

    def _welcome(self) -> None:
        agent = self.session.agent
        self.screen.say(f"iFlow in {self.session.workspace.root}, model {agent.model.name}", "bold")
        self.screen.say("/help shows the commands; Ctrl-C cancels, twice it ends")
        said: list[Event] = []
        notices: list[Event] = []  # since the session was opened
        for event in agent.log.events:
            if isinstance(event, events.AssistantMessage | events.UserMessage):
                said.append(event)
            elif isinstance(event, events.Notice):
                notices.append(event)
            elif isinstance(event, events.TurnFinished | events.SessionEnded):
                notices.clear()
        for event in said[-REPLAYED:] + notices:
            self.screen.take(event)
