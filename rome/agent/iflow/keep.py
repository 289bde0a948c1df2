"""What a compaction puts in place of the conversation: the keep-list, and words around a summary.

A summary is a model's word, and models leave things out. So the new context begins with what the
events say, word for word: the user's last request, the open items of the todo list, running jobs,
files that were changed, skills and sub-agents.
"""

from __future__ import annotations

from collections.abc import Sequence

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation, Entry

MAX_FILES = 200  # of each kind that are listed; the newest ones
MAX_HISTORIES = 20
MAX_PROMPT = 200  # characters of a sub-agent's task
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
_MARKS = {"pending": "[ ]", "in_progress": "[in progress]"}


def last_request(conversation: Conversation) -> str:
    """Return the user's last request, and what the user said since while the agent worked."""
    texts: list[str] = []
    for message in reversed(conversation.requests):
        texts.append(message.text)
        if message.source == "user":
            break
    return "\n\n".join(reversed(texts))


def keep_list(conversation: Conversation, request: str, history: str = "") -> str:
    """Return what is kept as text for the model; sections without content are left out.

    Args:
      conversation: of the session.
      request: the user's last one, as it is to stand here.
      history: file with what leaves the context now; "" for none.
    """
    read = [path for path in conversation.read_files if path not in conversation.changed_files]
    histories = [*conversation.histories, *([history] if history else [])]
    sections = {
        "The user's last request, word for word": [request],
        "Open items of the todo list": [
            f"- {_MARKS[item.status]} {item.text}"
            for item in conversation.todo
            if item.status != "done"
        ],
        "Background jobs that run": [
            f"- {job.job}: {job.command}" for job in conversation.jobs.values()
        ],
        "Files that were changed": _newest(list(conversation.changed_files)),
        "Files that were only read": _newest(read),
        "Skills in use": [f"- {name}" for name in conversation.skills],
        "The conversation before, whole, in files: search them for what is missing here": [
            f"- {path}" for path in histories[-MAX_HISTORIES:]
        ],
        "Sub-agents (go on with one by its id)": [
            _describe(started, is_working=started.id in conversation.subagents)
            for started in conversation.known_subagents.values()
        ],
    }
    return "\n\n".join(
        f"## {title}\n" + "\n".join(lines) for title, lines in sections.items() if any(lines)
    )


def _describe(started: events.SubagentStarted, *, is_working: bool) -> str:
    state = "works now" if is_working else "has ended"
    prompt = " ".join(started.prompt.split())[:MAX_PROMPT]
    return f"- {started.id} ({started.agent}, {state}): {prompt}"


def _newest(paths: Sequence[str]) -> list[str]:
    left_out = len(paths) - MAX_FILES
    lines = [f"- {path}" for path in paths[-MAX_FILES:]]
    return [f"- ({left_out} older ones)", *lines] if left_out > 0 else lines


def describe_steps(entries: Sequence[Entry], reason: str, characters: int) -> str:
    """Return what was done as a list of about so many characters, the newest steps.

    The last summary of a model, if there was one, comes first, and at most half of the whole.
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
