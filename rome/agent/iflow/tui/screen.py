"""Shows the events of a session on a terminal, as text that scrolls away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.text import Text

from rome.agent.iflow import events
from rome.agent.iflow.events import Event
from rome.agent.iflow.protocols.mcp_tools import printable

OUTPUT_LINES = 6  # that are shown of a call's output
USER_LINES = 12  # of a message of the user
HEAD_LINES = 2  # of these, from its beginning
DIFF_LINES = 60
# Of a todo list, in a terminal that has such signs and in one that has not.
MARKS = {"pending": "☐", "in_progress": "▶", "done": "☑"}
PLAIN_MARKS = {"pending": "[ ]", "in_progress": "[>]", "done": "[x]"}
STYLES = {"info": "dim", "warning": "yellow", "error": "red"}


# Kind of event -> how it is shown on one line.
LINES: Mapping[str, Callable[[Any], str]] = {
    "retried": lambda it: f"the model did not answer ({it.reason}); again in {it.wait:.0f} s",
    "mode_changed": lambda it: f"mode: {it.mode}",
    "model_changed": lambda it: f"model: {it.model}",
    "compaction_started": lambda it: f"the context of {it.tokens} tokens is being summarised",
    "subagent_started": lambda it: f"sub-agent {it.agent} {it.id}: {_one_line(it.prompt)}",
    "subagent_finished": lambda it: f"sub-agent {it.id}: {it.outcome}",
    "job_started": lambda it: f"job {it.job}: {it.command}",
    "job_finished": lambda it: f"job {it.job} ended with status {it.exit_code}",
    "skill_loaded": lambda it: f"skill {it.name}",
    "supervisor_judged": lambda it: f"supervisor: {it.verdict}: {it.reason}",
    "feedback_given": lambda it: f"feedback: {it.verdict}",
}
YELLOW = ("retried", "supervisor_judged")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


class _LeftHeading(Heading):
    """A heading that begins at the left, as the text below it does."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _LeftMarkdown(Markdown):
    elements: ClassVar[dict[str, Any]] = {**Markdown.elements, "heading_open": _LeftHeading}


class MarkdownBlocks:
    """Cuts a text that comes in pieces into blocks, at blank lines outside of fenced code."""

    def __init__(self) -> None:
        self.rest = ""  # the block that is not whole yet

    def feed(self, text: str) -> list[str]:
        """Take a piece; return the blocks that are whole with it."""
        self.rest += text
        blocks = []
        start = place = 0
        fence = ""
        while (end := self.rest.find("\n", place)) >= 0:
            line = self.rest[place:end]
            found = _FENCE.match(line)
            if found and not fence:
                fence = found[1]
            elif fence and line.strip().startswith(fence) and not line.strip(fence[0] + " "):
                fence = ""
            place = end + 1
            if not line.strip() and not fence:
                block = self.rest[start:place]
                if block.strip():
                    blocks.append(block)
                start = place
        self.rest = self.rest[start:]
        return blocks

    def finish(self) -> list[str]:
        """Return what is left, as one block."""
        left, self.rest = self.rest, ""
        return [left] if left.strip() else []


class Screen:
    """Prints what happens.

    What a model, a tool or a file wrote is shown without control characters: it can neither move
    the cursor nor change the title of the window.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.is_plain = not console.is_terminal or console.is_dumb_terminal
        self.tail = ""  # of an answer whose block is not whole yet; an interface may show it live
        self.doing = ""  # what runs now, on one line
        self._blocks = MarkdownBlocks()
        self._is_streamed = False
        self._summaries: dict[str, str] = {}  # of the calls that run
        self._has_todo = False  # whether the last call changed the list, which was shown then
        self._is_after_call = False  # whether an answer is parted from what stands above it
        self._shown_diffs: set[str] = set()  # ids of calls whose diff was shown for approval

    def take(self, event: Event) -> None:
        """Show an event; kinds that people need not see are passed over."""
        show = getattr(self, f"_on_{event.kind}", None)
        if show is not None:
            show(event)
        elif event.kind in LINES:
            self.say(LINES[event.kind](event), "yellow" if event.kind in YELLOW else "dim")

    def say(self, text: str, style: str = "dim") -> None:
        """Print one line of the program's own."""
        self.console.print(Text(printable(text), style=style))

    def print_diff(self, diff: str) -> None:
        """Print a unified diff in colours; a long one is cut."""
        lines = printable(diff).splitlines()
        for line in lines[:DIFF_LINES]:
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
            self.console.print(Text(f"  {line}", style=style))
        if len(lines) > DIFF_LINES:
            self.say(f"  ... {len(lines) - DIFF_LINES} more lines")

    # -- events

    def _on_user_message(self, event: events.UserMessage) -> None:
        if event.source in ("user", "steer"):
            lines = printable(event.text).split("\n")  # a file that was brought in may be long
            if len(lines) > USER_LINES:
                lines[USER_LINES:] = [f"... {len(lines) - USER_LINES} more lines"]
            self.console.print()
            self.console.print(Text("> " + "\n".join(lines), style="bold cyan"))
        elif event.source == "hook":
            self.say(f"hook: {_one_line(event.text)}")

    def _on_text_delta(self, event: events.TextDelta) -> None:
        if event.is_reasoning:
            self.doing = "thinking"
            return
        self.doing = "writing"
        self._is_streamed = True
        for block in self._blocks.feed(event.text):
            self._markdown(block)
        self.tail = self._blocks.rest

    def _on_assistant_message(self, event: events.AssistantMessage) -> None:
        blocks = self._blocks.finish()
        self.tail = ""
        if not self._is_streamed and event.text.strip():
            blocks = [event.text]
        for block in blocks:
            self._markdown(block)
        self._is_streamed = False
        self.doing = ""
        if event.malformed:
            self.say(f"a call could not be read: {event.malformed}", "yellow")

    def _markdown(self, text: str) -> None:
        if self._is_after_call:
            self.console.print()
        self._is_after_call = False
        shown = printable(text)
        if self.is_plain:
            self.console.print(Text(shown.strip("\n")))
        else:
            self.console.print(_LeftMarkdown(shown, code_theme="ansi_dark"))

    def _on_tool_started(self, event: events.ToolStarted) -> None:
        summary = event.summary or event.call.name
        self._summaries[event.call.id] = summary
        self._has_todo = False
        self.doing = _one_line(summary)
        mark = "*" if self.is_plain else "●"
        self.console.print(Text(f"{mark} {_one_line(summary)}", style="bold"))

    def _on_tool_output(self, event: events.ToolOutput) -> None:
        """Note the newest line of a call that runs; the whole is shown at its end."""
        lines = printable(event.text).split("\n")
        newest = next((line for line in reversed(lines) if line.strip()), "")
        if newest and event.call_id in self._summaries:
            self.doing = f"{_one_line(self._summaries[event.call_id])[:40]}: {newest[:200]}"

    def _on_tool_finished(self, event: events.ToolFinished) -> None:
        self._is_after_call = True
        self._summaries.pop(event.call_id, None)
        self.doing = next(iter(self._summaries.values()), "")
        if self._has_todo and event.status == "ok":
            return
        if event.diff and event.status == "ok":
            if event.call_id not in self._shown_diffs:
                self.print_diff(event.diff)
            return
        style = {"ok": "dim", "error": "red", "denied": "yellow"}.get(event.status, "yellow")
        lines = printable(event.output).splitlines() or ["(no output)"]
        if len(lines) > OUTPUT_LINES:  # its end says most: what failed, how many
            left_out = len(lines) - OUTPUT_LINES
            lines[HEAD_LINES : HEAD_LINES + left_out] = [f"... {left_out} more lines"]
        for line in lines:
            self.console.print(Text(f"  {line[:500]}", style=style))
        if event.exit_code:
            self.say(f"  status {event.exit_code}, {event.seconds:.1f} s", style)

    def _on_approval_requested(self, event: events.ApprovalRequested) -> None:
        summary = event.summary or f"{event.call.name} {event.call.arguments}"
        self.console.print(Text(f"? {printable(summary)}", style="bold yellow"))
        if event.diff:
            self._shown_diffs.add(event.call.id)
            self.print_diff(event.diff)
        elif not event.summary:
            self.say(f"  {_pretty(event.call.arguments)}")
        if event.reason:
            self.say(f"  asked because: {event.reason}")

    def _on_question_asked(self, event: events.QuestionAsked) -> None:
        self.console.print(Text(f"? {printable(event.question)}", style="bold yellow"))
        for number, choice in enumerate(event.choices, 1):
            self.console.print(Text(f"  {number}. {printable(choice)}"))

    def _on_todo_changed(self, event: events.TodoChanged) -> None:
        self._has_todo = True
        marks = PLAIN_MARKS if self.is_plain else MARKS
        for item in event.items:
            style = {"done": "dim strike", "in_progress": "bold"}.get(item.status, "")
            line = Text(f"  {marks[item.status]} ")
            self.console.print(line.append(printable(item.text), style=style))

    def _on_turn_finished(self, event: events.TurnFinished) -> None:
        self.doing = ""
        self.tail = ""
        for block in self._blocks.finish():  # of an answer that was cut off
            self._markdown(block)
        spent = event.usage.prompt + event.usage.completion
        price = f", {event.usage.price:.4g}" if event.usage.price else ""
        if event.outcome == "finished":
            self.say(f"{event.seconds:.1f} s, {spent:,} tokens{price}")
        else:
            self.say(f"stopped ({event.outcome}): {event.reason}", "red")

    def _on_notice(self, event: events.Notice) -> None:
        self.say(event.text, STYLES[event.level])

    def _on_context_compacted(self, event: events.ContextCompacted) -> None:
        how = f", without the model: {event.fallback}" if event.fallback else ""
        self.say(f"context: {event.tokens_before} -> {event.tokens_after} tokens{how}")

    def _on_rewound(self, event: events.Rewound) -> None:
        parts = [name for name in ("conversation", "files") if getattr(event, name)]
        self.say(f"went back: {' and '.join(parts)}")


def _one_line(text: str) -> str:
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= 200 else f"{shown[:199]}…"


def _pretty(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), indent=1, ensure_ascii=False)[:2000]
    except ValueError:
        return arguments[:2000]
