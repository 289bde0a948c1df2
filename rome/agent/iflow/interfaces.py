"""What an interface is given: sessions that are opened for it, with all that it may show.

An interface (headless, terminal, editor, HTTP) listens to the log of a session and calls the
methods of its agent. It knows nothing of how an agent is put together (`assemble`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping

from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.specs.agent_specs import AgentSpec
from rome.agent.iflow.specs.commands import Command
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
      agent: with its log, its workspace, and its desk, at which the interface answers.
      close: ends the agent, its servers, its workspace and its model; given an outcome, says so.
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
    close: Callable[..., Awaitable[None]]
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
