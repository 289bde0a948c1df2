"""What the agent and a client of the Agent Client Protocol tell each other about a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acp import RequestError
from acp import schema as protocol

from rome.agent.iflow.events import Decision, Scope
from rome.agent.iflow.interfaces import MODES, InterfaceSession
from rome.agent.iflow.specs.settings_values import McpServer

# What a client may answer to an approval: id of the option -> what it decides, and for how long
DECISIONS: Mapping[str, tuple[Decision, Scope]] = {
    "allow": ("allow", "once"),
    "always": ("allow", "session"),
    "deny": ("deny", "once"),
    "stop": ("stop", "once"),
}


def settings_of(session: InterfaceSession) -> dict[str, Any]:
    """Return the modes and options of a session, as all its openings answer them."""
    modes = [
        protocol.SessionMode(id=mode, name=mode.replace("_", " "), description=text)
        for mode, text in MODES.items()
    ]
    model = session.agent.model.name
    names = dict.fromkeys([model, *session.models])
    options = [protocol.SessionConfigSelectOption(value=name, name=name) for name in names]
    choice = protocol.SessionConfigOptionSelect(
        id="model",
        name="Model",
        category="model",
        type="select",
        current_value=model,
        options=options,
    )
    mode = session.agent.conversation.mode
    return {
        "modes": protocol.SessionModeState(current_mode_id=mode, available_modes=modes),
        "config_options": [choice],
    }


def permissions(rule: str) -> list[protocol.PermissionOption]:
    """Return what a client may answer to an approval."""
    option = protocol.PermissionOption
    always = [option(option_id="always", name=f"Always allow {rule}", kind="allow_always")]
    return [
        option(option_id="allow", name="Allow", kind="allow_once"),
        *(always if rule else []),
        option(option_id="deny", name="Deny", kind="reject_once"),
        option(option_id="stop", name="Deny and stop", kind="reject_once"),
    ]


def commands(session: InterfaceSession) -> list[protocol.AvailableCommand]:
    """Return the slash commands of a session."""
    found = []
    for command in session.commands.values():
        found.append(_command(command.name, command.description, command.hint))
    for skill in session.skills.values():
        found.append(_command(skill.name, skill.description, ""))
    for prompt in session.servers.prompts if session.servers is not None else ():
        found.append(_command(prompt.command, prompt.description, " ".join(prompt.arguments)))
    return found


def _command(name: str, description: str, hint: str) -> protocol.AvailableCommand:
    given = None
    if hint:
        given = protocol.AvailableCommandInput(protocol.UnstructuredCommandInput(hint=hint))
    return protocol.AvailableCommand(name=name, description=description, input=given)


def server(given: Any) -> McpServer:
    """Return an MCP server that the client names; raises for kinds that are not offered."""
    if isinstance(given, protocol.McpServerStdio):
        env = {variable.name: variable.value for variable in given.env}
        return McpServer(given.name, command=given.command, args=tuple(given.args), env=env)
    if isinstance(given, protocol.HttpMcpServer):
        headers = {header.name: header.value for header in given.headers}
        return McpServer(given.name, url=given.url, headers=headers)
    raise invalid(f"MCP server {given.name!r} is of a kind that this agent does not offer")


def block_text(block: Any) -> str:
    """Return a block of a prompt as text."""
    if isinstance(block, protocol.TextContentBlock):
        return block.text
    if isinstance(block, protocol.ResourceContentBlock):
        return f"[{block.name}]({block.uri})"
    if isinstance(block, protocol.EmbeddedResourceContentBlock):
        resource = block.resource
        text = getattr(resource, "text", "(not text)")
        return f'<resource uri="{resource.uri}">\n{text}\n</resource>'
    raise invalid(f"a prompt may hold text and resources, not {block.type}")


def invalid(message: str) -> RequestError:
    """Return the error for what a client asked wrongly."""
    return RequestError(-32602, message, {"message": message})
