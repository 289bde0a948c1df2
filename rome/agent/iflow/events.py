"""The events of a session: what happened, in order, and nothing else.

A session is a file of events, one JSON object a line, which is only ever appended to. It is what an
interface shows, what `--output-format stream-json` prints, what `--resume` reads and what the
record of an episode is made of. An event is never changed: a rewind, a compaction and a correction
are events of their own, and `rome.agent.iflow.conversation` derives what holds after them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform, get_args

from rome.agent.messages import Call as ToolCall

Decision = Literal["allow", "deny", "stop"]
Scope = Literal["once", "session", "project"]
Status = Literal["ok", "error", "denied", "cancelled", "infrastructure"]
Outcome = Literal["finished", "usage", "infrastructure", "limit", "aborted"]
EXIT_CODES: Mapping[str, int] = {outcome: code for code, outcome in enumerate(get_args(Outcome))}


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _Registered:
    """Makes each class below it a dataclass with a kind: "tool_finished" of ToolFinished."""

    kind: ClassVar[str] = ""  # its name in the file

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.kind = re.sub(r"\B[A-Z]", r"_\g<0>", cls.__name__).lower()


class Event(_Registered):
    """One event."""

    is_stored: ClassVar[bool] = True  # in the file; what is not, only informs interfaces
    number: int = -1  # of the event in its session, from 0; -1 until it is logged
    at: float = 0.0  # when it happened, in seconds since 1970; 0 until it is logged

    def to_json(self) -> dict[str, Any]:
        """Return the event as it stands in a session file."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


E = TypeVar("E", bound=Event)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens and price of model calls."""

    prompt: int = 0  # tokens read, those from a cache included
    completion: int = 0  # tokens written
    cached: int = 0  # of `prompt`, read from a cache
    price: float = 0.0  # in the currency of the configured prices; 0 where there are none

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


class SessionStarted(Event):
    """A session begins, or is taken up again by another process (`resumed`)."""

    session: str
    directory: str
    model: str
    mode: str  # of approval
    system: str  # the system text, whole
    tools: tuple[str, ...] = ()  # names of the tools
    schemas: tuple[dict[str, Any], ...] = ()  # of the tools, as the model is shown them
    agent: str = ""  # type of a sub-agent; "" for the main agent
    parent: str = ""  # id of the session that started a sub-agent; "" for none
    version: str = ""
    resumed: bool = False  # whether events of an earlier process come before


class SessionEnded(Event):
    """The process ends the session in order; a killed one leaves no such event."""

    outcome: Outcome


class ModeChanged(Event):
    """The mode of approval is another one: plan, default, accept_edits or yolo."""

    mode: str


class ModelChanged(Event):
    """Another model answers from now on."""

    model: str


class UserMessage(Event):
    """Text that the model reads as the user's."""

    text: str
    # "user"; "steer" (sent while the agent worked); "hook", "reminder" and "notification" (of the
    # program: a hook's words, a file that changed outside, a job that ended)
    source: Literal["user", "steer", "hook", "reminder", "notification"] = "user"


class TurnStarted(Event):
    """The agent begins to work on what the user said; `turn` counts from 1."""

    turn: int


class TextDelta(Event):
    """A piece of an answer that is being written; `AssistantMessage` has the whole."""

    is_stored: ClassVar[bool] = False
    text: str
    is_reasoning: bool = False


class AssistantMessage(Event):
    """An answer of the model."""

    text: str = ""  # what it says
    reasoning: str = ""  # its thoughts
    tool_calls: tuple[ToolCall, ...] = ()  # its calls, in order
    finish: Literal["stop", "tool_calls", "length"] = "stop"
    usage: Usage = NO_USAGE  # of this answer
    chunk: int = -1  # its number where a session of tokens keeps it; -1 for none
    malformed: str = ""  # why a call in it could not be read; "" where all could


class ToolStarted(Event):
    """A call is being run, after hooks and approval."""

    call: ToolCall  # as it is run; a hook may have changed its arguments
    summary: str = ""  # one line for people, such as "Edit src/main.py"


class ToolOutput(Event):
    """A piece of the output of a call that still runs."""

    is_stored: ClassVar[bool] = False
    call_id: str
    text: str


class FileSeen(Event):
    """The agent read or wrote a file; it may change it as long as the file is in this state."""

    path: str  # absolute
    size: int  # in bytes
    changed: float  # time of its last change, in seconds


class ToolFinished(Event):
    """A call has its result. Each call of an answer gets exactly one, whatever happens."""

    call_id: str
    output: str  # what the model reads
    status: Status = "ok"  # "error": of the tool, or its arguments; "denied": by whomever
    seconds: float = 0.0  # that it took
    exit_code: int | None = None  # of a command; None for other tools
    file: str = ""  # that holds the whole output where `output` is shortened; "" where it is whole
    changed: tuple[str, ...] = ()  # files that it wrote
    diff: str = ""  # unified, of what it wrote; "" for none
    denials: int = 0  # tries of the network that the sandbox denied


class TurnFinished(Event):
    """The agent stopped to work, and waits for the user."""

    outcome: Outcome  # finished (it said its last word), limit, aborted or infrastructure
    reason: str = ""  # for people; "" where it finished
    usage: Usage = NO_USAGE  # of the whole turn, sub-agents included
    seconds: float = 0.0  # that it took


class Notice(Event):
    """Something that people should know; the model does not read it."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


class Retried(Event):
    """The model did not answer and is asked again after `wait` seconds."""

    reason: str
    attempt: int
    wait: float


class ApprovalRequested(Event):
    """A call waits until somebody allows or denies it."""

    request: str  # id, for the answer
    call: ToolCall  # that waits
    reason: str = ""  # why it is asked: the rule, or the supervisor's verdict
    summary: str = ""  # one line for people
    diff: str = ""  # of the edit that it would make; "" for none
    rule: str = ""  # which "allow always" would add, such as "shell(git commit:*)"; "" for none


class ApprovalAnswered(Event):
    """An approval has its answer."""

    request: str
    decision: Decision  # the agent goes on after "deny"; the turn ends with "stop"
    scope: Scope = "once"  # of the rule that was added; "once" for none
    note: str = ""  # what the user says to the agent
    by: str = "user"  # "user", "policy", "hook", "supervisor" or "timeout"


class QuestionAsked(Event):
    """The agent asks the user; `choices` may be empty."""

    request: str
    question: str
    choices: tuple[str, ...] = ()


class QuestionAnswered(Event):
    """The user answered a question; "" where there is nobody to answer."""

    request: str
    answer: str


class TodoChanged(Event):
    """The list of what is to do, whole."""

    items: tuple[TodoItem, ...]


class OutputMoved(Event):
    """The output of an old call is replaced in the context by the name of a file that holds it."""

    call_id: str
    file: str
    tokens: int


class CompactionStarted(Event):
    """The context is about to be summarised; `trigger` is "threshold", "overflow" or "user"."""

    trigger: str
    tokens: int


class ContextCompacted(Event):
    """From now on the context is `summary`, then the events from `kept_from` on."""

    summary: str  # the first user message of the new context, whole
    kept_from: int  # number of the first event that stays as it is; of this one where none does
    tokens_before: int  # of the context
    tokens_after: int  # of the new one, estimated
    fallback: str = ""  # why no model wrote the summary; "" where one did
    usage: Usage = NO_USAGE  # of the model that was asked for it
    history: str = ""  # file that holds what left the context, whole; "" for none


class SubagentStarted(Event):
    """A sub-agent begins, or is taken up again."""

    id: str  # of it; with it, it can be taken up again
    agent: str  # its type
    prompt: str  # its task
    call_id: str = ""  # of the call that started it
    background: bool = False  # whether the agent goes on meanwhile


class SubagentFinished(Event):
    """A sub-agent ended; each one that started does, whatever happens."""

    id: str
    outcome: Outcome
    result: str
    usage: Usage = NO_USAGE


class JobStarted(Event):
    """A command runs in the background."""

    job: str
    command: str
    call_id: str = ""


class JobFinished(Event):
    """A background command ended; `exit_code` is None where it was killed or lost."""

    job: str
    exit_code: int | None = None


class SkillLoaded(Event):
    """The instructions of a skill are in the context."""

    name: str


class CheckpointTaken(Event):
    """The files as they are can be restored by `checkpoint`."""

    checkpoint: str


class Rewound(Event):
    """The session goes back."""

    to: int  # number of the event before which it goes on: a user's message
    conversation: bool  # whether the events since then leave the context
    files: bool  # whether the files are those of the checkpoint before it


class HookRan(Event):
    """A hook of the user ran."""

    event: str
    command: str
    exit_code: int
    decision: str = ""
    message: str = ""


class SupervisorJudged(Event):
    """The supervisor judged a call."""

    call_id: str = ""  # of the call; "" as long as it is not logged
    verdict: Literal["pass", "pause", "stop"]
    rule: str = ""  # that decided; "" for pass
    severity: int = 0  # from 0 to 3
    reason: str = ""  # for people
    cost: float = 0.0  # that training may subtract


class FeedbackGiven(Event):
    """The user judged an answer or a call."""

    target: int  # number of the `AssistantMessage` that it is about
    verdict: Literal["accept", "reject", "correct", "rate"]
    rating: int = 0  # from 1 to 5; 0 for none
    text: str = ""  # a comment, or what would have been right (correct)


KINDS: Mapping[str, type[Event]] = {cls.kind: cls for cls in Event.__subclasses__()}
