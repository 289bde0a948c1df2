"""Instructions for the agent: AGENTS.md, IFLOW.md and CLAUDE.md, of the user and of each folder.

Those of the user and of the folders from the project's root to where the agent works stand in the
system text. Those of a folder below are shown when a file there is touched.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence

from rome.agent.iflow.specs.spec_files import Place, SpecError, read_text

FILE_NAMES = ("AGENTS.md", "IFLOW.md", "CLAUDE.md")
MAX_CHARACTERS = 100_000  # of all instructions together
_HEADING = "Instructions of {}:"
_HEADINGS = re.compile(r"^Instructions of (.+):$", re.MULTILINE)


class Instructions:
    """The instructions of one session.

    Args:
      root: of the project; no file of it may lead out of it.
      directory: where the agent works, in the root.
      user: folders of `spec_files.places`, of which the user's count.
      names: of files, in the order in which they stand.

    Attributes:
      problems: what was wrong with files, for people.
    """

    def __init__(
        self,
        root: pathlib.Path,
        directory: pathlib.Path | None = None,
        user: Iterable[Place] = (),
        names: Sequence[str] = FILE_NAMES,
    ) -> None:
        self.root = root.resolve()
        self.directory = (directory or root).resolve()
        self.problems: list[str] = []
        self._user = [place.folder for place in user if place.scope == "user"]
        self._names = tuple(names)
        self._shown: set[pathlib.Path] = set()
        self._texts: set[str] = set()
        self._left = MAX_CHARACTERS

    def opening(self) -> str:
        """Return the part of the system text with the instructions; "" where there are none."""
        of_user = self._of_folders(self._user, None)
        of_project = self._of_folders(self._down_to(self.directory), self.root)
        return "\n\n".join(part for part in (of_user, of_project) if part)

    def of_file(self, path: str) -> str:
        """Return instructions of the folders of a touched file; "" where there are no new ones.

        Each is returned once in a session; the text is for a `UserMessage` of a reminder.
        """
        folder = (self.directory / path).resolve().parent
        if not folder.is_relative_to(self.root):
            return ""
        return self._of_folders(self._down_to(folder), self.root)

    def resume(self, reminders: Iterable[str]) -> None:
        """Count what earlier reminders of a session hold as shown."""
        for text in reminders:
            self._shown.update(pathlib.Path(name) for name in _HEADINGS.findall(text))

    def _down_to(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Return the folders from the root down to one in it."""
        if not folder.is_relative_to(self.root):
            return [self.root]
        below = folder.relative_to(self.root).parts
        return [self.root.joinpath(*below[:depth]) for depth in range(len(below) + 1)]

    def _of_folders(self, folders: list[pathlib.Path], boundary: pathlib.Path | None) -> str:
        paths = [folder / name for folder in folders for name in self._names]
        parts = [self._of_path(path, boundary) for path in paths]
        return "\n\n".join(part for part in parts if part)

    def _of_path(self, path: pathlib.Path, boundary: pathlib.Path | None) -> str:
        """Return one file under its heading; "" where there is none, or it was shown before."""
        if not path.exists() or path in self._shown:
            return ""
        self._shown.add(path)
        try:
            text = read_text(path, boundary).strip()
        except SpecError as error:
            self.problems.append(str(error))
            return ""
        if not text or text in self._texts:  # CLAUDE.md is often a copy of AGENTS.md, or a link
            return ""
        if len(text) > self._left:
            self.problems.append(
                f"{path} is left out: instructions may have {MAX_CHARACTERS} characters together"
            )
            return ""
        self._texts.add(text)
        self._left -= len(text)
        return f"{_HEADING.format(path)}\n{text}"
