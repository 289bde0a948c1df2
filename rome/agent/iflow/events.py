"""The events of a session: what happened, in order, and nothing else.

A session is a file of events, one JSON object a line, which is only ever appended to. It is what an
interface shows, what `--output-format stream-json` prints, what `--resume` reads and what the
record of an episode is made of. An event is never changed: a rewind, a compaction and a correction
are events of their own, and `rome.agent.iflow.conversation` derives what holds after them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

Decision = Literal["allow", "deny", "stop"]
Outcome = Literal["finished", "usage", "infrastructure", "limit", "aborted"]
EXIT_CODES: Mapping[str, int] = {
    "finished": 0,
    "usage": 1,
    "infrastructure": 2,
    "limit": 3,
    "aborted": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One event.

    Attributes:
      number: of the event in its session, from 0; -1 until it is logged.
      at: when it happened, in seconds since 1970; 0 until it is logged.
      kind: its name in the file.
      is_stored: whether it goes into the file. What is not, only informs interfaces.
    """

    number: int = -1
    at: float = 0.0
    kind: ClassVar[str] = ""
    is_stored: ClassVar[bool] = True

    def to_json(self) -> dict[str, Any]:
        """Return the event as it stands in a session file."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


KINDS: dict[str, type[Event]] = {}
E = TypeVar("E", bound=Event)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def event(kind: str, *, is_stored: bool = True) -> Callable[[type[E]], type[E]]:
    """Return a decorator that makes a class an event of that kind."""

    def decorate(cls: type[E]) -> type[E]:
        made: type[E] = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        made.kind = kind
        made.is_stored = is_stored
        KINDS[kind] = made
        return made

    return decorate


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the model made.

    Attributes:
      id: unique in the session.
      name: of the tool.
      arguments: JSON text, as it was written.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens and price of model calls.

    Attributes:
      prompt: tokens read, those from a cache included.
      completion: tokens written.
      cached: of `prompt`, read from a cache.
      price: in the currency of the configured prices; 0 where there are none.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    price: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.price + other.price,
        )


NO_USAGE = Usage()


@dataclasses.dataclass(frozen=True)
class TodoItem:
    """One line of the agent's list of what is to do."""

    text: str
    status: Literal["pending", "in_progress", "done"] = "pending"


# -- the session


@event("session_started")
class SessionStarted(Event):
    """A session begins, or is taken up again by another process (`resumed`).

    Attributes:
      session: its id.
      agent: type of a sub-agent; "" for the main agent.
      parent: id of the session that started a sub-agent; "" for none.
      directory: where it works.
      model: name of the model.
      mode: of approval.
      system: the system text, whole.
      tools: names of the tools.
      schemas: of the tools, as the model is shown them.
      version: of this project.
      resumed: whether events of an earlier process come before.
    """

    session: str
    directory: str
    model: str
    mode: str
    system: str
    tools: tuple[str, ...] = ()
    schemas: tuple[dict[str, Any], ...] = ()
    agent: str = ""
    parent: str = ""
    version: str = ""
    resumed: bool = False


@event("session_ended")
class SessionEnded(Event):
    """The process ends the session in order; a killed one leaves no such event."""

    outcome: Outcome


@event("mode_changed")
class ModeChanged(Event):
    """The mode of approval is another one: plan, default, accept_edits or yolo."""

    mode: str


@event("model_changed")
class ModelChanged(Event):
    """Another model answers from now on."""

    model: str


# -- turns


@event("user_message")
class UserMessage(Event):
    """Text that the model reads as the user's.

    Attributes:
      text: of the message.
      source: "user"; "steer" (sent while the agent worked); "hook", "reminder" and "notification"
        (of the program: a hook's words, a file that changed outside, a job that ended).
    """

    text: str
    source: Literal["user", "steer", "hook", "reminder", "notification"] = "user"


@event("turn_started")
class TurnStarted(Event):
    """The agent begins to work on what the user said; `turn` counts from 1."""

    turn: int


@event("text_delta", is_stored=False)
class TextDelta(Event):
    """A piece of an answer that is being written; `AssistantMessage` has the whole."""

    text: str
    is_reasoning: bool = False


@event("assistant_message")
class AssistantMessage(Event):
    """An answer of the model.

    Attributes:
      text: what it says.
      reasoning: its thoughts.
      tool_calls: its calls, in order.
      finish: "stop", "tool_calls" or "length".
      usage: of this answer.
      chunk: number of its chunk where a session of tokens keeps it; -1 for none.
      malformed: why a call in it could not be read; "" where all could.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Literal["stop", "tool_calls", "length"] = "stop"
    usage: Usage = NO_USAGE
    chunk: int = -1
    malformed: str = ""


@event("tool_started")
class ToolStarted(Event):
    """A call is being run, after hooks and approval.

    Attributes:
      call: as it is run; a hook may have changed its arguments.
      summary: one line for people, such as "Edit src/main.py".
    """

    call: ToolCall
    summary: str = ""


@event("tool_output", is_stored=False)
class ToolOutput(Event):
    """A piece of the output of a call that still runs."""

    call_id: str
    text: str


@event("file_seen")
class FileSeen(Event):
    """The agent read or wrote a file; it may change it as long as the file is in this state.

    Attributes:
      path: absolute.
      size: in bytes.
      changed: time of its last change, in seconds.
    """

    path: str
    size: int
    changed: float


@event("tool_finished")
class ToolFinished(Event):
    """A call has its result. Each call of an answer gets exactly one, whatever happens.

    Attributes:
      call_id: of the call.
      output: what the model reads.
      status: "ok", "error" (the tool failed or its arguments are bad), "denied" (policy, hook, user
        or supervisor), "cancelled" or "infrastructure".
      seconds: that it took.
      exit_code: of a command; None for other tools.
      file: that holds the whole output where `output` is shortened; "" where it is whole.
      changed: files that it wrote.
      diff: unified, of what it wrote; "" for none.
      denials: tries of the network that the sandbox denied.
    """

    call_id: str
    output: str
    status: Literal["ok", "error", "denied", "cancelled", "infrastructure"] = "ok"
    seconds: float = 0.0
    exit_code: int | None = None
    file: str = ""
    changed: tuple[str, ...] = ()
    diff: str = ""
    denials: int = 0


@event("turn_finished")
class TurnFinished(Event):
    """The agent stopped to work, and waits for the user.

    Attributes:
      outcome: finished (it said its last word), limit, aborted or infrastructure.
      reason: for people; "" where it finished.
      usage: of the whole turn, sub-agents included.
      seconds: that it took.
    """

    outcome: Outcome
    reason: str = ""
    usage: Usage = NO_USAGE
    seconds: float = 0.0


@event("notice")
class Notice(Event):
    """Something that people should know; the model does not read it."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@event("retried")
class Retried(Event):
    """The model did not answer and is asked again after `wait` seconds."""

    reason: str
    attempt: int
    wait: float


# -- requests that an interface answers


@event("approval_requested")
class ApprovalRequested(Event):
    """A call waits until somebody allows or denies it.

    Attributes:
      request: id, for the answer.
      call: that waits.
      reason: why it is asked: the rule, or the supervisor's verdict.
      summary: one line for people.
      diff: of the edit that it would make; "" for none.
      rule: which "allow always" would add, such as "shell(git commit:*)"; "" for none.
    """

    request: str
    call: ToolCall
    reason: str = ""
    summary: str = ""
    diff: str = ""
    rule: str = ""


@event("approval_answered")
class ApprovalAnswered(Event):
    """An approval has its answer.

    Attributes:
      request: id of the request.
      decision: "allow", "deny" (the agent goes on) or "stop" (the turn ends).
      scope: "once", or "session" or "project" for a rule that was added.
      note: what the user says to the agent.
      by: "user", "policy", "hook", "supervisor" or "timeout".
    """

    request: str
    decision: Decision
    scope: Literal["once", "session", "project"] = "once"
    note: str = ""
    by: str = "user"


@event("question_asked")
class QuestionAsked(Event):
    """The agent asks the user; `choices` may be empty."""

    request: str
    question: str
    choices: tuple[str, ...] = ()


@event("question_answered")
class QuestionAnswered(Event):
    """The user answered a question; "" where there is nobody to answer."""

    request: str
    answer: str


# -- state of the agent


@event("todo_changed")
class TodoChanged(Event):
    """The list of what is to do, whole."""

    items: tuple[TodoItem, ...]


@event("output_moved")
class OutputMoved(Event):
    """The output of an old call is replaced in the context by the name of a file that holds it."""

    call_id: str
    file: str
    tokens: int


@event("compaction_started")
class CompactionStarted(Event):
    """The context is about to be summarised; `trigger` is "threshold", "overflow" or "user"."""

    trigger: str
    tokens: int


@event("context_compacted")
class ContextCompacted(Event):
    """From now on the context is `summary`, then the events from `kept_from` on.

    Attributes:
      summary: the first user message of the new context, whole.
      kept_from: number of the first event that stays in the context as it is; the number of this
        event where none does.
      tokens_before: of the context.
      tokens_after: of the new one, estimated.
      fallback: why no model wrote the summary; "" where one did.
      usage: of the model that was asked for it.
      history: file that holds what left the context, whole; "" for none.
    """

    summary: str
    kept_from: int
    tokens_before: int
    tokens_after: int
    fallback: str = ""
    usage: Usage = NO_USAGE
    history: str = ""


@event("subagent_started")
class SubagentStarted(Event):
    """A sub-agent begins, or is taken up again.

    Attributes:
      id: of it; with it, it can be taken up again.
      agent: its type.
      prompt: its task.
      call_id: of the call that started it.
      background: whether the agent goes on meanwhile.
    """

    id: str
    agent: str
    prompt: str
    call_id: str = ""
    background: bool = False


@event("subagent_finished")
class SubagentFinished(Event):
    """A sub-agent ended; each one that started does, whatever happens."""

    id: str
    outcome: Outcome
    result: str
    usage: Usage = NO_USAGE


@event("job_started")
class JobStarted(Event):
    """A command runs in the background."""

    job: str
    command: str
    call_id: str = ""


@event("job_finished")
class JobFinished(Event):
    """A background command ended; `exit_code` is None where it was killed or lost."""

    job: str
    exit_code: int | None = None


@event("skill_loaded")
class SkillLoaded(Event):
    """The instructions of a skill are in the context."""

    name: str


@event("checkpoint_taken")
class CheckpointTaken(Event):
    """The files as they are can be restored by `checkpoint`."""

    checkpoint: str


@event("rewound")
class Rewound(Event):
    """The session goes back.

    Attributes:
      to: number of the event before which it goes on: a user's message.
      conversation: whether the events since then leave the context.
      files: whether the files are those of the checkpoint before it.
    """

    to: int
    conversation: bool
    files: bool


@event("hook_ran")
class HookRan(Event):
    """A hook of the user ran."""

    event: str
    command: str
    exit_code: int
    decision: str = ""
    message: str = ""


@event("supervisor_judged")
class SupervisorJudged(Event):
    """The supervisor judged a call.

    Attributes:
      call_id: of the call; "" as long as it is not logged.
      verdict: "pass", "pause" (ask) or "stop".
      rule: that decided; "" for pass.
      severity: from 0 to 3.
      reason: for people.
      cost: that training may subtract.
    """

    call_id: str = ""
    verdict: Literal["pass", "pause", "stop"]
    rule: str = ""
    severity: int = 0
    reason: str = ""
    cost: float = 0.0


@event("feedback_given")
class FeedbackGiven(Event):
    """The user judged an answer or a call.

    Attributes:
      target: number of the `AssistantMessage` that it is about.
      verdict: "accept", "reject", "correct" or "rate".
      rating: from 1 to 5; 0 for none.
      text: a comment, or what would have been right (correct).
    """

    target: int
    verdict: Literal["accept", "reject", "correct", "rate"]
    rating: int = 0
    text: str = ""
