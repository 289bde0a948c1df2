"""The list of what is to do, which stays in the context whatever is summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.iflow.events import TodoChanged, TodoItem
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

_MARKS = {"pending": "[ ]", "in_progress": "[>]", "done": "[x]"}


class TodoTool(Tool):
    """Replaces the list, or shows it."""

    name = "todo"
    description = (
        "Keep the list of what is to do for work of several steps. Give the whole list each time;"
        " without items it is shown. Have one item in progress, and mark it done when it is."
    )
    parameters = takes(
        items=of(
            "array", items=takes("text", text=of("string"), status=of("string", enum=list(_MARKS)))
        )
    )

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        if "items" not in arguments:
            return ToolResult(render(context.todo))
        items = tuple(
            TodoItem(" ".join(item["text"].split()), item.get("status", "pending"))
            for item in arguments["items"]
        )
        if not all(item.text for item in items):
            raise ToolError("each item needs a text")
        context.emit(TodoChanged(items=items))
        return ToolResult(render(items))


def render(items: Sequence[TodoItem]) -> str:
    """Return a list as the model reads it."""
    lines = [f"{_MARKS[item.status]} {item.text}" for item in items]
    return "\n".join(lines) or "(nothing to do)"
