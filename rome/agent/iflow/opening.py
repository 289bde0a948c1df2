"""Opens sessions for interfaces: what `assemble` puts together, as `interfaces` wants it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from rome.agent.iflow import events
from rome.agent.iflow.approval.permissions import hides, is_wanted, make_policy
from rome.agent.iflow.assemble import assemble, read_settings
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.interfaces import InterfaceSession
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.options import Options
from rome.agent.iflow.places.place import open_place
from rome.agent.iflow.protocols.mcp_server import ToolServer
from rome.agent.iflow.protocols.mcp_tools import printable
from rome.agent.iflow.sessions import OpenSession, SessionInfo, SessionStore
from rome.agent.iflow.specs.settings_values import McpServer
from rome.agent.iflow.specs.spec_files import root_of
from rome.agent.iflow.tools.standard import standard_tools


class SessionOpener:
    """Opens sessions with the options of the command line, but for their directory."""

    def __init__(self, options: Options, home: pathlib.Path | None = None) -> None:
        self._options = options
        self._home = home

    async def open(
        self,
        directory: str,
        *,
        resume: str = "",
        is_fork: bool = False,
        servers: Sequence[McpServer] = (),
    ) -> InterfaceSession:
        """Open a session whose desk is attended: a new one, one to resume, or a copy of that.

        Raises:
          ValueError: there is no such session, or settings or directory are wrong.
          ModelError, WorkspaceError: the endpoint or the place is not there.
        """
        if not pathlib.Path(directory).is_dir():
            raise ValueError(f"{directory} is no directory")
        store = self._store(directory)
        if not resume:
            opened = store.new()
        else:
            opened = store.fork(resume) if is_fork else store.open(resume)
        return await self.open_stored(opened, directory, servers)

    async def open_stored(
        self, opened: OpenSession, directory: str, servers: Sequence[McpServer] = ()
    ) -> InterfaceSession:
        """Put an agent together for a session that is open already; it is closed with it."""
        options = dataclasses.replace(
            self._options,
            directory=pathlib.Path(directory),
            servers=(*self._options.servers, *servers),
        )
        session = await assemble(options, opened, is_attended=True, home=self._home)
        try:
            await session.agent.start()
        except BaseException:
            await session.close("infrastructure")
            raise
        for notice in session.notices:
            session.agent.log.append(events.Notice(text=notice, level="warning"))
        return session

    def sessions(self, directory: str = "") -> list[SessionInfo]:
        """Return the sessions of a directory, the newest first; "" for the options' own."""
        return self._store(directory or str(self._options.directory)).list()

    def _store(self, directory: str) -> SessionStore:
        home = self._home and self._home / ".iflow" / "sessions"
        return SessionStore(pathlib.Path(directory), home)


def ask_trust(
    options: Options, ask: Callable[[str], str], home: pathlib.Path | None = None
) -> None:
    """Ask once whether the project's own programs and rules may hold, where it has some.

    `ask` shows a text and returns what the user types. SpecError where a file of settings is wrong.
    """
    settings, projects = read_settings(options, home)
    root = root_of(options.directory, home)
    if not settings.bound or projects.is_decided(root):
        return
    lines = [f"  {printable(line)}" for line in settings.bound]
    question = f"Trust {printable(str(root))}? y yes, n no, Enter asks again next time: "
    text = ["This project can start programs, or allow calls without asking:", *lines, question]
    answer = ask("\n".join(text)).strip().lower()
    if answer in ("y", "yes", "n", "no"):
        projects.trust(root, answer.startswith("y"))


@contextlib.asynccontextmanager
async def tool_server(
    options: Options, home: pathlib.Path | None = None
) -> AsyncIterator[ToolServer]:
    """Open the tools of a directory for a client of MCP, without a model and without a session."""
    settings, projects = read_settings(options, home)
    hidden = hides(options, settings)
    with tempfile.TemporaryDirectory(prefix="iflow-") as name:
        folder = pathlib.Path(name)
        place = await open_place(
            options.workspace,
            options.directory.resolve(),
            folder,
            egress=options.egress,
            hides=hidden,
        )
        try:
            policy = make_policy(options, settings, place, folder, projects)
            tools = standard_tools(
                has_web=options.has_web,
                shell_seconds=settings.shell_timeout,
                user_memory=home and home / ".iflow" / "IFLOW.md",
            )
            wanted = [tool for tool in tools if is_wanted(tool.name, options, settings)]
            no_model = cast(Model, None)
            log = EventLog()
            yield ToolServer(
                Agent(no_model, wanted, log, place, policy=policy, session_folder=name)
            )
        finally:
            await place.aclose()
