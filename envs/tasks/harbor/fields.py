"""Typed reading of settings out of parsed TOML or YAML; every fault names its line."""

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
from envs.tasks.harbor.task import LINK, Files

MAX_SETTINGS_BYTES = 1 << 20
MAX_DOCKERFILE_BYTES = 1 << 16
MAX_FOLDER_BYTES = 64 << 20  # one folder of a task; the embedded sandbox holds no more
MAX_FOLDER_FILES = 4096
MUST_BE_REGULAR = ("Dockerfile", ".dockerignore")  # of a build context: they are read here
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_MEGABYTES = {"": 1 / (1 << 20), "K": 1 / 1024, "M": 1, "G": 1024, "T": 1 << 20}  # of a unit
_TEMPLATE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclasses.dataclass
class Table:
    """A table of settings.

    `get` marks a key as known. Keys that are left in the end are unknown, and accepted. `line_of`
    returns the line of a key, given the path to it. ${NAME} in values is filled in from `environ`.
    """

    file: pathlib.Path
    values: Mapping[str, Any]
    line_of: Callable[[tuple[str, ...]], int]
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    path: tuple[str, ...] = ()
    known: set[str] = dataclasses.field(default_factory=set)
    children: list[Table] = dataclasses.field(default_factory=list)

    def fault(self, key: str | None, message: str, inner: str | None = None) -> TaskError:
        """Return an error about a key, or about the key `inner` of the table at that key."""
        path = (*self.path, *(part for part in (key, inner) if part))
        name = ".".join(path) or "the file"
        return TaskError(self.file, self.line_of(path), f"{name}: {message}")

    def table(self, key: str) -> Table:
        """Return the table below a key, or an empty one."""
        return self._child(key, self.get(key, dict, {}))

    def tables(self, key: str) -> list[Table]:
        """Return the list of tables below a key, or an empty list."""
        found = []
        for index, value in enumerate(self.get(key, list, [])):
            if not isinstance(value, dict):
                raise self.fault(key, f"entry {index + 1} is {_short(value)}; it must be a table")
            found.append(self._child(key, value))
        return found

    def _child(self, key: str, values: Mapping[str, Any]) -> Table:
        child = Table(self.file, values, self.line_of, self.environ, (*self.path, key))
        self.children.append(child)
        return child

    def get(self, key: str, kind: type, default: Any) -> Any:
        """Return the value of a key, checked to be of a type, or the default."""
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fault(key, f"{_short(value)} is not a {kind.__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a text, or the default."""
        return self.get(key, str, default)

    def seconds(self, key: str, default: float | None) -> float | None:
        """Return a positive number of seconds, or the default."""
        return self.number(key, default, above=0.0)

    def number(self, key: str, default: float | None, above: float | None = None) -> float | None:
        """Return a finite number, or the default."""
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(_as_float(value)):
            raise self.fault(key, f"{_short(value)} is not a finite number")
        if above is not None and not value > above:
            raise self.fault(key, f"{_short(value)} must be above {above:g}")
        return float(value)

    def integer(self, key: str, default: int | None, least: int = 0) -> int | None:
        """Return a whole number of at least `least`, or the default."""
        value = self.number(key, None)
        if value is None:
            return default
        if value != int(value) or value < least:
            raise self.fault(
                key, f"{_short(self.values[key])} is not a whole number of at least {least}"
            )
        return int(value)

    def megabytes(self, key: str, old: str) -> int | None:
        """Return a size in MiB: `memory_mb = 2048`, or in the older form `memory = "2G"`."""
        if (value := self.integer(key, None, least=1)) is not None:
            self.known.add(old)
            return value
        if (text := self.text(old)) is None:
            return None
        match = _SIZE.fullmatch(text)
        if not match:
            raise self.fault(old, f'{_short(text)} is not a size such as "2G" or "512M"')
        size = float(match[1]) * _MEGABYTES[match[2].upper()]
        return max(1, int(size))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, or an empty one."""
        values = self.get(key, list, [])
        if bad := [value for value in values if not isinstance(value, str)]:
            raise self.fault(key, f"{_short(bad[0])} is not a text")
        return tuple(values)

    def environment(self, key: str) -> dict[str, str]:
        """Return variables with ${NAME} and ${NAME:-default} filled in from `environ`.

        The environment of this process is never used, because it may hold secrets.
        """
        variables = {}
        for name, value in self.get(key, dict, {}).items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise self.fault(key, f"{_short(value)} is not a text", name)
            if not _can_be_variable(name, value):
                raise self.fault(key, f"{_short(name)} cannot be an environment variable", name)
            variables[name] = self._filled(key, name, str(value))
        return variables

    def _filled(self, key: str, name: str, text: str) -> str:
        """Fill in the ${NAME} of a variable's value."""
        return _TEMPLATE.sub(lambda match: self._given_value(key, name, match), text)

    def _given_value(self, key: str, name: str, match: re.Match[str]) -> str:
        value = self.environ.get(match[1], match[2])
        if value is None:
            raise self.fault(
                key,
                f"{match[0]} has no value and no default; give it to launch.eval as"
                f" --task_env {match[1]}=VALUE, or --task_env {match[1]} for the value that the"
                f" variable has there; to load_task as environ={{{match[1]!r}: ...}}",
                name,
            )
        return value

    def unknown(self) -> list[str]:
        """Return the keys of this table and those below it that nothing asked for."""
        own = [".".join((*self.path, key)) for key in self.values if key not in self.known]
        return own + [key for child in self.children for key in child.unknown()]


def _can_be_variable(name: str, value: str | float) -> bool:
    return bool(name) and "=" not in name and "\0" not in f"{name}{value}"


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _short(value: Any) -> str:
    text = reprlib.repr(value)  # bounded: with YAML's aliases a small file can hold a huge value
    return text if len(text) <= 60 else f"{text[:57]}..."


def need_unix_lines(path: pathlib.Path, script: bytes) -> None:
    """Raise TaskError for a script whose lines end with CRLF: no shell can run it."""
    line = script[: script.find(b"\r\n")].count(b"\n") + 1
    if b"\r\n" in script:
        message = "lines end with CRLF, which no shell can run; convert it, for example by dos2unix"
        raise TaskError(path, line, message)


def read_text(path: pathlib.Path, limit: int = MAX_SETTINGS_BYTES) -> str:
    """Return the content of a file of UTF-8 text.

    Raises:
      TaskError: the file is missing, not regular, too long or no text.
    """
    content, _ = _read(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TaskError(path, line, f"not UTF-8 text ({error.reason})") from error


def read_folder(
    folder: pathlib.Path, leave_out: tuple[str, ...] = (), as_context: bool = False
) -> dict[str, tuple[bytes, int]]:
    """Return all regular files below a folder; {} where the folder is missing.

    Args:
      folder: the folder.
      leave_out: names at the top of the folder to leave out.
      as_context: whether empty folders and symbolic links are members too, as Environment.context
        has them. No link is followed.

    Raises:
      TaskError: there is a link or a device, which could name any file of this machine, or too
        much.
    """
    if not folder.is_dir():
        return {}
    files: dict[str, tuple[bytes, int]] = {}
    left = MAX_FOLDER_BYTES
    for root, folders, names in os.walk(folder):
        place = pathlib.Path(root)
        ignored = leave_out if place == folder else ()
        folders[:] = sorted(name for name in folders if name not in ignored)
        links = {name for name in (*folders, *names) if (place / name).is_symlink()}
        for name in sorted({*links, *names}.difference(ignored)):
            content, mode = _member(place / name, left, name in links and as_context)
            left -= len(content)
            files[(place / name).relative_to(folder).as_posix()] = (content, mode)
            if len(files) > MAX_FOLDER_FILES:
                raise TaskError(folder, 0, f"more than {MAX_FOLDER_FILES} files")
        if as_context and place != folder and not folders and not names:
            files[f"{place.relative_to(folder).as_posix()}/"] = (b"", 0o755)
    return files


def _member(path: pathlib.Path, limit: int, is_link: bool) -> tuple[bytes, int]:
    """Return a file's content and permissions, or a link's target and LINK."""
    if is_link and path.name not in MUST_BE_REGULAR:
        return os.readlink(bytes(path)), LINK
    if path.is_symlink():
        raise TaskError(path, 0, "a symbolic link; it must be a regular file")
    return _read(path, limit)


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
    """Return the files together with an executable script."""
    return {**files, name: (text.encode(), 0o755)}
