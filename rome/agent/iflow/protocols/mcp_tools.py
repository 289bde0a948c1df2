"""Tools of MCP servers, as the agent offers them to its model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from envs.gem.tools.mcp_connection import MCPConnection, MCPServerError
from rome.agent.iflow.places import output
from rome.agent.iflow.tools.base import Access, Tool, ToolContext, ToolError, ToolResult, takes

MAX_NAME = 64  # characters of a tool's name that endpoints take
MAX_DESCRIPTION = 8_000
MAX_OUTPUT = 30_000  # characters; the whole of a longer one is in a file
WITHHELD = (
    "The MCP server changed this tool after the user approved it. Its new description is shown"
    " once the user agrees: a call asks for that."
)

State = Literal["ready", "failed"]


@dataclasses.dataclass
class Server:
    """One server of a session."""

    name: str  # in the settings
    connection: MCPConnection  # to it
    seconds: float = 60.0  # for a call
    is_trusted: bool = False  # its calls and its changes are not asked about
    state: State = "failed"  # whether it can be used
    reason: str = "not started"  # why it cannot be; "" where it can
    # That it offers, by its own names for them
    tools: dict[str, ServerTool] = dataclasses.field(default_factory=dict)
    resources: int = 0  # how many it lists
    prompts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # that it lists
    listed_at: float = 0.0  # when its tools were last asked for, on the monotonic clock


class ServerTool(Tool):
    """A tool of a server, as that describes it: name, description and parameters.

    `check` is called before each call; it raises ToolError unless the tool is as it was approved.
    """

    def __init__(
        self,
        check: Callable[[ServerTool, ToolContext], Awaitable[None]],
        server: Server,
        full_name: str,
        described: Mapping[str, Any],
    ) -> None:
        self.name = full_name
        self.server = server
        self.own_name: str = described["name"]
        self.is_withheld = False
        self._check = check
        self.show(described)

    def show(self, described: Mapping[str, Any]) -> None:
        """Offer the tool as its server describes it."""
        self.description = printable(described["description"])[:MAX_DESCRIPTION]
        self.parameters = _object_schema(described["parameters"])
        self.is_withheld = False

    def withhold(self) -> None:
        """Offer the tool without what its server says of it now, until the user agrees."""
        self.description = WITHHELD
        self.parameters = takes() | {"additionalProperties": True}
        self.is_withheld = True

    def access(self, arguments: Mapping[str, Any]) -> Access:
        return "none" if self.server.is_trusted else "unknown"

    def paths(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return no paths: an argument of that name may mean anything."""
        return ()

    def summary(self, arguments: Mapping[str, Any]) -> str:
        shown = json.dumps(arguments, ensure_ascii=False, default=str)
        return f"{self.server.name}: {self.own_name} {shown}"[:200]

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Call the tool on its server, after its changes are agreed to."""
        await self._check(self, context)
        try:
            async with asyncio.timeout(self.server.seconds):
                answer = await self.server.connection.call(self.own_name, arguments)
        except TimeoutError as error:
            await self.server.connection.end_if_stuck()
            raise ToolError(
                f"MCP server {self.server.name} did not answer within {self.server.seconds:g} s"
            ) from error
        except MCPServerError as error:
            raise ToolError(str(error)) from error
        text, file = shorten(answer.text, context.session_folder)
        return ToolResult(text, status="error" if answer.is_error else "ok", file=file)


def digest_of(described: Mapping[str, Any]) -> str:
    """Return the digest of what a server says of a tool: description and parameters."""
    said = [described["description"], described["parameters"]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tool_name(server: str, tool: str) -> str:
    """Return `server__tool`, in the characters and the length that endpoints take for a name."""
    name = f"{safe(server)}__{safe(tool)}"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def printable(text: str) -> str:
    """Return a text without control characters and others that people cannot see."""
    return "".join(one for one in text if one.isprintable() or one in "\n\t")


def safe(name: str) -> str:
    """Return a name with an underscore for what endpoints do not take in names."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def shorten(text: str, folder: str) -> tuple[str, str]:
    """Return a text, its middle left out where it is long, and the file with the whole."""
    if len(text) <= MAX_OUTPUT:
        return text, ""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    file = f"{folder}/mcp-{time.time_ns():x}.txt"
    pathlib.Path(file).write_text(text, encoding="utf-8")
    return output.shorten(text, MAX_OUTPUT, file), file


def _object_schema(schema: Any) -> dict[str, Any]:
    """Return a tool's schema as one of an object, which a server may not have written."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return takes() | {"additionalProperties": True}
    properties = schema.get("properties")
    return {**schema, "type": "object", "properties": properties or {}}
