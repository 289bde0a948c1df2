"""Sub-agents in Markdown: `agents/NAME.md`, with the keys of iFlow's files or of Claude's."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from rome.agent.iflow.specs.spec_files import Place, SpecError, list_of, load_named, text_in
from rome.agent.iflow.specs.tool_names import tool_name


@dataclasses.dataclass(frozen=True)
class AgentSpec:
    """A kind of sub-agent."""

    name: str  # by which the task tool calls it
    when: str  # what it is for, as the model is told
    prompt: str  # its system text
    # Names of the tools that it has; None for those of its parent.
    tools: tuple[str, ...] | None = None
    model: str = ""  # that answers; "" for that of its parent


GENERAL = AgentSpec(
    name="general",
    when="Any task of several steps whose intermediate output you do not need to see.",
    prompt=(
        "You carry out one task for another agent. Work on your own with your tools until it is"
        " done. Your last message is all that the other agent sees: state in it what you found or"
        " changed, with the paths of files, and what is left open."
    ),
)


def load_agent_specs(where: Iterable[Place]) -> tuple[dict[str, AgentSpec], list[str]]:
    """Return the sub-agents by name, the general one included; see `load_named`."""
    specs, problems = load_named(where, "agents/*.md", _read_agent_spec)
    return {GENERAL.name: GENERAL} | specs, problems


def _read_agent_spec(
    path: pathlib.Path, place: Place, table: dict[str, Any], body: str
) -> AgentSpec:
    when = text_in(table, "description", "whenToUse", "when")
    prompt = "\n\n".join(part for part in (text_in(table, "systemPrompt"), body.strip()) if part)
    if not when:
        raise SpecError(f"{path} has no description (or whenToUse) that says what the agent is for")
    if not prompt:
        raise SpecError(f"{path} has no text below its table; write what the agent should do")
    tools = [
        tool_name(name.split("(")[0])
        for name in list_of(table.get("tools", table.get("allowedTools")))
    ]
    servers = [f"{server}__*" for server in list_of(table.get("allowedMcps"))]
    has_all = "*" in tools or not tools
    model = text_in(table, "model")
    return AgentSpec(
        name=text_in(table, "name", "agentType") or path.stem,
        when=when,
        prompt=prompt,
        tools=None if has_all else tuple(dict.fromkeys([*tools, *servers])),
        model="" if model == "inherit" else model,
    )
