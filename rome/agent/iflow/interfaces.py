"""What an interface is given: sessions that are opened for it, with all that it may show.

An interface (terminal, editor, HTTP) listens to the log of a session and calls the methods of its
agent. It knows nothing of how an agent is put together; what puts it together is an `Opener`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.specs.agent_specs import AgentSpec
from rome.agent.iflow.specs.commands import Command
from rome.agent.iflow.specs.settings_values import McpServer
from rome.agent.iflow.specs.skills import Skill

MODES: Mapping[str, str] = {
    "default": "asks before it edits files or runs commands",
    "accept_edits": "edits files of the project without asking",
    "plan": "only reads, and presents a plan",
    "yolo": "asks for nothing",
}


@dataclasses.dataclass(kw_only=True)
class InterfaceSession:
    """An agent and what is around it.

    Attributes:
      agent: with its log and its desk, at which the interface answers.
      workspace: where the agent's tools work.
      folder: of the session, on this machine.
      close: ends the agent, its servers, its workspace and its model.
      keep: called after each turn; it keeps what the session would lose with its process.
      make_model: makes a model by its name, which is closed with the session; ValueError where the
        endpoint has none.
      servers: of MCP; None for none.
      commands: of the user and the project, by name.
      skills: by name.
      agents: types of sub-agents, by name.
      models: names that the user may choose from; () where they are not known.
    """

    agent: Agent
    workspace: Workspace
    folder: pathlib.Path
    close: Callable[[], Awaitable[None]]
    keep: Callable[[], Awaitable[None]]
    make_model: Callable[[str], Awaitable[Model]]
    servers: MCPServers | None = None
    commands: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    skills: Mapping[str, Skill] = dataclasses.field(default_factory=dict)
    agents: Mapping[str, AgentSpec] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SessionSummary:
    """A session that can be taken up again.

    Attributes:
      id: of it.
      directory: where it works.
      title: what the user said first.
      changed_at: seconds since 1970.
    """

    id: str
    directory: str
    title: str
    changed_at: float


class Opener(Protocol):
    """Opens sessions."""

    async def open(
        self,
        directory: str,
        *,
        resume: str = "",
        is_fork: bool = False,
        servers: Sequence[McpServer] = (),
        wrap: Callable[[Workspace], Workspace] | None = None,
    ) -> InterfaceSession:
        """Open a session whose desk is attended.

        Args:
          directory: where it works.
          resume: id of a session to go on with; "" for a new one.
          is_fork: whether a copy of that session goes on, and itself stays as it is.
          servers: of MCP, besides those of the settings.
          wrap: is given the workspace and returns the one that is to be used.

        Raises:
          KeyError: there is no such session.
          ValueError: the settings or the directory are wrong; the message says how.
        """

    def sessions(self, directory: str = "") -> list[SessionSummary]:
        """Return the sessions of a directory, or of all, the newest first."""
