"""Sub-agents: the `task` tool, which lets another agent work in a context of its own.

A sub-agent is an agent like its parent, with the prompt and the tools of its kind, its own session
file below the parent's session folder, and its own limits. Its last message is all that the parent
sees. It can be taken up again by its id, work beside others, or in the background: its result then
arrives as a notification. Whatever happens, each one that started finishes in the parent's session.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rome.agent.iflow import events as ev
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.places.output import shorten
from rome.agent.iflow.specs.agent_specs import AgentSpec
from rome.agent.iflow.tools.base import Access, Tool, ToolContext, ToolError, ToolResult, of, takes

MAX_DEPTH = 2  # agents below the main one
MAX_PARALLEL = 4
MAX_RESULT = 30_000  # characters; the rest is in the sub-agent's session file
FOLDER = "subagents"
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
CLOSE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Birth:
    """What a new sub-agent is made from.

    Attributes:
      id: of its session.
      spec: its kind.
      log: of its session; not empty where it is taken up again.
      folder: of its session; "" where the parent has none.
      depth: 1 for a child of the main agent.
    """

    id: str
    spec: AgentSpec
    log: EventLog
    folder: str
    depth: int


class TaskTool(Tool):
    """Gives a task to a sub-agent.

    Args:
      specs: the kinds of sub-agents, by name.
      make: makes one.
      notify: takes the result of one that worked in the background; None refuses the background.
      depth: of the agent that has this tool; 0 for the main agent.
      max_parallel: that work at once; more wait.
    """

    name: ClassVar[str] = "task"
    is_parallel: ClassVar[bool] = True
    accesses: ClassVar[Access] = "none"  # its own calls are approved one by one

    def __init__(
        self,
        specs: Mapping[str, AgentSpec],
        make: Callable[[Birth], Agent],
        *,
        notify: Callable[[str], None] | None = None,
        depth: int = 0,
        max_parallel: int = MAX_PARALLEL,
    ) -> None:
        if depth >= MAX_DEPTH:
            raise ValueError(f"an agent of depth {depth} has no sub-agents; {MAX_DEPTH} is the end")
        if not specs:
            raise ValueError("there is no kind of sub-agent; give one, such as agent_specs.GENERAL")
        self._specs = dict(specs)
        self._make = make
        self._notify = notify
        self._depth = depth
        self._slots = asyncio.Semaphore(max_parallel)
        self._working: dict[str, Callable[[ev.Event], ev.Event]] = {}  # id -> emit of the parent
        self._background: dict[str, asyncio.Task[None]] = {}
        self._logs: dict[str, EventLog] = {}  # of sub-agents without a folder
        self.description = _describe(self._specs)  # type: ignore[misc]
        self.parameters = _parameters(self._specs, notify is not None)  # type: ignore[misc]

    def summary(self, arguments: Mapping[str, Any]) -> str:
        """Return one line for people."""
        prompt = " ".join(str(arguments.get("prompt", "")).split())
        whom = arguments.get("id") or arguments.get("agent") or "a sub-agent"
        return f"task for {whom}: {prompt[:80]}"

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Let a sub-agent work; in the background, return once it has begun."""
        birth = self._birth(arguments, context.session_folder)
        is_background = bool(arguments.get("background", False))
        started = ev.SubagentStarted(
            id=birth.id,
            agent=birth.spec.name,
            prompt=arguments["prompt"],
            call_id=context.call.id,
            background=is_background,
        )
        context.emit(started)
        self._working[birth.id] = context.emit
        if not is_background:
            return _result_of(birth.id, await self._work(birth, arguments["prompt"]))
        task = asyncio.create_task(self._work_in_background(birth, arguments["prompt"]))
        self._background[birth.id] = task
        task.add_done_callback(lambda _: self._finish(_cancelled(birth.id)))
        return ToolResult(
            f"sub-agent {birth.id} works in the background; its result will be told to you"
        )

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

    async def _work(
        self,
        birth: Birth,
        prompt: str,
        tell: Callable[[ev.SubagentFinished], None] | None = None,
    ) -> ev.SubagentFinished:
        """Run a sub-agent to its end; its end is in the parent's session whatever it is.

        Args:
          birth: of the sub-agent.
          prompt: its task.
          tell: called with its end, unless it was cancelled.
        """
        first = len(birth.log.events)
        finished = _cancelled(birth.id)
        child = None
        try:
            async with self._slots:
                child = self._make(birth)
                finished = await self._run(child, birth, prompt)
        except Exception as error:  # a fault of one sub-agent is no end of its parent
            finished = _failed(birth.id, error)
        finally:
            # What it used counts for its parent, also where it was cancelled or failed. Nothing is
            # awaited since its last answer: its tokens are counted by itself or by its parent.
            usage = Conversation.of(birth.log.events[first:]).usage
            finished = dataclasses.replace(finished, usage=usage)
            self._finish(finished)
            if tell is not None and finished.outcome != "aborted":
                tell(finished)
            if child is not None:
                await _close(child)
            if birth.folder:
                birth.log.close()
        return finished

    def _finish(self, finished: ev.SubagentFinished) -> None:
        """Log the end of a sub-agent, once; one that was cancelled may never have begun to run."""
        self._background.pop(finished.id, None)
        emit = self._working.pop(finished.id, None)
        if emit is not None:
            emit(finished)

    async def _run(self, child: Agent, birth: Birth, prompt: str) -> ev.SubagentFinished:
        first = len(birth.log.events)
        turn = await child.run(prompt)
        result = _last_words(birth.log.events[first:])
        if turn.outcome != "finished":
            result = "\n".join(filter(None, [f"It ended early: {turn.reason}", result]))
        return ev.SubagentFinished(
            id=birth.id, outcome=turn.outcome, result=shorten(result, MAX_RESULT)
        )

    async def _work_in_background(self, birth: Birth, prompt: str) -> None:
        notify = self._notify
        assert notify is not None

        def tell(finished: ev.SubagentFinished) -> None:
            head = f"Sub-agent {birth.id}, which worked in the background:"
            notify(f"{head}\n{_answer(finished)}")

        await self._work(birth, prompt, tell)

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
        log = self._log_of(id, session_folder)
        if log is None:
            raise ToolError(f"there is no sub-agent {id!r} in this session; leave the id out")
        kinds = [event.agent for event in log.events if isinstance(event, ev.SessionStarted)]
        kind = name or (kinds[-1] if kinds else id.rpartition("-")[0])
        folder = _folder_of(id, session_folder)
        return Birth(id, self._spec(kind), log, folder, self._depth + 1)

    def _new(self, name: str, session_folder: str) -> Birth:
        spec = self._spec(name or (next(iter(self._specs)) if len(self._specs) == 1 else ""))
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", spec.name)[:40]
        number = len(self._logs)
        while True:
            number += 1
            id = f"{stem}-{number}"
            if not session_folder:
                if id in self._logs:
                    continue
                log = self._logs[id] = EventLog()
                return Birth(id, spec, log, "", self._depth + 1)
            folder = pathlib.Path(_folder_of(id, session_folder))
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return Birth(id, spec, EventLog(folder / "events.jsonl"), str(folder), self._depth + 1)

    def _log_of(self, id: str, session_folder: str) -> EventLog | None:
        if not session_folder:
            return self._logs.get(id)
        if not _ID.fullmatch(id):
            return None
        path = pathlib.Path(_folder_of(id, session_folder)) / "events.jsonl"
        return EventLog(path) if path.is_file() else None

    def _spec(self, name: str) -> AgentSpec:
        spec = self._specs.get(name)
        if spec is None:
            raise ToolError(
                f"there is no sub-agent {name!r}; choose one of {', '.join(sorted(self._specs))}"
            )
        return spec


def tools_for(spec: AgentSpec, tools: Sequence[Tool]) -> list[Tool]:
    """Return those of an agent's tools that its sub-agent has.

    Args:
      spec: names tools, or patterns such as "server__*"; None stands for all.
      tools: of the parent, with a task tool of the sub-agent's own depth where it may have one.
    """
    if spec.tools is None:
        return list(tools)
    return [
        tool
        for tool in tools
        if any(fnmatch.fnmatchcase(tool.name, pattern) for pattern in spec.tools)
    ]


def may_have_subagents(spec: AgentSpec, depth: int) -> bool:
    """Return whether an agent of this kind, at this depth, may have the task tool itself."""
    return depth < MAX_DEPTH and (spec.tools is None or TaskTool.name in spec.tools)


async def _close(child: Agent) -> None:
    """Close a sub-agent within CLOSE_SECONDS; what it did counts whatever its end is."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await child.aclose()
    except (OSError, RuntimeError, TimeoutError):
        return


def _cancelled(id: str) -> ev.SubagentFinished:
    return ev.SubagentFinished(id=id, outcome="aborted", result="it was cancelled")


def _failed(id: str, error: Exception) -> ev.SubagentFinished:
    reason = f"it failed: {type(error).__name__}: {error}"
    return ev.SubagentFinished(id=id, outcome="infrastructure", result=reason)


def _result_of(id: str, finished: ev.SubagentFinished) -> ToolResult:
    status = {"finished": "ok", "infrastructure": "infrastructure"}.get(finished.outcome, "error")
    return ToolResult(f"{_answer(finished)}\n[sub-agent {id}]", status=status)  # type: ignore[arg-type]


def _answer(finished: ev.SubagentFinished) -> str:
    return finished.result or "It ended without a word."


def _last_words(events: Sequence[ev.Event]) -> str:
    """Return the text of the last answer."""
    for event in reversed(events):
        if isinstance(event, ev.AssistantMessage):
            return event.text
    return ""


def _folder_of(id: str, session_folder: str) -> str:
    return str(pathlib.Path(session_folder) / FOLDER / id) if session_folder else ""


def _describe(specs: Mapping[str, AgentSpec]) -> str:
    kinds = "\n".join(f"- {spec.name}: {spec.when}" for spec in specs.values())
    return (
        "Give a task to a sub-agent, which works on it in a context of its own and answers with one"
        " message. Say all that it needs to know: it sees nothing of this conversation. Several"
        f" may work at once. Kinds of sub-agents:\n{kinds}"
    )


def _parameters(specs: Mapping[str, AgentSpec], with_background: bool) -> dict[str, Any]:
    members = {
        "prompt": of("string", "The task, whole."),
        "agent": of("string", "The kind of sub-agent.", enum=list(specs)),
        "id": of("string", "Go on with this earlier sub-agent."),
    }
    if with_background:
        text = "Do not wait for it; its result is told to you later."
        members["background"] = of("boolean", text)
    return takes("prompt", **members)
