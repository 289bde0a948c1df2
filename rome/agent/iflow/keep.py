"""What a compaction never loses: the keep-list of a session.

A summary is a model's word, and models leave things out. So the new context begins with what the
events say, word for word: the user's last request, the open items of the todo list, running jobs,
files that were changed, skills and sub-agents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation

MAX_FILES = 200  # of each kind that are listed; the newest ones
MAX_HISTORIES = 20
MAX_PROMPT = 200  # characters of a sub-agent's task
_MARKS = {"pending": "[ ]", "in_progress": "[in progress]"}


def last_request(conversation: Conversation) -> str:
    """Return the user's last request, and what the user said since while the agent worked."""
    texts: list[str] = []
    for message in reversed(conversation.requests):
        texts.append(message.text)
        if message.source == "user":
            break
    return "\n\n".join(reversed(texts))


@dataclasses.dataclass
class KeepList:
    """What the events say of files, skills and sub-agents; the conversation has the rest.

    A rewind of the conversation takes back skills. Files and sub-agents are as they are in the
    world, and stay.

    Attributes:
      changed: paths of the files that were written, the newest last.
      subagents: id -> how each sub-agent began, the newest last.
      histories: files that hold what left the context, the newest last.
    """

    changed: dict[str, None] = dataclasses.field(default_factory=dict)
    subagents: dict[str, events.SubagentStarted] = dataclasses.field(default_factory=dict)
    histories: list[str] = dataclasses.field(default_factory=list)
    _skills: list[events.SkillLoaded] = dataclasses.field(default_factory=list)
    _folded: int = 0

    @property
    def skills(self) -> list[str]:
        """Return the names of the skills that were loaded, each once."""
        return list(dict.fromkeys(loaded.name for loaded in self._skills))

    def catch_up(self, happened: Sequence[events.Event]) -> None:
        """Take the events of a session, given whole, that were not taken yet."""
        for place in range(self._folded, len(happened)):
            self._take(happened[place])
        self._folded = len(happened)

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.ToolFinished):
            for path in event.changed:
                self.changed.pop(path, None)
                self.changed[path] = None
        elif isinstance(event, events.SkillLoaded):
            self._skills.append(event)
        elif isinstance(event, events.SubagentStarted):
            self.subagents.pop(event.id, None)
            self.subagents[event.id] = event
        elif isinstance(event, events.ContextCompacted):
            self.histories += [event.history] if event.history else []
        elif isinstance(event, events.Rewound) and event.conversation:
            while self._skills and self._skills[-1].number >= event.to:
                self._skills.pop()

    def render(
        self,
        conversation: Conversation,
        *,
        request: str | None = None,
        history: str = "",
    ) -> str:
        """Return the keep-list as text for the model; sections without content are left out.

        Args:
          conversation: of the session.
          request: stands for the user's last request; None: that request itself.
          history: file with what leaves the context now; "" for none.
        """
        if request is None:
            request = last_request(conversation)
        todo = [
            f"- {_MARKS[item.status]} {item.text}"
            for item in conversation.todo
            if item.status != "done"
        ]
        jobs = [f"- {job.job}: {job.command}" for job in conversation.jobs.values()]
        subagents = [
            _describe(started, is_working=started.id in conversation.subagents)
            for started in self.subagents.values()
        ]
        histories = [*self.histories, *([history] if history else [])]
        sections = {
            "The user's last request, word for word": [request],
            "Open items of the todo list": todo,
            "Background jobs that run": jobs,
            "Files that were changed": _newest(list(self.changed)),
            "Files that were only read": _newest(
                [path for path in conversation.read_files if path not in self.changed]
            ),
            "Skills in use": [f"- {name}" for name in self.skills],
            "The conversation before, whole, in files: search them for what is missing here": [
                f"- {path}" for path in histories[-MAX_HISTORIES:]
            ],
            "Sub-agents (go on with one by its id)": subagents,
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
