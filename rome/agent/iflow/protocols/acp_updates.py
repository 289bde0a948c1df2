"""The events of a session in the words of the Agent Client Protocol."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import acp
from acp import helpers
from acp.schema import Cost, SessionInfoUpdate, ToolCallLocation, UsageUpdate

from rome.agent.iflow import events
from rome.agent.iflow.events import Event
from rome.agent.iflow.interfaces import InterfaceSession

MAX_SHOWN = 20_000  # characters of an output that an editor is sent
OUTPUT_SECONDS = 0.3  # between two updates of a running call
STATUS = {"pending": "pending", "in_progress": "in_progress", "done": "completed"}
KINDS = {
    "read": "read",
    "write": "edit",
    "execute": "execute",
    "network": "fetch",
    "none": "think",
    "unknown": "other",
}
SEARCHES = ("glob", "search", "list_directory")


class Translator:
    """Turns events into updates, in their order.

    Args:
      session: whose events they are.
      send: is given each update.
    """

    def __init__(self, session: InterfaceSession, send: Callable[[Any], None]) -> None:
        self._session = session
        self._send = send
        self._is_streamed = False  # the answer that comes was sent in pieces
        self._started: dict[str, str] = {}  # id of a call -> its title
        self._outputs: dict[str, str] = {}
        self._sent_at = 0.0
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
        self._started[call.id] = summary or call.name
        return acp.start_tool_call(
            call.id,
            summary or call.name,
            kind=self._kind(call),  # type: ignore[arg-type]
            status="pending",
            content=diff_contents(diff, self._session.workspace.root) or None,
            locations=self._locations(call) or None,
            raw_input=_arguments(call),
        )

    def _updates(self, event: Event) -> Iterator[Any]:
        if isinstance(event, events.TextDelta):
            self._is_streamed = True
            if event.is_reasoning:
                yield acp.update_agent_thought_text(event.text)
            else:
                yield acp.update_agent_message_text(event.text)
        elif isinstance(event, events.AssistantMessage):
            yield from self._answer(event)
        elif isinstance(event, events.ToolStarted):
            if event.call.id not in self._started:
                yield self.announce(event.call, event.summary)
            yield acp.update_tool_call(event.call.id, status="in_progress")
        elif isinstance(event, events.ToolOutput):
            yield from self._output(event)
        elif isinstance(event, events.ToolFinished):
            yield from self._finish(event)
        elif isinstance(event, events.TodoChanged):
            entries = [
                acp.plan_entry(item.text, status=STATUS[item.status])  # type: ignore[arg-type]
                for item in event.items
            ]
            yield acp.update_plan(entries)
        elif isinstance(event, events.ModeChanged):
            yield helpers.update_current_mode(event.mode)
        elif isinstance(event, events.UserMessage) and event.source == "user":
            if not self._has_title:
                self._has_title = True
                title = " ".join(event.text.split())[:80]
                yield SessionInfoUpdate(session_update="session_info_update", title=title)
        elif isinstance(event, events.Notice) and event.level != "info":
            yield acp.update_agent_thought_text(f"[{event.level}] {event.text}\n")

    def _answer(self, event: events.AssistantMessage) -> Iterator[Any]:
        if not self._is_streamed:
            if event.reasoning:
                yield acp.update_agent_thought_text(event.reasoning)
            if event.text:
                yield acp.update_agent_message_text(event.text)
        self._is_streamed = False
        conversation = self._session.agent.conversation
        price = conversation.usage.price
        yield UsageUpdate(
            session_update="usage_update",
            used=conversation.context_tokens,
            size=self._session.agent.model.context_tokens,
            cost=Cost(amount=price, currency="USD") if price else None,
        )

    def _output(self, event: events.ToolOutput) -> Iterator[Any]:
        """Send the output so far of a running call, not more often than an editor can show it."""
        text = self._outputs.get(event.call_id, "") + event.text
        self._outputs[event.call_id] = text[-MAX_SHOWN:]
        now = time.monotonic()
        if now < self._sent_at + OUTPUT_SECONDS or event.call_id not in self._started:
            return
        self._sent_at = now
        yield acp.update_tool_call(event.call_id, content=[_text(self._outputs[event.call_id])])

    def _finish(self, event: events.ToolFinished) -> Iterator[Any]:
        if not event.call_id:
            return
        self._outputs.pop(event.call_id, None)
        if self._started.pop(event.call_id, None) is None:  # refused before it ran
            call = _call_of(self._session, event.call_id)
            if call is None:
                return
            yield self.announce(call, call.name)
            del self._started[event.call_id]
        raw: dict[str, Any] = {"status": event.status}
        if event.exit_code is not None:
            raw["exitCode"] = event.exit_code
        diffs = diff_contents(event.diff, self._session.workspace.root)
        yield acp.update_tool_call(
            event.call_id,
            status="completed" if event.status == "ok" else "failed",
            content=diffs or [_text(event.output[:MAX_SHOWN])],
            raw_output=raw,
        )

    def _kind(self, call: events.ToolCall) -> str:
        tool = self._session.agent.tools.get(call.name)
        if call.name in SEARCHES:
            return "search"
        if call.name == "exit_plan_mode":
            return "switch_mode"
        arguments = _arguments(call)
        return KINDS[tool.access(arguments)] if tool and isinstance(arguments, dict) else "other"

    def _locations(self, call: events.ToolCall) -> list[ToolCallLocation]:
        tool = self._session.agent.tools.get(call.name)
        arguments = _arguments(call)
        if tool is None or not isinstance(arguments, dict):
            return []
        root = self._session.workspace.root
        return [ToolCallLocation(path=absolute(path, root)) for path in tool.paths(arguments)]


def absolute(path: str, root: str) -> str:
    """Return a path below the project's directory as an absolute one."""
    return path if path.startswith("/") else f"{root}/{path}"


def diff_contents(diff: str, root: str) -> list[Any]:
    """Return the unified diff of a file as the protocol has it: old and new text of each hunk.

    Args:
      diff: as tools make it: two lines of the file's name, then hunks; "" for none.
      root: directory of the project; the protocol's paths are absolute.
    """
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


def _call_of(session: InterfaceSession, call_id: str) -> events.ToolCall | None:
    """Return a call by its id, looked for from the end."""
    for event in reversed(session.agent.log.events):
        if isinstance(event, events.AssistantMessage):
            for call in event.tool_calls:
                if call.id == call_id:
                    return call
    return None
