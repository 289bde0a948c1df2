"""What a user asks of the agent on a command line, beyond the settings."""

from __future__ import annotations

import dataclasses
import pathlib

from rome.agent.iflow.limits import Limits
from rome.agent.iflow.models.endpoint_model import Prices
from rome.agent.iflow.places.place import Kind
from rome.agent.iflow.specs.settings_values import McpServer


class UsageError(ValueError):
    """What the user asked for cannot be; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asks for beyond the settings; what is empty is left to them."""

    directory: pathlib.Path  # of the project
    workspace: Kind = "sandbox"  # where tools work
    model: str = ""
    base_url: str = ""  # of the endpoint, with /v1
    engine: str = ""  # URL of an engine of token ids, in place of an endpoint
    # Folder with the engine's tokenizer; "" takes the one that the engine names
    tokenizer: str = ""
    api_key: str = ""
    mode: str = ""  # of approval
    # Names or patterns of the only tools there are; None for all
    tools: tuple[str, ...] | None = None
    context_tokens: int = 0  # of a conversation
    max_tokens: int = 0  # of one answer; 0 leaves it to the server
    temperature: float | None = None  # of sampling; None leaves it to the server
    prices: Prices = dataclasses.field(default_factory=Prices)  # of a million tokens
    limits: Limits = dataclasses.field(default_factory=Limits)  # of one turn
    egress: tuple[str, ...] = ()  # what a sandbox may reach
    has_web: bool = False  # whether pages of the web can be fetched, from this machine
    trust: bool = False  # trust the project, now and later
    # Of MCP, besides those of the settings; a person named them
    servers: tuple[McpServer, ...] = ()
