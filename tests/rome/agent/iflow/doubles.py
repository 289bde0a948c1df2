"""In-memory stand-ins for what surrounds the loop: a model with a script, tools, a workspace."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rome.agent.iflow.events import AssistantMessage, SupervisorJudged, ToolCall, Usage
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.tools.base import Access, Tool, ToolContext, ToolError, ToolResult
from rome.agent.messages import Message

Step = str | AssistantMessage | Exception | Callable[[Sequence[Message]], Any]


def calls(
    *made: tuple[str, Mapping[str, Any] | str], text: str = "", price: float = 0.0
) -> AssistantMessage:
    """Return an answer with calls; ids are made unique by the model."""
    tool_calls = tuple(
        ToolCall("", name, given if isinstance(given, str) else json.dumps(given))
        for name, given in made
    )
    return AssistantMessage(
        text=text, tool_calls=tool_calls, finish="tool_calls", usage=Usage(10, 5, price=price)
    )


async def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds that other tasks bring about; the caller bounds the wait."""
    while not condition():
        await asyncio.sleep(0.005)


class ScriptedModel:
    """Says what its script says, one step an answer; the last step goes on for ever."""

    name = "scripted"
    context_tokens = 100_000

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.asked: list[list[Message]] = []
        self.edges: list[Any] = []

    async def ask(
        self, messages, tools, *, edge=None, max_tokens=None, on_text=None
    ) -> AssistantMessage:
        step = self.steps[min(len(self.asked), len(self.steps) - 1)]
        number = len(self.asked)
        self.asked.append(list(messages))
        self.edges.append(edge)
        await asyncio.sleep(0)
        while callable(step) and not isinstance(step, Exception):
            step = step(messages)
            if asyncio.iscoroutine(step):
                step = await step
        if isinstance(step, Exception):
            raise step
        if isinstance(step, str):
            if on_text is not None:
                on_text(step, False)
            step = AssistantMessage(text=step, usage=Usage(10, 5))
        numbered = tuple(
            dataclasses.replace(call, id=f"c{number}.{place}")
            for place, call in enumerate(step.tool_calls)
        )
        return dataclasses.replace(step, tool_calls=numbered)

    def count_tokens(self, messages, tools=()) -> int:
        return sum(len(message.content) for message in messages) // 4

    async def aclose(self) -> None:
        """Do nothing."""


class Folder:
    """A workspace that only has a name; its snapshots only count. Tools here do not touch it."""

    root = "/project"
    directory = "/project"
    is_isolated = True

    def __init__(self) -> None:
        self.taken = 0
        self.restored: list[str] = []

    async def snapshot(self) -> str:
        self.taken += 1
        return f"checkpoint {self.taken}"

    async def restore(self, snapshot) -> None:
        self.restored.append(snapshot)


class Note(Tool):
    """Records what it is called with; `wait` seconds pass meanwhile."""

    name: ClassVar[str] = "note"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "wait": {"type": "number"}},
        "required": ["text"],
    }

    def __init__(self, name="note", *, access: Access = "none", is_parallel=False) -> None:
        self.name = name  # type: ignore[misc]
        self.accesses = access  # type: ignore[misc]
        self.is_parallel = is_parallel  # type: ignore[misc]
        self.seen: list[str] = []
        self.running = self.most_running = 0

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(arguments.get("wait", 0))
        finally:
            self.running -= 1
        text = arguments["text"]
        self.seen.append(text)
        if text == "fail":
            raise ToolError("it failed as asked")
        if text == "bug":
            raise ZeroDivisionError("a fault inside")
        if text == "broken place":
            raise WorkspaceError("the sandbox is gone", is_infrastructure=True)
        if text == "question":
            return ToolResult(await context.asker.question("Which one?", ["a", "b"]))
        return ToolResult(f"noted {text}", ends_turn=text == "the end")


class Stubborn(Tool):
    """A tool that ignores that it is cancelled."""

    name: ClassVar[str] = "stubborn"
    running = False

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        self.running = True
        for _ in range(12):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        return ToolResult("ended at last")


@dataclasses.dataclass
class Said:
    """A verdict of a policy, or an outcome of hooks."""

    decision: str = ""
    reason: str = ""
    rule: str = ""
    message: str = ""
    context: str = ""
    arguments: Mapping[str, Any] | None = None
    stop: bool = False
    ran: tuple[Any, ...] = ()


class Rules:
    """A policy that says for each tool what it was told."""

    def __init__(self, **decisions: str) -> None:
        self.mode = "default"
        self.decisions = decisions
        self.added: list[tuple[str, str]] = []

    def judge(self, tool, arguments, directory="") -> Said:
        decision = self.decisions.get(tool.name, "allow")
        return Said(decision, f"rule for {tool.name}", f"{tool.name}()")

    def hides(self, path) -> bool:
        return False

    def add_rule(self, rule, scope) -> None:
        self.added.append((rule, scope))
        self.decisions[rule.removesuffix("()")] = "allow"


class Programs:
    """Hooks: for each event a function of the payload, or what is always said."""

    def __init__(self, **said: Said | Callable[[Mapping[str, Any]], Said]) -> None:
        self.said = said
        self.payloads: list[Mapping[str, Any]] = []

    async def run(self, event, payload, *, matcher="") -> Said:
        self.payloads.append(payload)
        said = self.said.get(event, Said())
        return said(payload) if callable(said) else said


class Judge:
    """A supervisor that says for each text of a call what it was told."""

    def __init__(self, **verdicts: str) -> None:
        self.verdicts = verdicts

    async def judge(self, tool, arguments, *, conversation) -> SupervisorJudged:
        verdict = self.verdicts.get(arguments["text"], "pass")
        return SupervisorJudged(verdict=verdict, reason="secrets", rule="r1", severity=2, cost=0.5)

    async def observe(self, tool, arguments, result) -> SupervisorJudged:
        return SupervisorJudged(verdict="pass")


class Shortener:
    """A context that is replaced by a summary where the model refuses it."""

    def __init__(self) -> None:
        self.triggers: list[str] = []

    async def prepare(self, agent) -> list[Message]:
        return agent.conversation.messages

    async def compact(self, agent, trigger="user", *, focus="") -> None:
        from rome.agent.iflow.events import ContextCompacted

        self.triggers.append(trigger)
        log = agent.log
        log.append(
            ContextCompacted(
                summary="all of it", kept_from=len(log.events), tokens_before=9, tokens_after=1
            )
        )


CONTEXT_FULL = ModelError("too long", is_context_full=True)
