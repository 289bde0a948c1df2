"""Runs the tool calls of one answer: checks, hooks, rules, approval, the tool itself, its result.

Each call gets exactly one `ToolFinished`, whatever happens: a bad argument, a tool that raises, a
denial, a cancellation. Nothing that a model writes, or a tool does, raises out of here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rome.agent.iflow import events
from rome.agent.iflow.events import ApprovalAnswered, Outcome, SupervisorJudged, ToolCall
from rome.agent.iflow.parts import Parts
from rome.agent.iflow.places.output import shorten
from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, read_arguments

MAX_OUTPUT = 400_000  # characters that stay of an output whose tool did not shorten it
CLEAN_UP_SECONDS = 0.3  # for a tool that was cancelled; then it is left behind
CANCELLED = ToolResult("[This call was cancelled before its end.]", "cancelled")
PASSED_OVER = ToolResult("[This call was not run: the turn ended before it.]", "cancelled")


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why a turn ends; the members are those of `events.TurnFinished`."""

    outcome: Outcome
    reason: str = ""


class _Refused(Exception):
    """A call must not run. `ending` is given where the turn ends with it."""

    def __init__(self, message: str, ending: Ending | None = None) -> None:
        super().__init__(message)
        self.ending = ending


class CallRunner:
    """Runs calls.

    `before_change` is called before a call that may change files; `notify` is told of an approval
    that waits.
    """

    def __init__(
        self,
        parts: Parts,
        before_change: Callable[[], Awaitable[None]],
        notify: Callable[[str], None],
    ) -> None:
        self._parts = parts
        self._log = parts.log
        self._before_change = before_change
        self._notify = notify

    async def run(self, calls: Sequence[ToolCall]) -> Ending | None:
        """Run the calls of an answer: at the same time where all of them may, else in order.

        Return how the turn ends with them; None where it goes on.
        """
        try:
            tools = [self._parts.tools.get(call.name) for call in calls]
            if len(calls) > 1 and all(tool is not None and tool.is_parallel for tool in tools):
                return await self._run_together(calls)
            for call in calls:
                ending = await self._run_one(call)
                if ending is not None:
                    return ending
            return None
        finally:
            for call in calls:
                self._finish(call, PASSED_OVER)

    async def _run_together(self, calls: Sequence[ToolCall]) -> Ending | None:
        places = asyncio.Semaphore(self._parts.limits.parallel)

        async def run(call: ToolCall) -> Ending | None:
            async with places:
                return await self._run_one(call)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(call)) for call in calls]
        return next(filter(None, (task.result() for task in tasks)), None)

    async def _run_one(self, call: ToolCall) -> Ending | None:
        """Run a call, log its result, and return how the turn ends with it; None: it goes on."""
        began = time.monotonic()
        ending = None
        try:
            result, ending = await self._result_of(call)
        except asyncio.CancelledError:
            self._finish(call, CANCELLED, time.monotonic() - began)
            raise
        except ToolError as error:
            result = ToolResult(str(error), "error")
        except _Refused as refused:
            result = ToolResult(str(refused), "denied")
            ending = refused.ending
        except WorkspaceError as error:
            result = ToolResult(
                str(error), "infrastructure" if error.is_infrastructure else "error"
            )
            if error.is_infrastructure:
                ending = Ending("infrastructure", str(error))
        except Exception as error:  # a fault of a tool ends neither the turn nor the program
            text = f"{call.name} failed inside: {type(error).__name__}: {error}"
            self._log.append(events.Notice(text=text, level="error"))
            result = ToolResult(text, "error")
        self._finish(call, result, time.monotonic() - began)
        return ending

    async def _result_of(self, call: ToolCall) -> tuple[ToolResult, Ending | None]:
        """Take a call through all that stands before and after its run; _Refused stops it."""
        tool = self._parts.tools.get(call.name)
        if tool is None:
            known = ", ".join(sorted(self._parts.tools)) or "none"
            raise ToolError(f"there is no tool {call.name!r}; there are {known}")
        arguments = read_arguments(tool, call.arguments)
        arguments, call, hook_decision = await self._before(tool, arguments, call)
        context = self._context_of(call)
        await self._permit(tool, arguments, context, hook_decision)
        if tool.access(arguments) not in ("none", "read"):
            await self._before_change()
        self._log.append(events.ToolStarted(call=call, summary=tool.summary(arguments)))
        result = await self._run_tool(tool, arguments, context)
        ending = await self._look_at(tool, arguments, context.call, result)
        return result, ending

    async def _before(
        self, tool: Tool, arguments: dict[str, Any], call: ToolCall
    ) -> tuple[dict[str, Any], ToolCall, str]:
        """Run the hooks before a call; return it as it is to be run, and what they decided."""
        payload = {"tool_name": tool.name, "tool_input": arguments, "tool_use_id": call.id}
        outcome = await self._parts.run_hooks("PreToolUse", payload, matcher=tool.name)
        if outcome.stop:
            reason = outcome.message or "a hook asks to stop"
            raise _Refused(reason, Ending("aborted", reason))
        if outcome.decision == "block":
            raise _Refused(outcome.message or f"a hook blocks this call of {tool.name}")
        if outcome.arguments is not None:
            changed = json.dumps(dict(outcome.arguments), ensure_ascii=False)
            arguments = read_arguments(tool, changed)
            call = dataclasses.replace(call, arguments=changed)
        return arguments, call, outcome.decision

    async def _permit(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, hook_decision: str
    ) -> None:
        """Ask the rules and the supervisor, and the user where they say so; _Refused for a no."""
        verdict = self._parts.policy.judge(tool, arguments, self._parts.workspace.directory)
        if verdict.decision == "deny":
            raise _Refused(verdict.reason or f"the rules deny this call of {tool.name}")
        reasons = []
        if hook_decision == "ask":
            reasons.append("a hook asks for it")
        elif verdict.decision == "ask" and hook_decision != "allow":
            reasons.append(verdict.reason)
        if self._parts.supervisor is not None:
            judgement = await self._parts.supervisor.judge(
                tool, arguments, conversation=self._parts.conversation
            )
            self._log_judgement(context.call, judgement)
            if judgement.verdict == "stop":
                ending = _ending_of(judgement)
                raise _Refused(ending.reason, ending)
            if judgement.verdict == "pause":
                reasons.append(judgement.reason)
        if reasons:
            reason = "; ".join(filter(None, reasons))
            await self._ask(tool, arguments, context, reason, verdict.rule)

    async def _ask(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, reason: str, rule: str
    ) -> None:
        summary = tool.summary(arguments)
        diff = await tool.preview(arguments, context)
        self._notify(f"{summary} waits for approval")
        approval = await self._parts.desk.approve(
            context.call, reason=reason, summary=summary, diff=diff, rule=rule
        )
        if approval.decision != "allow":
            raise _refusal(tool, approval, reason)
        if approval.scope != "once" and rule:
            self._parts.policy.add_rule(rule, approval.scope)

    async def _run_tool(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext
    ) -> ToolResult:
        """Run a tool within its time; the time in which the user is asked does not count."""
        running = asyncio.ensure_future(tool.run(arguments, context))
        seconds = self._parts.limits.tool_seconds
        try:
            while not running.done():
                await asyncio.wait([running], timeout=seconds or None)
                if not running.done() and not self._parts.desk.is_waiting:
                    raise ToolError(f"{tool.name} did not end within {seconds:g} s")
            return running.result()
        finally:
            await self._end_tool(tool, running)

    async def _end_tool(self, tool: Tool, running: asyncio.Future[ToolResult]) -> None:
        """Cancel a tool that still runs, and wait a moment until it has cleaned up."""
        if running.done():
            return
        running.cancel()
        await asyncio.wait([running], timeout=CLEAN_UP_SECONDS)
        if running.done():
            running.cancelled() or running.exception()  # its last words are of no interest
            return
        text = f"{tool.name} does not end; it was left behind"
        self._log.append(events.Notice(text=text, level="warning"))

    async def _look_at(
        self, tool: Tool, arguments: dict[str, Any], call: ToolCall, result: ToolResult
    ) -> Ending | None:
        """Let the supervisor and the hooks see a result; return how the turn ends with it."""
        ending = Ending("finished") if result.ends_turn else None
        if self._parts.supervisor is not None:
            judgement = await self._parts.supervisor.observe(tool, arguments, result)
            self._log_judgement(call, judgement)
            if judgement.verdict == "stop":
                ending = _ending_of(judgement)
        payload = {
            "tool_name": tool.name,
            "tool_input": arguments,
            "tool_use_id": call.id,
            "tool_response": {"output": result.output, "status": result.status},
        }
        outcome = await self._parts.run_hooks("PostToolUse", payload, matcher=tool.name)
        if outcome.stop:
            ending = Ending("aborted", outcome.message or "a hook asks to stop")
        return ending

    def _context_of(self, call: ToolCall) -> ToolContext:
        parts = self._parts
        return ToolContext(
            call=call,
            workspace=parts.workspace,
            emit=parts.log.append,
            asker=parts.desk,
            session_folder=parts.session_folder,
            todo=parts.conversation.todo,
            mode=parts.conversation.mode,
            read_files=parts.conversation.read_files,
            is_denied=parts.policy.hides,
        )

    def _log_judgement(self, call: ToolCall, judgement: SupervisorJudged) -> None:
        """Log a verdict; that a call may pass, without a cost, is no event."""
        if judgement.verdict != "pass" or judgement.cost:
            self._log.append(dataclasses.replace(judgement, call_id=call.id))

    def _finish(self, call: ToolCall, result: ToolResult, seconds: float = 0.0) -> None:
        """Log the result of a call that has none yet."""
        if call.id in self._parts.conversation.open_calls:
            finished = result.finished(call.id, seconds)
            self._log.append(
                dataclasses.replace(finished, output=shorten(result.output, MAX_OUTPUT))
            )


def _refusal(tool: Tool, approval: ApprovalAnswered, reason: str) -> _Refused:
    """Return why a call does not run, as the model is told."""
    if approval.by == "policy":
        return _Refused(f"this call of {tool.name} needs approval ({reason}), and {approval.note}")
    text = f"the user denied this call of {tool.name}"
    if approval.note:
        text = f"{text}: {approval.note}"
    return _Refused(text, Ending("aborted", text) if approval.decision == "stop" else None)


def _ending_of(judgement: SupervisorJudged) -> Ending:
    return Ending("aborted", f"stopped by the supervisor: {judgement.reason}")
