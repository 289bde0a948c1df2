"""Sub-agents: the `task` tool, which lets another agent work in a context of its own.

A sub-agent is an agent like its parent, with the prompt and the tools of its kind, and its own
session file below the parent's session folder; it has no sub-agents itself. Its last message is all
that the parent sees. It can be taken up again by its id, work beside others, or in the background:
its result then arrives as a notification. Whatever happens, each one that started finishes in the
parent's session.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rome.agent.iflow import events as ev
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.places.output import shorten
from rome.agent.iflow.specs.agent_specs import AgentSpec
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

MAX_PARALLEL = 4
MAX_RESULT = 30_000  # characters; the rest is in the sub-agent's session file
CLOSE_SECONDS = 10.0
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_DESCRIPTION = (
    "Give a task to a sub-agent, which works on it in a context of its own and answers with one"
    " message. Say all that it needs to know: it sees nothing of this conversation. Several may"
    " work at once. Kinds of sub-agents:\n"
)


@dataclasses.dataclass(frozen=True)
class Birth:
    """What a new sub-agent is made from."""

    id: str  # of its session
    spec: AgentSpec  # its kind
    log: EventLog  # of its session; not empty where it is taken up again
    folder: str  # of its session; "" where the parent has none


class TaskTool(Tool):
    """Gives a task to a sub-agent of a kind in `specs`, which `make` makes.

    `notify` takes the result of one that worked in the background; None refuses the background.
    """

    name = "task"
    is_parallel = True
    accesses = "none"  # its own calls are approved one by one

    def __init__(
        self,
        specs: Mapping[str, AgentSpec],
        make: Callable[[Birth], Agent],
        *,
        notify: Callable[[str], None] | None = None,
        max_parallel: int = MAX_PARALLEL,
    ) -> None:
        self._specs = specs
        self._make = make
        self._notify = notify
        self._slots = asyncio.Semaphore(max_parallel)
        self._working: dict[str, Callable[[ev.Event], ev.Event]] = {}  # id -> emit of the parent
        self._background: dict[str, asyncio.Task[ev.SubagentFinished]] = {}
        self._logs: dict[str, EventLog] = {}  # of sub-agents without a folder
        kinds = [f"- {spec.name}: {spec.when}" for spec in specs.values()]
        self.description = _DESCRIPTION + "\n".join(kinds)
        members = {
            "prompt": of("string", "The task, whole."),
            "agent": of("string", "The kind of sub-agent.", enum=list(specs)),
            "id": of("string", "Go on with this earlier sub-agent."),
        }
        if notify is not None:
            text = "Do not wait for it; its result is told to you later."
            members["background"] = of("boolean", text)
        self.parameters = takes("prompt", **members)

    def summary(self, arguments: Mapping[str, Any]) -> str:
        prompt = " ".join(str(arguments.get("prompt", "")).split())
        whom = arguments.get("id") or arguments.get("agent") or "a sub-agent"
        return f"task for {whom}: {prompt[:80]}"

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Let a sub-agent work; in the background, return once it has begun."""
        birth = self._birth(arguments, context.session_folder)
        prompt = arguments["prompt"]
        is_background = bool(arguments.get("background", False))
        context.emit(
            ev.SubagentStarted(
                id=birth.id,
                agent=birth.spec.name,
                prompt=prompt,
                call_id=context.call.id,
                background=is_background,
            )
        )
        self._working[birth.id] = context.emit
        if is_background:
            task = asyncio.create_task(self._work(birth, prompt))
            self._background[birth.id] = task
            # One that is cancelled may never have begun to run.
            task.add_done_callback(lambda _: self._finish(_cancelled(birth.id)))
            text = f"sub-agent {birth.id} works in the background; its result will be told to you"
            return ToolResult(text)
        finished = await self._work(birth, prompt)
        output = f"{_answer(finished)}\n[sub-agent {birth.id}]"
        if finished.outcome in ("finished", "infrastructure"):
            return ToolResult(output, "ok" if finished.outcome == "finished" else "infrastructure")
        return ToolResult(output, "error")

    async def aclose(self) -> None:
        """Cancel the sub-agents that work in the background."""
        tasks = list(self._background.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for log in self._logs.values():
            log.close()

    # -- one sub-agent

    async def _work(self, birth: Birth, prompt: str) -> ev.SubagentFinished:
        """Run a sub-agent to its end, which is in the parent's session whatever it is."""
        first = len(birth.log.events)
        finished = _cancelled(birth.id)
        child = None
        try:
            async with self._slots:
                child = self._make(birth)
                turn = await child.run(prompt)
                finished = _end_of(birth, turn, birth.log.events[first:])
        except Exception as error:  # a fault of one sub-agent is no end of its parent
            reason = f"it failed: {type(error).__name__}: {error}"
            finished = ev.SubagentFinished(id=birth.id, outcome="infrastructure", result=reason)
        finally:
            # What it used counts for its parent, also where it was cancelled or failed. Nothing is
            # awaited since its last answer: its tokens are counted by itself or by its parent.
            usage = Conversation.of(birth.log.events[first:]).usage
            finished = dataclasses.replace(finished, usage=usage)
            self._finish(finished)
            if child is not None:
                with contextlib.suppress(OSError, RuntimeError, TimeoutError):
                    await asyncio.wait_for(child.aclose(), CLOSE_SECONDS)
            if birth.folder:
                birth.log.close()
        return finished

    def _finish(self, finished: ev.SubagentFinished) -> None:
        """Log the end of a sub-agent, once, and tell of one in the background."""
        is_background = self._background.pop(finished.id, None) is not None
        emit = self._working.pop(finished.id, None)
        if emit is None:
            return
        emit(finished)
        if is_background and self._notify is not None and finished.outcome != "aborted":
            head = f"Sub-agent {finished.id}, which worked in the background:"
            self._notify(f"{head}\n{_answer(finished)}")

    def _birth(self, arguments: Mapping[str, Any], session_folder: str) -> Birth:
        """Return what a call asks for: a new sub-agent, or an earlier one.

        Raises:
          ToolError: there is no such sub-agent, or it works now.
        """
        if arguments.get("background") and self._notify is None:
            raise ToolError("sub-agents cannot work in the background here; leave it out")
        id = arguments.get("id", "")
        name = arguments.get("agent", "")
        if not id:
            return self._new(name, session_folder)
        if id in self._working:
            raise ToolError(f"sub-agent {id} works now; wait for its result")
        folder = _folder_of(id, session_folder)
        log = self._logs.get(id)
        path = pathlib.Path(folder, "events.jsonl")
        if folder and _ID.fullmatch(id) and path.is_file():
            log = EventLog(path)
        if log is None:
            raise ToolError(f"there is no sub-agent {id!r} in this session; leave the id out")
        kinds = [event.agent for event in log.events if isinstance(event, ev.SessionStarted)]
        kind = name or (kinds[-1] if kinds else id.rpartition("-")[0])
        return Birth(id, self._spec(kind), log, folder)

    def _new(self, name: str, session_folder: str) -> Birth:
        spec = self._spec(name or (next(iter(self._specs)) if len(self._specs) == 1 else ""))
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", spec.name)[:40]
        number = 0
        while True:
            number += 1
            id = f"{stem}-{number}"
            folder = _folder_of(id, session_folder)
            if not folder and id not in self._logs:
                log = self._logs[id] = EventLog()
                return Birth(id, spec, log, "")
            if folder:
                with contextlib.suppress(FileExistsError):
                    pathlib.Path(folder).mkdir(parents=True)
                    return Birth(id, spec, EventLog(pathlib.Path(folder, "events.jsonl")), folder)

    def _spec(self, name: str) -> AgentSpec:
        if name not in self._specs:
            known = ", ".join(sorted(self._specs))
            raise ToolError(f"there is no sub-agent {name!r}; choose one of {known}")
        return self._specs[name]


def tools_for(spec: AgentSpec, tools: Sequence[Tool]) -> list[Tool]:
    """Return those of an agent's tools that its sub-agent has, by names or patterns of its kind."""
    patterns = ("*",) if spec.tools is None else spec.tools
    return [tool for tool in tools if any(fnmatch.fnmatchcase(tool.name, one) for one in patterns)]


def _cancelled(id: str) -> ev.SubagentFinished:
    return ev.SubagentFinished(id=id, outcome="aborted", result="it was cancelled")


def _end_of(birth: Birth, turn: ev.TurnFinished, events: Sequence[ev.Event]) -> ev.SubagentFinished:
    """Return the end of a sub-agent whose turn ended: its last words are its result."""
    said = [event.text for event in events if isinstance(event, ev.AssistantMessage)]
    result = said[-1] if said else ""
    if turn.outcome != "finished":
        result = "\n".join(filter(None, [f"It ended early: {turn.reason}", result]))
    shown = shorten(result, MAX_RESULT)
    return ev.SubagentFinished(id=birth.id, outcome=turn.outcome, result=shown)


def _answer(finished: ev.SubagentFinished) -> str:
    return finished.result or "It ended without a word."


def _folder_of(id: str, session_folder: str) -> str:
    return str(pathlib.Path(session_folder, "subagents", id)) if session_folder else ""
