"""Where the agent's tools work: a ROCK sandbox, or this machine where the user says so by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Protocol

from rome.agent.iflow.places.jobs import BackgroundJob

# The note of a command that ended its shell.
SHELL_ENDED = "the shell ended; the next command finds a new one, in the project's directory"


class WorkspaceError(RuntimeError):
    """The place where tools work failed; `is_infrastructure` says that no agent can cause it."""

    def __init__(self, message: str, *, is_infrastructure: bool = False) -> None:
        super().__init__(message)
        self.is_infrastructure = is_infrastructure


@dataclasses.dataclass(frozen=True)
class CommandOutput:
    """The result of a command.

    Attributes:
      output: standard output and error, as they came; head and tail where it was too long.
      exit_code: None where it was ended at its time limit.
      seconds: that it took.
      denials: tries of the network that were denied.
      file: that holds the whole output; "" where `output` is whole. `Workspace.read` opens it.
      note: what else happened, for the model: "the shell ended ..."; "" for nothing.
    """

    output: str
    exit_code: int | None
    seconds: float = 0.0
    denials: int = 0
    file: str = ""
    note: str = ""


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
        self,
        command: str,
        *,
        timeout: float,
        on_output: Callable[[bytes], None] | None = None,
    ) -> CommandOutput:
        """Run a command in the persistent shell, with empty input.

        A command that ends the shell, or has to be ended with it, is no error: `note` says so, and
        the next one finds a new shell.

        Args:
          command: text for bash.
          timeout: seconds, after which it is ended with all that it started.
          on_output: called with each piece of the output as it comes, for people who watch.
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
