"""The files of a project, for the completion of `@path`."""

from __future__ import annotations

import os
import time

KEPT_SECONDS = 5.0  # for which the list holds
MAX_FILES = 5_000
NOT_LISTED = ("node_modules", "__pycache__", "venv")


class ProjectFiles:
    """Lists files, and keeps the list for a moment.

    Args:
      directory: of the project.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._paths: list[str] = []
        self._listed_at = -KEPT_SECONDS

    def fitting(self, letters: str) -> list[str]:
        """Return the paths that hold some letters; first those that begin with them."""
        if time.monotonic() > self._listed_at + KEPT_SECONDS:
            self._paths = self._list()
            self._listed_at = time.monotonic()
        found = [path for path in self._paths if letters in path]
        return sorted(found, key=lambda path: not path.startswith(letters))

    def _list(self) -> list[str]:
        """Return the project's files; hidden folders and those of programs are left out."""
        found: list[str] = []
        for folder, folders, names in os.walk(self._directory):
            folders[:] = sorted(
                name for name in folders if name[0] != "." and name not in NOT_LISTED
            )
            below = os.path.relpath(folder, self._directory)
            for name in sorted(names):
                found.append(name if below == "." else f"{below}/{name}")
            if len(found) > MAX_FILES:
                break
        return found[:MAX_FILES]
