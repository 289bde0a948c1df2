"""What holds after the events of a session: the context of the model, and the agent's state.

`Conversation.add` takes one event at a time in constant time, except for a compaction and a rewind.
Nothing of it is stored: the same events always give the same conversation, so a session that was
killed goes on from its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rome.agent.iflow import events
from rome.agent.iflow.events import NO_USAGE, Event, TodoItem, ToolCall, Usage
from rome.agent.messages import Message

NO_RESULT = "[This call has no result yet.]"
KILLED = "the process ended while it ran"


@dataclasses.dataclass(eq=False)
class Entry:
    """One message of the context."""

    # Of the event that brought it; a result has that of the answer with its call, since neither
    # stays in a context without the other
    number: int
    message: Message  # as the model is shown it
    call: ToolCall | None = None  # that a result belongs to; None for other messages
    finished: events.ToolFinished | None = None  # the result, once it is there
    # Says which file holds the result instead, where it was moved
    moved: events.OutputMoved | None = None
    source: str = ""  # of a user's message; "summary" for that of a compaction


class Conversation:
    """The state of a session."""

    def __init__(self) -> None:
        self.session = ""  # id of it; "" before it started
        self.system = ""  # the system text
        self.model = ""
        self.mode = "default"  # of approval
        self.turn = 0  # number of the newest turn
        self.is_working = False  # whether a turn is open
        self.turn_answers = 0  # of the model in the newest turn
        self.turn_usage = NO_USAGE  # of the newest turn, sub-agents included
        self.usage = NO_USAGE  # of the whole session, sub-agents included
        # Of the context at the last answer, itself included, or after a compaction
        self.context_tokens = 0
        self.open_calls: dict[str, ToolCall] = {}  # calls without a result, by id
        # Approvals and questions without an answer, by id
        self.open_requests: dict[str, Event] = {}
        # path -> (size, time of change) of each file as the agent last saw it, the newest last
        # After a rewind a file is read again before it is changed
        self.read_files: dict[str, tuple[int, float]] = {}
        self.jobs: dict[str, events.JobStarted] = {}  # background commands that run, by id
        self.subagents: dict[str, events.SubagentStarted] = {}  # sub-agents that run, by id
        # As the world is, whatever is rewound, the newest last: how each sub-agent began, by its
        # id; files that were written; files that hold what left the context
        self.known_subagents: dict[str, events.SubagentStarted] = {}
        self.changed_files: dict[str, None] = {}
        self.histories: list[str] = []
        # The messages since each compaction, by its number; the newest are the context
        self._views: dict[int, list[Entry]] = {-1: []}
        self._results: dict[str, Entry] = {}  # by id of the call
        self._checkpoints: list[events.CheckpointTaken] = []
        # What a rewind takes back, in the order of time.
        self._requests: list[events.UserMessage] = []
        self._todos: list[events.TodoChanged] = []
        self._skills: list[events.SkillLoaded] = []

    @classmethod
    def of(cls, given: Iterable[Event]) -> Conversation:
        """Return the conversation of some events."""
        conversation = cls()
        for event in given:
            conversation.add(event)
        return conversation

    # -- what it says

    @property
    def entries(self) -> list[Entry]:
        """Return the messages of the context, the system text apart; not to be changed."""
        return next(reversed(self._views.values()))

    @property
    def messages(self) -> list[Message]:
        """Return what the model is shown: the system text, and every message of the context."""
        system = [Message("system", self.system)] if self.system else []
        return [*system, *(entry.message for entry in self.entries)]

    @property
    def todo(self) -> tuple[TodoItem, ...]:
        """Return the list of what is to do."""
        return self._todos[-1].items if self._todos else ()

    @property
    def skills(self) -> list[str]:
        """Return the names of the skills that were loaded, each once."""
        return list(dict.fromkeys(loaded.name for loaded in self._skills))

    @property
    def requests(self) -> tuple[events.UserMessage, ...]:
        """Return the messages that the user wrote: those that one may rewind to."""
        return tuple(self._requests)

    def checkpoint_of(self, number: int) -> str:
        """Return the checkpoint of the files as they were at an event; "" where none is needed.

        One is taken before the first change after a message, so it is the first one since then.
        """
        later = (taken.checkpoint for taken in self._checkpoints if taken.number > number)
        return next(later, "")

    # -- what happened

    def add(self, event: Event) -> None:
        """Take one event; kinds that change nothing here are passed over."""
        match event:
            case events.SessionStarted():
                self.session = event.session
                self.system = event.system
                self.model = event.model
                self.mode = event.mode
            case events.ModeChanged():
                self.mode = event.mode
            case events.ModelChanged():
                self.model = event.model
            case events.TurnStarted():
                self.turn = event.turn
                self.is_working = True
                self.turn_answers = 0
                self.turn_usage = NO_USAGE
            case events.TurnFinished():
                self.is_working = False
            case events.UserMessage():
                self._take_user_message(event)
            case events.AssistantMessage():
                self._take_answer(event)
            case events.ToolFinished():
                self._take_result(event)
            case events.OutputMoved():
                entry = self._results.get(event.call_id)
                if entry is not None and entry.moved is None:
                    entry.moved = event
                    entry.message = _result_message(event.call_id, moved_text(event))
            case events.ContextCompacted():
                self._compact(event)
            case events.Rewound():
                self._rewind(event)
            case events.FileSeen():
                self.read_files.pop(event.path, None)
                self.read_files[event.path] = (event.size, event.changed)
            case events.TodoChanged():
                self._todos.append(event)
            case events.SkillLoaded():
                self._skills.append(event)
            case events.CheckpointTaken():
                self._checkpoints.append(event)
            case events.SubagentStarted():
                self.subagents[event.id] = event
                self.known_subagents.pop(event.id, None)
                self.known_subagents[event.id] = event
            case events.SubagentFinished():
                self.subagents.pop(event.id, None)
                self._spend(event.usage)
            case events.JobStarted():
                self.jobs[event.job] = event
            case events.JobFinished():
                self.jobs.pop(event.job, None)
            case events.ApprovalRequested() | events.QuestionAsked():
                self.open_requests[event.request] = event
            case events.ApprovalAnswered() | events.QuestionAnswered():
                self.open_requests.pop(event.request, None)

    def _take_user_message(self, event: events.UserMessage) -> None:
        text = event.text
        if event.source in ("user", "steer"):
            self._requests.append(event)
        else:
            text = f"<system-reminder>\n{text}\n</system-reminder>"
        self.entries.append(Entry(event.number, Message("user", text), source=event.source))

    def _take_answer(self, event: events.AssistantMessage) -> None:
        said = Message("assistant", event.text, event.reasoning, event.tool_calls)
        self.entries.append(Entry(event.number, said))
        for call in event.tool_calls:
            entry = Entry(event.number, _result_message(call.id, NO_RESULT), call)
            self.entries.append(entry)
            self._results[call.id] = entry
            self.open_calls[call.id] = call
        self.turn_answers += 1
        self.context_tokens = event.usage.prompt + event.usage.completion
        self._spend(event.usage)

    def _take_result(self, event: events.ToolFinished) -> None:
        for path in event.changed:
            self.changed_files.pop(path, None)
            self.changed_files[path] = None
        if not event.call_id:
            self._finish_answer(event)
            return
        self.open_calls.pop(event.call_id, None)
        entry = self._results.get(event.call_id)
        if entry is not None and entry.finished is None:
            entry.finished = event
            entry.message = _result_message(event.call_id, event.output)

    def _finish_answer(self, event: events.ToolFinished) -> None:
        """Take one result of a whole answer, such as an environment gives: it replaces all."""
        open_calls = list(self.open_calls)
        first = next(iter(open_calls), "")
        entries = self.entries
        while entries and entries[-1].call is not None and entries[-1].call.id in self.open_calls:
            entries.pop()
        call = self.open_calls.get(first)
        entry = Entry(event.number, _result_message(first, event.output), call, event)
        if call is not None:
            entry.number = self._results[first].number
            self._results[first] = entry
        self.entries.append(entry)
        self.open_calls.clear()

    def _compact(self, event: events.ContextCompacted) -> None:
        summary = Entry(event.number, Message("user", event.summary), source="summary")
        kept = [
            entry
            for entry in self.entries
            if entry.number >= event.kept_from and entry.source != "summary"
        ]
        self._views[event.number] = [summary, *kept]
        self.histories += [event.history] if event.history else []
        self.context_tokens = event.tokens_after
        self._spend(event.usage)

    def _rewind(self, event: events.Rewound) -> None:
        self.read_files.clear()
        if not event.conversation:
            return
        while max(self._views) >= event.to:
            self._views.popitem()
        kept = [entry for entry in self.entries if entry.number < event.to]
        self._views[max(self._views)] = kept
        for entry in kept:
            if entry.moved is not None and entry.moved.number >= event.to:
                assert entry.call is not None and entry.finished is not None
                entry.moved = None
                entry.message = _result_message(entry.call.id, entry.finished.output)
        histories: tuple[list[Any], ...] = (self._requests, self._todos, self._skills)
        for history in histories:
            while history and history[-1].number >= event.to:
                history.pop()

    def _spend(self, usage: Usage) -> None:
        self.usage += usage
        self.turn_usage += usage


def moved_text(event: events.OutputMoved) -> str:
    """Return what stands in the context in place of an output that was moved to a file."""
    return f"[This output of {event.tokens} tokens was moved to {event.file}; read it there.]"


def _result_message(call_id: str, output: str) -> Message:
    return Message("tool", output, tool_call_id=call_id)


def events_after_a_kill(conversation: Conversation) -> list[Event]:
    """Return the events that end what a killed process left open: calls, requests, jobs, the turn.

    Whether a call had its effect before the kill is not known, and the model is told so.
    """
    lost: list[Event] = []
    for call in conversation.open_calls:
        output = (
            f"[This call has no result: {KILLED}. It may have had its effect, or a part of it.]"
        )
        lost.append(events.ToolFinished(call_id=call, output=output, status="cancelled"))
    for request, asked in conversation.open_requests.items():
        if isinstance(asked, events.ApprovalRequested):
            lost.append(
                events.ApprovalAnswered(request=request, decision="stop", note=KILLED, by="timeout")
            )
        else:
            lost.append(events.QuestionAnswered(request=request, answer=""))
    for subagent in conversation.subagents:
        result = f"{KILLED}; go on with it by its id"
        lost.append(events.SubagentFinished(id=subagent, outcome="aborted", result=result))
    lost += [events.JobFinished(job=job) for job in conversation.jobs]
    if conversation.is_working:
        usage = conversation.turn_usage
        lost.append(events.TurnFinished(outcome="aborted", reason=KILLED, usage=usage))
    return lost
