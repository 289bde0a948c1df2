"""What an agent is made of; the loop, a turn and a call share it."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.approval.supervisor import Supervisor
from rome.agent.iflow.context import ContextManager
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.desk import Desk, Inbox
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.limits import Limits, Spent
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.specs.hooks import HookOutcome, Hooks
from rome.agent.iflow.tools.base import Tool, ToolResult, schema_of
from rome.data.tree import Edge


class Environment(Protocol):
    """A task that plays the user, in training and evaluation."""

    async def answer(self, message: AssistantMessage) -> ToolResult | None:
        """Answer a whole answer of the model, its calls included, by one result.

        It ends the turn where the episode is over. None leaves the answer to the agent's tools.
        """


@dataclasses.dataclass(eq=False)
class Parts:
    """What an agent is made of; `offered` are the tools that it has at the beginning."""

    model: Model  # answers; it belongs to the caller, who closes it
    offered: dataclasses.InitVar[Sequence[Tool]]
    log: EventLog  # of the session; where it has events, the session goes on
    workspace: Workspace  # where tools work; it belongs to the caller, unless `owns_workspace`
    _: dataclasses.KW_ONLY
    system: str = ""  # the system text; "" for none
    # Rules of approval; the default allows everything
    policy: Policy = dataclasses.field(default_factory=lambda: Policy(mode="yolo"))
    hooks: Hooks = dataclasses.field(default_factory=Hooks)  # of the user
    # Keeps the context within its limit; None leaves it as it is
    context: ContextManager | None = None
    supervisor: Supervisor | None = None  # judges each call; None for none
    has_checkpoints: bool = False  # whether the files can be rewound
    # A task that answers in the user's place; None for none
    environment: Environment | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)  # of one turn
    # Counts what this agent and others use together; None counts this one alone
    spent: Spent | None = None
    # Where approvals and questions wait; None makes one where nobody answers
    desk: Desk = None  # type: ignore[assignment]  # made below where it is not given
    session: str = ""  # id; "" takes that of the log, or makes one
    session_folder: str = ""  # where tools keep whole outputs; "" for none
    agent: str = ""  # type of a sub-agent; "" for the main agent
    parent: str = ""  # id of the session that started it
    mode: str = ""  # of approval, where the session begins
    owns_workspace: bool = False  # whether the workspace is closed with the agent
    # How the next answer follows what was asked before; None leaves it to the model
    edge: Edge | None = None
    knows_plan_mode: bool = False  # whether the model was told that plan mode is on
    # By name; what is added or removed holds from the next answer on
    tools: dict[str, Tool] = dataclasses.field(init=False)
    conversation: Conversation = dataclasses.field(init=False)  # what holds now
    inbox: Inbox = dataclasses.field(init=False)  # what waits for the model

    def __post_init__(self, offered: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in offered}
        self.desk = self.desk or Desk(self.log)
        self.conversation = Conversation.of(self.log.events)
        self.session = self.session or self.conversation.session or secrets.token_hex(8)
        self.mode = self.mode or (self.conversation.session and self.conversation.mode)
        self.edge = "subagent" if self.parent else None
        self.inbox = Inbox(self.log)
        if self.spent is not None:
            self.spent.add(self.conversation)

    def schemas(self) -> list[dict[str, Any]]:
        """Return the schemas of the tools."""
        return [schema_of(tool) for tool in self.tools.values()]

    async def run_hooks(
        self, event: str, payload: dict[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Run the hooks of an event: what they did are events, what they tell is in the inbox."""
        about = {
            "hook_event_name": event,
            "session_id": self.session,
            "transcript_path": str(self.log.path or ""),
            "permission_mode": self.conversation.mode,
        }
        outcome = await self.hooks.run(event, about | payload, matcher=matcher)
        for ran in outcome.ran:
            self.log.append(ran)
        text = outcome.context
        if event == "PostToolUse" and outcome.decision == "block":
            text = "\n".join(filter(None, [outcome.message, text]))
        if text and event != "SetUpEnvironment":  # whose text joins the system text
            self.inbox.put(text, "hook")
        return outcome
