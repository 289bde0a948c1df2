"""Reads the user's lines: with prompt_toolkit on a terminal, plainly where that is not one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout

MAX_LISTED = 40  # files that a completion offers
KEPT_SECONDS = 5.0  # for which the list of files holds
MAX_FILES = 5_000
NOT_LISTED = ("node_modules", "__pycache__", "venv")


class Controls(Protocol):
    """What the keyboard asks the terminal for."""

    def prompt(self) -> str:
        """Return what stands before the cursor, on one line or several."""

    def status(self) -> str:
        """Return the line at the bottom."""

    def interrupt(self) -> bool:
        """Take a Ctrl-C on an empty line; return whether the program ends."""

    def next_mode(self) -> None:
        """Take a Shift-Tab."""

    def command_names(self) -> Iterable[tuple[str, str]]:
        """Yield each slash command and what it does."""

    def files(self, letters: str) -> Iterable[str]:
        """Yield the project's files that hold these letters, the best first."""


class Keyboard(Protocol):
    """Reads lines."""

    is_interactive: bool  # whether a person types

    async def read(self, *, is_answer: bool) -> str | None:
        """Return the next line; None where the user ends the program.

        Args:
          is_answer: whether something waits for an answer; what is typed so far is kept for later.
        """

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which text may be printed while a line is read."""

    def refresh(self) -> None:
        """Show the prompt and the status anew."""

    def wake(self) -> None:
        """Let `read` return ""."""


class RichKeyboard(Keyboard):
    """A line with history (in a file, where one is given), completion and a status below it."""

    is_interactive = True

    def __init__(self, controls: Controls, history: pathlib.Path | None = None) -> None:
        self._controls = controls
        if history is not None:
            history.parent.mkdir(parents=True, exist_ok=True)
        self._session: PromptSession[str] = PromptSession(
            message=self._message,
            bottom_toolbar=controls.status,
            completer=_Completer(controls),
            complete_while_typing=True,
            key_bindings=self._bindings(),
            multiline=True,
            history=FileHistory(str(history)) if history is not None else InMemoryHistory(),
            erase_when_done=True,
            reserve_space_for_menu=4,
            prompt_continuation="  ",
        )
        self._draft = ""

    async def read(self, *, is_answer: bool) -> str | None:
        draft = ""
        if not is_answer:
            draft, self._draft = self._draft, ""
        try:
            return await self._session.prompt_async(default=draft)
        except (EOFError, KeyboardInterrupt):
            return None

    def shown(self) -> contextlib.AbstractContextManager[None]:
        return patch_stdout(raw=True)

    def refresh(self) -> None:
        if self._session.app.is_running:
            self._session.app.invalidate()

    def wake(self) -> None:
        app = self._session.app
        if app.is_running and not app.is_done:
            self._draft = self._session.default_buffer.text or self._draft
            app.exit(result="")

    def _message(self) -> FormattedText:
        *above, last = self._controls.prompt().split("\n")
        shown = [("class:tail", f"{line}\n") for line in above]
        return FormattedText([*shown, ("bold", last)])

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add("enter")
        def accept(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        @bindings.add("c-j")
        def break_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c")
        def interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            elif self._controls.interrupt():
                event.app.exit(exception=EOFError)

        @bindings.add("s-tab")
        def next_mode(event: KeyPressEvent) -> None:
            self._controls.next_mode()

        return bindings


class PlainKeyboard(Keyboard):
    """Lines of standard input, for pipes and for terminals that can do nothing else."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._rest = b""
        self._is_open = False
        self._shown_prompt = ""
        self.is_interactive = sys.stdin.isatty()

    async def read(self, *, is_answer: bool) -> str | None:
        if not self._is_open:
            self._open()
        self.refresh()
        line = await self._lines.get()
        self._shown_prompt = ""
        return line

    def shown(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def refresh(self) -> None:
        prompt = self._controls.prompt().split("\n")[-1]
        if self.is_interactive and prompt != self._shown_prompt:
            self._shown_prompt = prompt
            print(prompt, end="", flush=True)

    def wake(self) -> None:
        self._lines.put_nowait("")

    def _open(self) -> None:
        self._is_open = True
        try:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._take)
        except PermissionError:  # a regular file, which epoll does not watch: it is there whole
            for line in (*sys.stdin.read().splitlines(), None):
                self._lines.put_nowait(line)

    def _take(self) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines.append(self._rest)
        for line in lines:
            self._lines.put_nowait(line.decode(errors="replace").rstrip("\r"))
        if not data:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._lines.put_nowait(None)


class _Completer(Completer):
    """Completes slash commands at the beginning, and @files anywhere."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        if before.startswith("/") and " " not in before:
            for name, what in self._controls.command_names():
                if name.startswith(before[1:]):
                    yield Completion(f"/{name}", -len(before), display_meta=what[:60])
            return
        word = before.split()[-1] if before and not before[-1].isspace() else ""
        if word.startswith("@"):
            for path in list(self._controls.files(word[1:]))[:MAX_LISTED]:
                yield Completion(f"@{path}", -len(word))


def files_with(letters: str, directory: str) -> list[str]:
    """Return the files below a directory that hold some letters; first those that begin so."""
    known = _files_below(directory, int(time.monotonic() / KEPT_SECONDS))
    found = [path for path in known if letters in path]
    return sorted(found, key=lambda path: not path.startswith(letters))


@functools.lru_cache(maxsize=1)
def _files_below(directory: str, moment: int) -> list[str]:
    """Return the files at a moment; hidden folders and those of programs are left out."""
    found: list[str] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in NOT_LISTED)
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in sorted(names)]
        if len(found) > MAX_FILES:
            break
    return found[:MAX_FILES]


def is_rich_terminal() -> bool:
    """Return whether both ends are a terminal that can move its cursor."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
