"""Where settings and specs of the agent lie, and how such a file is read.

Three programs' folders are read by one loader: `.claude/`, `.agents/` and `.iflow/`, below the
user's home and below the project. Later ones count more; the project's count more than the user's.
A project's root is the folder of its git repository; the folder where the agent works may have
settings of its own, which count more. Whatever lies in a project may come from a stranger: it is
read only from regular files, of bounded size, that lie in the project after links are followed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import yaml

DIALECTS = (".claude", ".agents", ".iflow")  # the later, the more it counts
MAX_FILE_BYTES = 256 << 10

Scope = Literal["user", "project"]


class SpecError(ValueError):
    """A file of settings or specs is wrong; the message names the file, and what to change."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder of one program, such as ~/.claude."""

    folder: pathlib.Path  # of the files
    scope: Scope  # whose it is
    # Directory that no file of it may lead out of by a link; None for the user's own.
    boundary: pathlib.Path | None = None

    @property
    def dialect(self) -> str:
        """Return the name of the folder, which says whose habits its files follow."""
        return self.folder.name


def root_of(directory: pathlib.Path, home: pathlib.Path | None = None) -> pathlib.Path:
    """Return the root of the project that a directory lies in: its git repository, or itself.

    A repository of the user's home is no project: everything would lie in it.
    """
    home = (pathlib.Path.home() if home is None else home).resolve()
    directory = directory.resolve()
    for folder in (directory, *directory.parents):
        if folder == home:
            break
        if (folder / ".git").exists():
            return folder
    return directory


def places(directory: pathlib.Path, home: pathlib.Path | None = None) -> list[Place]:
    """Return the folders that settings and specs are read from; later ones count more.

    What the project's root has counts less than what the directory has where the agent works.
    """
    home = pathlib.Path.home() if home is None else home
    found = [Place(home / dialect, "user") for dialect in DIALECTS]
    root = root_of(directory, home)
    for folder in dict.fromkeys((root, directory.resolve())):
        if folder != home.resolve():
            found += [Place(folder / dialect, "project", root) for dialect in DIALECTS]
    return found


def read_text(path: pathlib.Path, boundary: pathlib.Path | None = None) -> str:
    """Return the text of a file, which lies below the boundary after links are followed.

    Raises:
      SpecError: it is no regular file, too long, no UTF-8, unreadable or outside the boundary.
    """
    try:
        real = path.resolve(strict=True)
        if boundary is not None and not real.is_relative_to(boundary.resolve()):
            raise SpecError(f"{path} leads to {real}, outside {boundary}; it is not read")
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"{path} is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise SpecError(f"{path} has {status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
        return real.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 at byte {error.start}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise SpecError(f"{path} cannot be read: {error}") from error


def load_named(
    where: Iterable[Place],
    pattern: str,
    read: Callable[[pathlib.Path, Place, dict[str, Any], str], Any],
) -> tuple[dict[str, Any], list[str]]:
    """Return what files describe, by its `name`, and what was wrong with files.

    Args:
      where: folders to read; a later one replaces what an earlier one has under the same name.
      pattern: of the files in such a folder.
      read: returns what a file describes, given its path, place, table and text; raises SpecError.
    """
    found = {}
    problems = []
    for place in where:
        for path in sorted(place.folder.glob(pattern)):
            if not path.is_file():
                continue
            try:
                made = read(path, place, *read_document(path, place.boundary))
            except SpecError as error:
                problems.append(str(error))
            else:
                found[made.name] = made
    return found, problems


def read_document(
    path: pathlib.Path, boundary: pathlib.Path | None = None
) -> tuple[dict[str, Any], str]:
    """Return the table and the text of a Markdown file; SpecError where it is broken."""
    return split_front_matter(read_text(path, boundary), path)


def split_front_matter(text: str, path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Return the table between two lines `---` at the top of a Markdown file, and the rest.

    Many such files are no correct YAML (`description: Use this when: ...`); these are read as lines
    of `key: text`.

    Raises:
      SpecError: the table has no end.
    """
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].rstrip() != "---":
        return {}, text
    for number, line in enumerate(lines[1:], 1):
        if line.rstrip() == "---":
            body = "".join(lines[number + 1 :]).strip("\n")
            return _read_table("".join(lines[1:number])), body
    raise SpecError(f"{path} begins with --- but has no second line --- that ends its table")


def list_of(value: Any) -> tuple[str, ...]:
    """Return names that are a list, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value or ()
    return tuple(str(part).strip() for part in parts if str(part).strip())


def text_in(table: Mapping[str, Any], *keys: str) -> str:
    """Return the first text that is under one of these keys; "" for none."""
    for key in keys:
        if isinstance(table.get(key), (str, int, float)):
            return str(table[key]).strip()
    return ""


def _read_table(text: str) -> dict[str, Any]:
    try:
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        table = None
    if isinstance(table, dict):
        return {str(key): value for key, value in table.items()}
    pairs = (line.partition(":") for line in text.splitlines() if not line.startswith((" ", "#")))
    return {key.strip(): value.strip().strip("\"'") for key, colon, value in pairs if colon}
