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
from rome.agent.messages import Call, Message

NO_RESULT = "[This call has no result yet.]"
KILLED = "the process ended while it ran"


@dataclasses.dataclass(eq=False)
class Entry:
    """One message of the context.

    Attributes:
      number: of the event that brought it; a result has that of the answer with its call, since
        neither stays in a context without the other.
      message: as the model is shown it.
      call: that a result belongs to; None for other messages.
      finished: the result, once it is there.
      moved: says which file holds the result instead, where it was moved.
      source: of a user's message; "summary" for that of a compaction.
    """

    number: int
    message: Message
    call: ToolCall | None = None
    finished: events.ToolFinished | None = None
    moved: events.OutputMoved | None = None
    source: str = ""


@dataclasses.dataclass
class _View:
    """The context since a compaction; `number` is that of the compaction."""

    number: int
    entries: list[Entry]


class Conversation:
    """The state of a session.

    Attributes:
      session: id of it; "" before it started.
      system: the system text.
      directory: where the agent works.
      model: name of the model.
      mode: of approval.
      turn: number of the newest turn.
      is_working: whether a turn is open.
      turn_answers: of the model in the newest turn.
      turn_usage: of the newest turn, sub-agents included.
      usage: of the whole session, sub-agents included.
      context_tokens: of the context at the last answer, itself included, or after a compaction.
      open_calls: calls without a result, by id.
      open_requests: approvals and questions without an answer, by id.
      read_files: path -> (size, time of change) of each file as the agent last saw it, the newest
        last. After a rewind a file is read again before it is changed.
      jobs: background commands that run, by id.
      subagents: sub-agents that run, by id.
    """

    def __init__(self) -> None:
        self.session = ""
        self.system = ""
        self.directory = ""
        self.model = ""
        self.mode = "default"
        self.turn = 0
        self.is_working = False
        self.turn_answers = 0
        self.turn_usage = NO_USAGE
        self.usage = NO_USAGE
        self.context_tokens = 0
        self.open_calls: dict[str, ToolCall] = {}
        self.open_requests: dict[str, Event] = {}
        self.read_files: dict[str, tuple[int, float]] = {}
        self.jobs: dict[str, events.JobStarted] = {}
        self.subagents: dict[str, events.SubagentStarted] = {}
        self._views = [_View(-1, [])]
        self._results: dict[str, Entry] = {}  # by id of the call
        self._checkpoints: list[events.CheckpointTaken] = []
        # What a rewind takes back, in the order of time.
        self._requests: list[events.UserMessage] = []
        self._todos: list[events.TodoChanged] = []

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
        return self._views[-1].entries

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
    def last_request(self) -> events.UserMessage | None:
        """Return the newest message that the user wrote."""
        return self._requests[-1] if self._requests else None

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
        take = getattr(self, f"_on_{event.kind}", None)
        if take is not None:
            take(event)

    def _on_session_started(self, event: events.SessionStarted) -> None:
        self.session = event.session
        self.system = event.system
        self.directory = event.directory
        self.model = event.model
        self.mode = event.mode

    def _on_mode_changed(self, event: events.ModeChanged) -> None:
        self.mode = event.mode

    def _on_model_changed(self, event: events.ModelChanged) -> None:
        self.model = event.model

    def _on_turn_started(self, event: events.TurnStarted) -> None:
        self.turn = event.turn
        self.is_working = True
        self.turn_answers = 0
        self.turn_usage = NO_USAGE

    def _on_turn_finished(self, event: events.TurnFinished) -> None:
        self.is_working = False

    def _on_user_message(self, event: events.UserMessage) -> None:
        text = event.text
        if event.source in ("user", "steer"):
            self._requests.append(event)
        else:
            text = f"<system-reminder>\n{text}\n</system-reminder>"
        self.entries.append(Entry(event.number, Message("user", text), source=event.source))

    def _on_assistant_message(self, event: events.AssistantMessage) -> None:
        calls = tuple(Call(call.id, call.name, call.arguments) for call in event.tool_calls)
        said = Message("assistant", event.text, event.reasoning, calls)
        self.entries.append(Entry(event.number, said))
        for call in event.tool_calls:
            entry = Entry(event.number, _result_message(call.id, NO_RESULT), call)
            self.entries.append(entry)
            self._results[call.id] = entry
            self.open_calls[call.id] = call
        self.turn_answers += 1
        self.context_tokens = event.usage.prompt + event.usage.completion
        self._spend(event.usage)

    def _on_tool_finished(self, event: events.ToolFinished) -> None:
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

    def _on_output_moved(self, event: events.OutputMoved) -> None:
        entry = self._results.get(event.call_id)
        if entry is not None and entry.moved is None:
            entry.moved = event
            entry.message = _result_message(event.call_id, moved_text(event))

    def _on_context_compacted(self, event: events.ContextCompacted) -> None:
        summary = Entry(event.number, Message("user", event.summary), source="summary")
        kept = [
            entry
            for entry in self.entries
            if entry.number >= event.kept_from and entry.source != "summary"
        ]
        self._views.append(_View(event.number, [summary, *kept]))
        self.context_tokens = event.tokens_after
        self._spend(event.usage)

    def _on_file_seen(self, event: events.FileSeen) -> None:
        self.read_files.pop(event.path, None)
        self.read_files[event.path] = (event.size, event.changed)

    def _on_rewound(self, event: events.Rewound) -> None:
        self.read_files.clear()
        if not event.conversation:
            return
        while self._views[-1].number >= event.to:
            self._views.pop()
        kept = [entry for entry in self.entries if entry.number < event.to]
        self._views[-1].entries = kept
        for entry in kept:
            if entry.moved is not None and entry.moved.number >= event.to:
                assert entry.call is not None and entry.finished is not None
                entry.moved = None
                entry.message = _result_message(entry.call.id, entry.finished.output)
        histories: tuple[list[Any], ...] = (self._requests, self._todos)
        for history in histories:
            while history and history[-1].number >= event.to:
                history.pop()

    def _on_todo_changed(self, event: events.TodoChanged) -> None:
        self._todos.append(event)

    def _on_subagent_started(self, event: events.SubagentStarted) -> None:
        self.subagents[event.id] = event

    def _on_subagent_finished(self, event: events.SubagentFinished) -> None:
        self.subagents.pop(event.id, None)
        self._spend(event.usage)

    def _on_job_started(self, event: events.JobStarted) -> None:
        self.jobs[event.job] = event

    def _on_job_finished(self, event: events.JobFinished) -> None:
        self.jobs.pop(event.job, None)

    def _on_approval_requested(
        self, event: events.ApprovalRequested | events.QuestionAsked
    ) -> None:
        self.open_requests[event.request] = event

    _on_question_asked = _on_approval_requested

    def _on_approval_answered(
        self, event: events.ApprovalAnswered | events.QuestionAnswered
    ) -> None:
        self.open_requests.pop(event.request, None)

    _on_question_answered = _on_approval_answered

    def _on_checkpoint_taken(self, event: events.CheckpointTaken) -> None:
        self._checkpoints.append(event)

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
