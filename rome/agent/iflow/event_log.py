"""The file of a session: events are appended to it, and read back from it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

from rome.agent.iflow.events import KINDS, E, Event, TodoItem, ToolCall, Usage
from rome.version import VERSION


class EventError(ValueError):
    """A line of a session file that is no event; the message names file and line."""


class EventLog:
    """The events of one session, in memory and in its file."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self.path = path  # which is created or gone on with; None keeps events in memory only
        self.events: list[Event] = []  # all stored events so far
        self._listeners: list[Callable[[Event], None]] = []
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self.events = list(read_events(path))
            self._cut_torn_line()

    def append(self, event: E) -> E:
        """Store an event, tell the listeners, and return it with its number and time.

        It is in the file before anybody is told of it; the operating system has it, so that
        kill -9 loses nothing (a power failure may lose the last ones).

        Raises:
          OSError: the file cannot be written, such as on a full disk; nothing of the event is kept.
        """
        number = len(self.events) if event.is_stored else -1
        logged = dataclasses.replace(event, number=number, at=round(time.time(), 3))
        if event.is_stored:
            if self._file is not None:
                self._write(self._file, _line_of(logged))
            self.events.append(logged)
        for listener in list(self._listeners):
            listener(logged)
        return logged

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with each event from now on; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, file: int, line: bytes) -> None:
        """Write a whole line or nothing, so that a later one never follows half of it."""
        written = 0
        try:
            while written < len(line):
                written += os.write(file, line[written:])
        except OSError as error:
            if written:
                os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(error.errno, f"{error.strerror}: the session", str(self.path)) from error

    def _cut_torn_line(self) -> None:
        """Remove a last line without its end, which a kill or a full disk left."""
        assert self.path is not None and self._file is not None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)


def _line_of(event: Event) -> bytes:
    """Return the line of an event, in UTF-8 whatever is in it."""
    values = event.to_json()
    try:
        return f"{json.dumps(values, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # bytes that are no text, such as of a file in another encoding
        return f"{json.dumps(values)}\n".encode()


def read_events(path: pathlib.Path) -> Iterator[Event]:
    """Yield the events of a session file; a torn last line is left out.

    Raises:
      EventError: a line in the middle is no event that this version knows.
    """
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise EventError(f"{path}:{place} is no event of a session: {error}") from error


def from_json(values: Mapping[str, Any]) -> Event:
    """Return the event that `Event.to_json` wrote; members that it does not know are passed over.

    Raises:
      EventError: this version does not know the kind.
      TypeError: a member is missing.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str):
        raise EventError(f"it has no kind: {str(values)[:80]}")
    if kind not in KINDS:
        raise EventError(
            f"iFlow {VERSION} does not know the kind {kind!r}: a newer one wrote this session;"
            " go on with it there, or begin a new one here"
        )
    cls = KINDS[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    members = {name: value for name, value in values.items() if name in names}
    for name, read in _READERS.get(cls.kind, {}).items():
        if name in members:
            members[name] = read(members[name])
    return cls(**members)


def _readers(cls: type[Event]) -> dict[str, Callable[[Any], Any]]:
    """Return how the members that JSON has in another form are read."""
    nested: dict[Any, Callable[[Any], Any]] = {
        ToolCall: lambda value: ToolCall(**value),
        Usage: lambda value: Usage(**value),
        tuple[str, ...]: tuple,
        tuple[dict[str, Any], ...]: tuple,
        tuple[ToolCall, ...]: lambda value: tuple(ToolCall(**one) for one in value),
        tuple[TodoItem, ...]: lambda value: tuple(TodoItem(**one) for one in value),
    }
    hints = get_type_hints(cls)
    return {name: nested[hint] for name, hint in hints.items() if hint in nested}


_READERS = {kind: _readers(cls) for kind, cls in KINDS.items()}
