"""What an interface is given: sessions that are opened for it, with all that it may show.

An interface (headless, terminal, editor, HTTP) listens to the log of a session and calls the
methods of its agent. It knows nothing of how an agent is put together (`assemble`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from rome.agent.iflow.events import Outcome
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.sessions import SessionInfo
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


class Close(Protocol):
    """Ends a session in order, and frees all that it holds."""

    async def __call__(self, outcome: Outcome = "finished") -> None: ...


@dataclasses.dataclass(kw_only=True)
class InterfaceSession:
    """An agent and what is around it.

    Attributes:
      agent: with its log, its workspace, and its desk, at which the interface answers.
      close: ends the agent, its servers, its workspace and its model.
      keep: called after each turn; it keeps what the session would lose with its process. Returns
        why that failed, which the log says too; "" where it did not.
      make_model: makes a model by its name, which is closed with the session; ValueError where the
        endpoint has none.
      servers: of MCP; None for none.
      commands: of the user and the project, by name.
      skills: by name.
      agents: types of sub-agents, by name.
      models: names that the user may choose from; () where they are not known.
      notices: for people: what was left out of settings and specs, and why.
    """

    agent: Agent
    close: Close
    keep: Callable[[], Awaitable[str]]
    make_model: Callable[[str], Awaitable[Model]]
    servers: MCPServers | None = None
    commands: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    skills: Mapping[str, Skill] = dataclasses.field(default_factory=dict)
    agents: Mapping[str, AgentSpec] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def workspace(self) -> Workspace:
        """Return where the agent's tools work."""
        return self.agent.workspace


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
          ValueError: there is no such session, or settings or directory are wrong.
          ModelError: the endpoint is not there.
          WorkspaceError: the place where tools work is not there.
        """

    def sessions(self, directory: str = "") -> list[SessionInfo]:
        """Return the sessions of a directory, the newest first; "" for that of the program."""
