"""Where the agent's tools work: a ROCK sandbox, or this machine where the user says so by name."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

from rome.agent.iflow.places.output import decode

# Is called with each piece of a running command's output, for people who watch.
OnOutput = Callable[[bytes], None]
# Returns the size of the output's file, and its end from a place on, at most so many bytes.
ReadEnd = Callable[[int, int], Awaitable[tuple[int, bytes]]]
# The note of a command that ended its shell.
SHELL_ENDED = "the shell ended; the next command finds a new one, in the project's directory"


class WorkspaceError(RuntimeError):
    """The place where tools work failed; `is_infrastructure` says that no agent can cause it."""

    def __init__(self, message: str, *, is_infrastructure: bool = False) -> None:
        super().__init__(message)
        self.is_infrastructure = is_infrastructure


class BackgroundJob:
    """A background command.

    Args:
      id: of it.
      command: that was started, for people.
      path: of the file with its output, where the tools work.
      end: waits for its end and returns its status; None where that is not known.
      kill: ends it and all that it started.
      read_end: reads the file.
    """

    def __init__(
        self,
        id: str,
        command: str,
        path: str,
        *,
        end: Awaitable[int | None],
        kill: Callable[[], Awaitable[None]],
        read_end: ReadEnd,
    ) -> None:
        self.id = id
        self.command = command
        self.path = path
        self._ended = asyncio.ensure_future(end)
        self._kill = kill
        self._read_end = read_end
        self._place = 0  # up to which the file was read
        self._was_killed = False

    @property
    def is_running(self) -> bool:
        """Return whether it still runs."""
        return not self._ended.done()

    @property
    def exit_code(self) -> int | None:
        """Return its status; None while it runs, or where it was killed."""
        return None if self._was_killed or self.is_running else self._ended.result()

    async def read(self, limit: int = 30_000) -> str:
        """Return the output since the last reading, at most so many characters of its end."""
        before = self._place
        self._place, data = await self._read_end(before, 4 * limit)
        text = decode(data)
        if self._place - before > len(data) or len(text) > limit:
            return f"[... more output before; the whole is in {self.path} ...]\n{text[-limit:]}"
        return text

    async def wait(self) -> int | None:
        """Wait for its end and return its `exit_code`."""
        await asyncio.shield(self._ended)
        return self.exit_code

    async def kill(self) -> None:
        """End it and all that it started."""
        self._was_killed = self._was_killed or self.is_running
        await self._kill()
        await self._ended


@dataclasses.dataclass(frozen=True)
class CommandOutput:
    """The result of a command."""

    output: str  # standard output and error, as they came; head and tail where it was too long
    exit_code: int | None  # None where it was ended at its time limit
    seconds: float = 0.0  # that it took
    denials: int = 0  # tries of the network that were denied
    # With the whole output, for `Workspace.read`; "" where `output` is whole.
    file: str = ""
    note: str = ""  # what else happened, for the model: "the shell ended ..."; "" for nothing


class Workspace(Protocol):
    """A place with files and a shell that keeps its state (directory, variables) between commands.

    Attributes:
      root: directory of the project; relative paths are below it.
      is_isolated: whether what runs there can harm only itself.
      outputs: folder for whole outputs and the like, which are no files of the project.
      jobs: all that `spawn` started, by id.
    """

    root: str
    is_isolated: bool
    outputs: str
    jobs: dict[str, BackgroundJob]

    @property
    def directory(self) -> str:
        """Return where the shell was after its last command."""

    async def execute(
        self, command: str, *, timeout: float, on_output: OnOutput | None = None
    ) -> CommandOutput:
        """Run a command in the persistent shell, with empty input.

        A command that ends the shell, or has to be ended with it, is no error: `note` says so, and
        the next one finds a new shell.

        Args:
          command: text for bash.
          timeout: seconds, after which it is ended with all that it started.
          on_output: called with each piece of the output as it comes.
        """

    async def spawn(self, command: str) -> BackgroundJob:
        """Start a command in the background, in the directory where the shell is."""

    async def run(self, command: str, *, timeout: float) -> str:
        """Run a command apart from the persistent shell, in the project, and return its output."""

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        """Return a file's content; WorkspaceError where there is none, or it is longer."""

    async def write(self, path: str, content: bytes) -> None:
        """Write a file whole, with the folders above it; keep the mode of one that is there."""

    async def stat(self, path: str) -> tuple[int, float] | None:
        """Return the size and the time of change of a file; None where there is none.

        Raises:
          WorkspaceError: it is a directory or no regular file.
        """

    async def snapshot(self) -> str:
        """Keep the files as they are; return the name by which `restore` finds them."""

    async def restore(self, snapshot: str) -> None:
        """Bring the files back to a snapshot."""

    def beside(self) -> Workspace:
        """Return the same place, files and jobs, with a shell of its own, for a sub-agent.

        Closing it ends that shell only; closing this one ends all.
        """

    async def keep(self) -> None:
        """Copy the files of a sandbox to this machine, so that the session can be resumed.

        Raises:
          WorkspaceError: they could not be copied.
        """

    async def aclose(self) -> None:
        """End the shell and all jobs."""


def require_path(path: str) -> None:
    """Raise a WorkspaceError where a text cannot be the path of a file."""
    if "\0" in path:
        raise WorkspaceError(f"{path!r} is no path: it has a NUL character")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise WorkspaceError(f"{path!r} is no path: it has half a character") from None
