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
    """An agent and what is around it."""

    agent: Agent  # with its log, its workspace, and its desk, at which the interface answers
    # Ends the agent, its servers, its workspace and its model; given an outcome, says so
    close: Callable[..., Awaitable[None]]
    # Called after each turn; it keeps what the session would lose with its process. Returns why
    # that failed, which the log says too; "" where it did not
    keep: Callable[[], Awaitable[str]]
    # Makes a model by its name, which is closed with the session; ValueError where the endpoint has
    # none
    make_model: Callable[[str], Awaitable[Model]]
    servers: MCPServers | None = None  # of MCP; None for none
    # Of the user and the project, by name
    commands: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    skills: Mapping[str, Skill] = dataclasses.field(default_factory=dict)  # by name
    # Types of sub-agents, by name
    agents: Mapping[str, AgentSpec] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()  # names that the user may choose from; () where they are not known
    notices: tuple[str, ...] = ()  # for people: what was left out of settings and specs, and why

    @property
    def workspace(self) -> Workspace:
        """Return where the agent's tools work."""
        return self.agent.workspace
