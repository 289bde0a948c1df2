"""Errors of task folders: malformed, unsupported by the backend, or failed to build.

Each names file and line.
"""

from __future__ import annotations

import pathlib

from envs.gem import UnplayableTaskError


class TaskError(UnplayableTaskError):
    """A task folder is malformed.

    `line` counts from 1; it is 0 where the fault concerns the whole file.
    """

    def __init__(self, file: pathlib.Path | str, line: int, message: str) -> None:
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")
        self.file = pathlib.Path(file)
        self.line = line
        self.message = message


class UnsupportedError(TaskError):
    """The task is well formed, but the backend cannot do what it asks for.

    The message says what, and the remedy if there is one.
    """


class BuildError(TaskError):
    """A build step of the task ran and failed."""
