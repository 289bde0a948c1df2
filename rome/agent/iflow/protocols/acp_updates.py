"""The events of a session in the words of the Agent Client Protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import acp
from acp import helpers
from acp.schema import Cost, SessionInfoUpdate, ToolCallLocation, UsageUpdate

from rome.agent.iflow import events
from rome.agent.iflow.events import Event
from rome.agent.iflow.interfaces import InterfaceSession

MAX_SHOWN = 20_000  # characters of an output that an editor is sent
STATUS = {"pending": "pending", "in_progress": "in_progress", "done": "completed"}
KINDS = {
    "read": "read",
    "write": "edit",
    "execute": "execute",
    "network": "fetch",
    "none": "think",
    "unknown": "other",
}
KINDS_OF_TOOLS = {
    "glob": "search",
    "search": "search",
    "list_directory": "search",
    "exit_plan_mode": "switch_mode",
}


class Translator:
    """Turns the events of a session into updates, in their order, and sends them."""

    def __init__(self, session: InterfaceSession, send: Callable[[Any], None]) -> None:
        self._session = session
        self._send = send
        self._is_streamed = False  # the answer that comes was sent in pieces
        self._calls: dict[str, events.ToolCall] = {}  # without a result, by id
        self._announced: set[str] = set()  # ids of calls that the editor shows
        self._outputs: dict[str, str] = {}
        self._has_title = False

    def take(self, event: Event) -> None:
        """Send what an event means for the editor."""
        for update in self._updates(event):
            self._send(update)

    def replay(self, event: Event) -> None:
        """Send what an event of an earlier process means: the user's words as well."""
        if isinstance(event, events.UserMessage) and event.source in ("user", "steer"):
            self._send(acp.update_user_message_text(event.text))
        self.take(event)

    def announce(self, call: events.ToolCall, summary: str, diff: str = "") -> Any:
        """Return the update that shows a call before it runs, once."""
        self._announced.add(call.id)
        root = self._session.workspace.root
        tool = self._session.agent.tools.get(call.name)
        arguments = _arguments(call)
        kind = "other"
        paths: tuple[str, ...] = ()
        if tool is not None and isinstance(arguments, dict):
            kind = KINDS_OF_TOOLS.get(call.name) or KINDS[tool.access(arguments)]
            paths = tool.paths(arguments)
        return acp.start_tool_call(
            call.id,
            summary or call.name,
            kind=kind,  # type: ignore[arg-type]
            status="pending",
            content=diff_contents(diff, root) or None,
            locations=[ToolCallLocation(path=absolute(path, root)) for path in paths] or None,
            raw_input=arguments,
        )

    def _updates(self, event: Event) -> Iterator[Any]:
        match event:
            case events.TextDelta():
                self._is_streamed = True
                yield _said(event.text, event.is_reasoning)
            case events.AssistantMessage():
                yield from self._answer(event)
            case events.ToolStarted():
                if event.call.id not in self._announced:
                    yield self.announce(event.call, event.summary)
                yield acp.update_tool_call(event.call.id, status="in_progress")
            case events.ToolOutput() if event.call_id in self._announced:
                text = self._outputs.get(event.call_id, "") + event.text
                self._outputs[event.call_id] = text[-MAX_SHOWN:]
                yield acp.update_tool_call(event.call_id, content=[_text(text[-MAX_SHOWN:])])
            case events.ToolFinished() if event.call_id in self._calls:
                yield from self._finish(event)
            case events.TodoChanged():
                entries = [
                    acp.plan_entry(item.text, status=STATUS[item.status])  # type: ignore[arg-type]
                    for item in event.items
                ]
                yield acp.update_plan(entries)
            case events.ModeChanged():
                yield helpers.update_current_mode(event.mode)
            case events.UserMessage(source="user") if not self._has_title:
                self._has_title = True
                title = " ".join(event.text.split())[:80]
                yield SessionInfoUpdate(session_update="session_info_update", title=title)
            case events.Notice() if event.level != "info":
                yield acp.update_agent_thought_text(f"[{event.level}] {event.text}\n")

    def _answer(self, event: events.AssistantMessage) -> Iterator[Any]:
        self._calls.update({call.id: call for call in event.tool_calls})
        for text, is_reasoning in ((event.reasoning, True), (event.text, False)):
            if text and not self._is_streamed:
                yield _said(text, is_reasoning)
        self._is_streamed = False
        conversation = self._session.agent.conversation
        price = conversation.usage.price
        yield UsageUpdate(
            session_update="usage_update",
            used=conversation.context_tokens,
            size=self._session.agent.model.context_tokens,
            cost=Cost(amount=price, currency="USD") if price else None,
        )

    def _finish(self, event: events.ToolFinished) -> Iterator[Any]:
        call = self._calls.pop(event.call_id)
        self._outputs.pop(call.id, None)
        if call.id not in self._announced:  # refused before it ran
            yield self.announce(call, call.name)
        self._announced.discard(call.id)
        raw: dict[str, Any] = {"status": event.status}
        if event.exit_code is not None:
            raw["exitCode"] = event.exit_code
        diffs = diff_contents(event.diff, self._session.workspace.root)
        yield acp.update_tool_call(
            call.id,
            status="completed" if event.status == "ok" else "failed",
            content=diffs or [_text(event.output[:MAX_SHOWN])],
            raw_output=raw,
        )


def absolute(path: str, root: str) -> str:
    """Return a path below the project's directory as an absolute one."""
    return path if path.startswith("/") else f"{root}/{path}"


def diff_contents(diff: str, root: str) -> list[Any]:
    """Return a unified diff of tools as the protocol has it: old and new text of each hunk."""
    head, *hunks = re.split(r"^@@.*@@\n", diff, flags=re.MULTILINE)
    if not hunks:
        return []
    path = absolute(head.splitlines()[1][4:], root)
    is_new_file = "\n@@ -0,0 " in diff
    contents = []
    for hunk in hunks:
        lines: list[str] = []
        for line in re.findall(r"[^\n]*\n", hunk):
            if line.startswith("\\"):  # the line before ends without a break
                lines[-1] = lines[-1].removesuffix("\n")
            else:
                lines.append(line)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        contents.append(acp.tool_diff_content(path, new, None if is_new_file else old))
    return contents


def _text(text: str) -> Any:
    return acp.tool_content(acp.text_block(text))


def _arguments(call: events.ToolCall) -> Any:
    try:
        return json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        return call.arguments


def _said(text: str, is_reasoning: bool) -> Any:
    if is_reasoning:
        return acp.update_agent_thought_text(text)
    return acp.update_agent_message_text(text)
