"""The words of a compaction: what the model is asked, and what stands where it gives no summary."""

from __future__ import annotations

from collections.abc import Sequence

from rome.agent.iflow.conversation import Entry

HEAD = (
    "The conversation so far was too long and is replaced by this message. What follows is a"
    " record, not a new request: go on with the work where it stands."
)
INSTRUCTION = (
    "Your context is nearly full. Write a summary of the work so far, for yourself: it will replace"
    " the conversation above. State the goal, what was done and found (names, paths, numbers,"
    " decisions and errors exactly), what does not work, and the next step. The user's last"
    " request, the todo list, jobs, files, skills and sub-agents are kept beside it; do not repeat"
    " them. Answer with the summary only, without tool calls."
)
MAX_STEP_CHARACTERS = 300  # of one step in a summary that no model wrote
SUMMARY = "## Summary of the work so far"
STEPS = "## What was done since, as it stands in the record"
NO_SUMMARY = "(No summary could be written: {reason}.)"


def describe_steps(entries: Sequence[Entry], reason: str, characters: int) -> str:
    """Return what was done as a list, where no model summarised it; the newest steps are kept.

    The last summary of a model, if there was one, comes first, and at most half of the whole.

    Args:
      entries: of the context.
      reason: why there is no summary.
      characters: of the whole, about.
    """
    step = min(MAX_STEP_CHARACTERS, characters // 6)
    lines: list[str] = []
    written = ""
    for entry in entries:
        message = entry.message
        if entry.source == "summary":
            written, lines = _parts_of(message.content)
        elif message.role == "user":
            lines.append(f"- asked: {_short(message.content, step)}")
        elif message.role == "tool":
            lines.append(f"  result: {_short(message.content, step // 2)}")
        else:
            if message.content:
                lines.append(f"- said: {_short(message.content, step)}")
            calls = [f"- called {c.name} {_short(c.arguments, step)}" for c in message.tool_calls]
            lines += calls
    written = written[: characters // 2]
    shown = _last_lines(lines, characters - len(written))
    return "\n".join(filter(None, [written, STEPS, NO_SUMMARY.format(reason=reason), *shown]))


def transcript(entries: Sequence[Entry]) -> str:
    """Return messages as a text that can be searched; outputs are whole, also those that moved."""
    parts = []
    for entry in entries:
        message = entry.message
        if entry.source == "summary":
            continue
        output = entry.finished.output if entry.finished is not None else message.content
        calls = [f"[call {call.name} {call.arguments}]" for call in message.tool_calls]
        role = message.role if message.role != "tool" else "result"
        parts.append("\n".join([f"== {role}", *filter(None, [output, *calls])]))
    return "\n\n".join(parts) + "\n"


def _parts_of(text: str) -> tuple[str, list[str]]:
    """Return what a model wrote in an earlier summary, and the lines of steps in it."""
    before, _, steps = text.partition(f"\n{STEPS}")
    _, found, written = before.partition(f"\n{SUMMARY}")
    lines = [line for line in steps.splitlines() if line.startswith(("- ", "  "))]
    return (SUMMARY + written.rstrip() if found else ""), lines


def _last_lines(lines: Sequence[str], characters: int) -> list[str]:
    shown: list[str] = []
    for line in reversed(lines):
        characters -= len(line) + 1
        if characters < 0:
            break
        shown.append(line)
    if len(shown) < len(lines):
        shown.append("- (earlier steps are left out)")
    return shown[::-1]


def _short(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
