"""The list of what is to do, which stays in the context whatever is summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rome.agent.iflow.events import TodoChanged, TodoItem
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

Status = Literal["pending", "in_progress", "done"]
_STATUSES: Mapping[str, Status] = {
    "pending": "pending",
    "in_progress": "in_progress",
    "done": "done",
    "completed": "done",
}
_MARKS: Mapping[Status, str] = {"pending": "[ ]", "in_progress": "[>]", "done": "[x]"}


class TodoTool(Tool):
    """Replaces the list, or shows it."""

    name = "todo"
    description = (
        "Keep the list of what is to do for work of several steps. Give the whole list each time;"
        " without items it is shown. Have one item in progress, and mark it done when it is."
    )
    parameters = takes(
        items=of(
            "array",
            items=takes(
                "text",
                text=of("string"),
                status=of("string", enum=["pending", "in_progress", "done"]),
            ),
        )
    )

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Replace the list."""
        if "items" not in arguments:
            return ToolResult(render(context.todo))
        items = tuple(_read(item, place) for place, item in enumerate(arguments["items"], 1))
        context.emit(TodoChanged(items=items))
        return ToolResult(render(items))


def render(items: Sequence[TodoItem]) -> str:
    """Return a list as the model reads it."""
    lines = [f"{_MARKS[item.status]} {item.text}" for item in items]
    return "\n".join(lines) or "(nothing to do)"


def _read(item: Any, place: int) -> TodoItem:
    if isinstance(item, str):
        item = {"text": item}
    text = item.get("text", item.get("content")) if isinstance(item, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ToolError(f"item {place} needs a text")
    status = item.get("status", "pending")
    if status not in _STATUSES:
        raise ToolError(f"status of item {place} must be pending, in_progress or done")
    return TodoItem(" ".join(text.split()), _STATUSES[status])
