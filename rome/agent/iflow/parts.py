"""What the loop asks of the parts around it: rules, hooks, supervisor, context, checkpoints.

The loop knows these protocols only. `Unhindered` and `NoHooks` stand in where a session has no
rules and no hooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.tools.base import Tool, ToolResult
from rome.agent.messages import Message

Trigger = Literal["threshold", "overflow", "user"]


class Verdict(Protocol):
    """A policy's judgement of a call; `rule` is what "always" would add, "" for none."""

    @property
    def decision(self) -> Literal["allow", "ask", "deny"]: ...
    @property
    def reason(self) -> str: ...
    @property
    def rule(self) -> str: ...


class Policy(Protocol):
    """Rules of approval."""

    mode: str

    def judge(self, tool: Tool, arguments: Mapping[str, Any], directory: str = "") -> Verdict:
        """Return whether a call may run; `directory` is where the shell is now."""

    def hides(self, path: str) -> bool:
        """Return whether a rule forbids to read a file."""

    def add_rule(self, rule: str, scope: Literal["session", "project"]) -> None:
        """Allow what a rule names from now on."""


class HookRun(Protocol):
    """One hook that ran; the members are those of `events.HookRan`."""

    @property
    def command(self) -> str: ...
    @property
    def exit_code(self) -> int: ...
    @property
    def decision(self) -> str: ...
    @property
    def message(self) -> str: ...


class HookOutcome(Protocol):
    """What the hooks of an event said together.

    Attributes:
      decision: "block", "allow", "ask", or "" for none.
      message: why, for the model.
      context: text for the model.
      arguments: changed ones; None for none.
      stop: whether the agent has to stop.
      ran: the hooks that ran.
    """

    @property
    def decision(self) -> Literal["", "block", "allow", "ask"]: ...
    @property
    def message(self) -> str: ...
    @property
    def context(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any] | None: ...
    @property
    def stop(self) -> bool: ...
    @property
    def ran(self) -> Sequence[HookRun]: ...


class Hooks(Protocol):
    """The user's programs that run at certain moments."""

    async def run(
        self, event: str, payload: Mapping[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Run the hooks of an event; one that fails never raises."""


class Judgement(Protocol):
    """A supervisor's judgement; the members are those of `events.SupervisorJudged`."""

    @property
    def verdict(self) -> Literal["pass", "pause", "stop"]: ...
    @property
    def rule(self) -> str: ...
    @property
    def severity(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def cost(self) -> float: ...


class Supervisor(Protocol):
    """Judges each call against the task's policy."""

    async def judge(
        self, tool: Tool, arguments: Mapping[str, Any], *, conversation: Conversation
    ) -> Judgement:
        """Judge a call before it runs."""

    async def observe(
        self, tool: Tool, arguments: Mapping[str, Any], result: ToolResult
    ) -> Judgement:
        """Judge what a call brought about."""


class Context(Protocol):
    """Keeps the context of the model within its limit."""

    async def prepare(
        self,
        conversation: Conversation,
        model: Model,
        schemas: Sequence[dict[str, Any]],
        log: EventLog,
    ) -> list[Message]:
        """Return what the model is shown now."""

    async def compact(
        self,
        conversation: Conversation,
        model: Model,
        schemas: Sequence[dict[str, Any]],
        log: EventLog,
        *,
        trigger: Trigger = "user",
        focus: str = "",
    ) -> None:
        """Make the context shorter; `focus` is what it should keep above all."""


class Checkpoints(Protocol):
    """Keeps the files of the workspace as they are at a moment."""

    async def take(self) -> str:
        """Keep them; return the name of the checkpoint."""

    async def restore(self, checkpoint: str) -> None:
        """Bring them back."""


class Environment(Protocol):
    """A task that plays the user, in training and evaluation."""

    async def answer(self, message: AssistantMessage) -> ToolResult | None:
        """Answer a whole answer of the model, its calls included, by one result.

        Returns:
          The result; `ends_turn` where the episode is over. None leaves the answer to the agent's
          own tools.
        """


@dataclasses.dataclass(frozen=True)
class _Outcome:
    decision: Literal["", "block", "allow", "ask"] = ""
    message: str = ""
    context: str = ""
    arguments: Mapping[str, Any] | None = None
    stop: bool = False
    ran: tuple[HookRun, ...] = ()


class NoHooks:
    """Hooks where there are none."""

    async def run(
        self, event: str, payload: Mapping[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Say nothing."""
        return _Outcome()


@dataclasses.dataclass(frozen=True)
class _Verdict:
    decision: Literal["allow", "ask", "deny"]
    reason: str = ""
    rule: str = ""


@dataclasses.dataclass
class Unhindered:
    """The rules of a session without rules: everything runs."""

    mode: str = "yolo"

    def judge(self, tool: Tool, arguments: Mapping[str, Any], directory: str = "") -> Verdict:
        """Allow it."""
        return _Verdict("allow")

    def hides(self, path: str) -> bool:
        """Return False."""
        return False

    def add_rule(self, rule: str, scope: Literal["session", "project"]) -> None:
        """Do nothing: everything is allowed already."""
