"""Reading settings out of parsed TOML or YAML: each value with its type, each fault with its line."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from typing import Any

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.task import Files

MAX_SETTINGS_BYTES = 1 << 20
MAX_DOCKERFILE_BYTES = 1 << 16
MAX_FOLDER_BYTES = 64 << 20  # of one folder of a task: what the embedded sandbox could hold at all
MAX_FOLDER_FILES = 4096
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_TEMPLATE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclasses.dataclass
class Table:
    """A table of settings.

    `get` marks a key as known; what is left in the end is unknown, and accepted.

    line_of: the line of a key, given the path to it.
    """

    file: pathlib.Path
    values: Mapping[str, Any]
    line_of: Callable[[tuple[str, ...]], int]
    environ: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # what ${NAME} may be filled in from
    path: tuple[str, ...] = ()
    known: set[str] = dataclasses.field(default_factory=set)
    children: list[Table] = dataclasses.field(default_factory=list)

    def fault(self, key: str | None, message: str, inner: str | None = None) -> TaskError:
        """About a key of this table, or about a key of the table at this key."""
        path = (*self.path, *(part for part in (key, inner) if part))
        return TaskError(
            self.file, self.line_of(path), f"{'.'.join(path) or 'the file'}: {message}"
        )

    def table(self, key: str) -> Table:
        """The table below this key, an empty one where there is none."""
        value = self.get(key, dict, {})
        child = Table(self.file, value, self.line_of, self.environ, (*self.path, key))
        self.children.append(child)
        return child

    def tables(self, key: str) -> list[Table]:
        found = []
        for index, value in enumerate(self.get(key, list, [])):
            if not isinstance(value, dict):
                raise self.fault(key, f"entry {index + 1} is {_short(value)}; it must be a table")
            found.append(Table(self.file, value, self.line_of, self.environ, (*self.path, key)))
        self.children += found
        return found

    def get(self, key: str, kind: type, default: Any) -> Any:
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fault(key, f"{_short(value)} is no {kind.__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        return self.get(key, str, default)

    def seconds(self, key: str, default: float | None) -> float | None:
        return self.number(key, default, above=0.0)

    def number(self, key: str, default: float | None, above: float | None = None) -> float | None:
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(_as_float(value))
        ):
            raise self.fault(key, f"{_short(value)} is no finite number")
        if above is not None and not value > above:
            raise self.fault(key, f"{_short(value)} must be above {above:g}")
        return float(value)

    def integer(self, key: str, default: int | None, least: int = 0) -> int | None:
        value = self.number(key, None)
        if value is None:
            return default
        if value != int(value) or value < least:
            raise self.fault(key, f"{_short(self.values[key])} is no whole number from {least} on")
        return int(value)

    def megabytes(self, key: str, old: str) -> int | None:
        """`memory_mb = 2048`, or the older `memory = "2G"`."""
        if (value := self.integer(key, None, least=1)) is not None:
            self.known.add(old)
            return value
        if (text := self.text(old)) is None:
            return None
        match = _SIZE.fullmatch(text)
        if not match:
            raise self.fault(old, f'{_short(text)} is no size such as "2G" or "512M"')
        size = (
            float(match[1])
            * {"": 1 / (1 << 20), "K": 1 / 1024, "M": 1, "G": 1024, "T": 1 << 20}[match[2].upper()]
        )
        return max(1, int(size))

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list, [])
        if bad := [value for value in values if not isinstance(value, str)]:
            raise self.fault(key, f"{_short(bad[0])} is no text")
        return tuple(values)

    def environment(self, key: str) -> dict[str, str]:
        """Variables, with ${NAME} and ${NAME:-default} filled in from `environ`: never from this
        process's environment, which may hold secrets.
        """
        variables = {}
        for name, value in self.get(key, dict, {}).items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise self.fault(key, f"{_short(value)} is no text", name)
            if not name or "=" in name or "\0" in f"{name}{value}":
                raise self.fault(key, f"{_short(name)} cannot be an environment variable", name)
            variables[name] = _TEMPLATE.sub(
                lambda match: self._given_value(key, name, match), str(value)
            )
        return variables

    def _given_value(self, key: str, name: str, match: re.Match[str]) -> str:
        value = self.environ.get(match[1], match[2])
        if value is None:
            raise self.fault(
                key,
                f"{match[0]} has no value and no default; pass environ={{{match[1]!r}: ...}} to"
                " load_task",
                name,
            )
        return value

    def unknown(self) -> list[str]:
        """Keys that nothing asked for, of this table and those below it."""
        own = [".".join((*self.path, key)) for key in self.values if key not in self.known]
        return own + [key for child in self.children for key in child.unknown()]


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _short(value: Any) -> str:
    text = reprlib.repr(value)  # bounded: YAML aliases can make a small file mean a huge value
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(path: pathlib.Path, limit: int = MAX_SETTINGS_BYTES) -> str:
    """A file of UTF-8 text. TaskError where it is missing, no regular file, too long or no text."""
    content, _ = _read(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(
            path, content[: error.start].count(b"\n") + 1, f"not UTF-8 text ({error.reason})"
        ) from error


def read_folder(
    folder: pathlib.Path, leave_out: tuple[str, ...] = ()
) -> dict[str, tuple[bytes, int]]:
    """All regular files below a folder; {} where it is missing.

    A link or a device is refused: it could name any file of this machine.

    leave_out: names at the top of the folder.
    """
    if not folder.is_dir():
        return {}
    files: dict[str, tuple[bytes, int]] = {}
    left = MAX_FOLDER_BYTES
    for root, folders, names in os.walk(folder):
        top = pathlib.Path(root) == folder
        folders[:] = sorted(name for name in folders if not (top and name in leave_out))
        for name in [*folders, *names]:
            if (pathlib.Path(root) / name).is_symlink():
                raise TaskError(
                    pathlib.Path(root) / name,
                    0,
                    "a symbolic link; a task's files must be regular files",
                )
        for name in sorted(names):
            if top and name in leave_out:
                continue
            path = pathlib.Path(root) / name
            content, mode = _read(path, left)
            left -= len(content)
            files[path.relative_to(folder).as_posix()] = (content, mode)
            if len(files) > MAX_FOLDER_FILES:
                raise TaskError(folder, 0, f"more than {MAX_FOLDER_FILES} files")
    return files


def _read(path: pathlib.Path, limit: int) -> tuple[bytes, int]:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise TaskError(path, 0, "not a regular file")
        if status.st_size > limit:
            raise TaskError(path, 0, f"{status.st_size} bytes, and at most {limit} are read")
        return path.read_bytes(), 0o755 if status.st_mode & 0o100 else 0o644
    except FileNotFoundError:
        raise TaskError(path, 0, "missing") from None
    except (OSError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(path, 0, f"cannot be read: {error}") from error


def with_script(files: Files, name: str, text: str) -> dict[str, tuple[bytes, int]]:
    return {**files, name: (text.encode(), 0o755)}
