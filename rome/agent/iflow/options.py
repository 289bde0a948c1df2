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
    """What a user asks for beyond the settings; what is empty is left to them.

    Attributes:
      directory: of the project.
      workspace: where tools work.
      model: name of it.
      base_url: of the endpoint, with /v1.
      engine: URL of an engine of token ids, in place of an endpoint.
      tokenizer: folder with the engine's tokenizer; "" takes the one that the engine names.
      api_key: for it.
      mode: of approval.
      tools: names or patterns of the only tools there are; None for all.
      context_tokens: of a conversation.
      max_tokens: of one answer; 0 leaves it to the server.
      temperature: of sampling; None leaves it to the server.
      prices: of a million tokens.
      limits: of one turn.
      egress: what a sandbox may reach.
      has_web: whether pages of the web can be fetched, from this machine.
      trust: trust the project, now and later.
      servers: of MCP, besides those of the settings; a person named them.
    """

    directory: pathlib.Path
    workspace: Kind = "sandbox"
    model: str = ""
    base_url: str = ""
    engine: str = ""
    tokenizer: str = ""
    api_key: str = ""
    mode: str = ""
    tools: tuple[str, ...] | None = None
    context_tokens: int = 0
    max_tokens: int = 0
    temperature: float | None = None
    prices: Prices = dataclasses.field(default_factory=Prices)
    limits: Limits = dataclasses.field(default_factory=Limits)
    egress: tuple[str, ...] = ()
    has_web: bool = False
    trust: bool = False
    servers: tuple[McpServer, ...] = ()
