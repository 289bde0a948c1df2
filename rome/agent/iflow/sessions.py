"""Where sessions are kept: one folder each, by project, with the file of their events.

    ~/.iflow/sessions/PROJECT/ID/events.jsonl

Beside the events lie whole outputs of tools and the sessions of sub-agents. One process at a time
has a session open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import itertools
import os
import pathlib
import re
import secrets
import shutil

from rome.agent.iflow.event_log import EventError, EventLog, read_events
from rome.agent.iflow.events import TurnFinished, TurnStarted, UserMessage

EVENTS = "events.jsonl"
LOCK = "lock"
TURNS = (TurnStarted, TurnFinished)
TITLE_EVENTS = 50  # that are read of a session for its title
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


class SessionUnavailable(ValueError):
    """There is no such session, or another process has it open; the message says which."""


@dataclasses.dataclass(frozen=True)
class SessionInfo:
    """A session in a list."""

    id: str
    directory: str
    title: str  # the first line of the user's first message; "" where there is none
    changed: float  # time of its last event, in seconds since 1970
    size: int = 0  # bytes of its events


class OpenSession:
    """A session that this process has open."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.id = folder.name
        self.folder = folder
        self._lock = _lock(folder)
        try:
            self.log = EventLog(folder / EVENTS)  # its events
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def is_at_rest(self) -> bool:
        """Return whether no turn was begun, or the last one came to its end."""
        turns = (one for one in reversed(self.log.events) if isinstance(one, TURNS))
        last = next(turns, None)
        return last is None or (isinstance(last, TurnFinished) and last.outcome == "finished")

    def close(self) -> None:
        """Close its files; another process may open it then. It may be closed twice."""
        self.log.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class SessionStore:
    """The sessions of a project, in ~/.iflow/sessions unless another home is given."""

    def __init__(self, project: pathlib.Path, home: pathlib.Path | None = None) -> None:
        home = home or pathlib.Path.home() / ".iflow" / "sessions"
        self._project = str(project.resolve())
        self.folder = home / _name_of(self._project)

    def new(self) -> OpenSession:
        """Begin a session."""
        return OpenSession(self._new_folder())

    def open(self, id: str) -> OpenSession:
        """Open a session by its id, or by the beginning of it where only one begins so.

        Raises:
          SessionUnavailable: there is none, more than one, or another process has it open.
          EventError: its file is damaged; so for the methods below.
        """
        return OpenSession(self._find(id))

    def latest(self) -> OpenSession:
        """Open the session that was changed last."""
        sessions = self.list()
        if not sessions:
            raise SessionUnavailable("this project has no session to continue; begin a new one")
        return OpenSession(self.folder / sessions[0].id)

    def fork(self, id: str) -> OpenSession:
        """Begin a session with all that another one has; that one stays as it is."""
        source = self._find(id)
        folder = self._new_folder()
        # A process may be writing: a last line that is torn is cut when the copy is opened.
        shutil.copytree(
            source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK), symlinks=True
        )
        return OpenSession(folder)

    def list(self) -> list[SessionInfo]:
        """Return the sessions, those that were changed last first."""
        found = []
        for path in self.folder.glob(f"*/{EVENTS}"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                state = path.stat()
                if state.st_size:
                    about = (_title(path), state.st_mtime, state.st_size)
                    found.append(SessionInfo(path.parent.name, self._project, *about))
        return sorted(found, key=lambda info: info.changed, reverse=True)

    def _find(self, id: str) -> pathlib.Path:
        if not _ID.fullmatch(id):
            raise SessionUnavailable(f"{id!r} is no id of a session; --list_sessions shows them")
        if (self.folder / id / EVENTS).exists():
            return self.folder / id
        fitting = sorted(path.parent for path in self.folder.glob(f"{id}*/{EVENTS}"))
        if not fitting:
            raise SessionUnavailable(f"no session {id!r} here; --list_sessions shows what is")
        if len(fitting) > 1:
            names = ", ".join(path.name for path in fitting)
            raise SessionUnavailable(f"several sessions begin with {id!r}: {names}; give more")
        return fitting[0]

    def _new_folder(self) -> pathlib.Path:
        while True:
            time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            folder = self.folder / f"{time}-{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700, parents=True)
                return folder


def _lock(folder: pathlib.Path) -> int:
    """Return the file that this process has locked; it is freed when the process ends."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        text = f"session {folder.name} is open in another process; end it, or take a copy by --fork"
        raise SessionUnavailable(text) from None
    return file


def _name_of(project: str) -> str:
    """Return the name of a project's folder: readable, and different for every project."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", project).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(os.fsencode(project)).hexdigest()[:8]}"


def _title(path: pathlib.Path) -> str:
    """Return the first line of the first message of the user; "" where there is none."""
    with contextlib.suppress(EventError):
        for event in itertools.islice(read_events(path), TITLE_EVENTS):
            if isinstance(event, UserMessage) and event.source == "user":
                return event.text.strip().partition("\n")[0][:80]
    return ""
