"""One turn of the agent: ask the model, run its calls, until it makes none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rome.agent.iflow import events
from rome.agent.iflow.calls import CallRunner, Ending
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.limits import Finding, Guard
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.parts import Parts
from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.messages import Message

MAX_STOP_BLOCKS = 8  # times that hooks may make the agent go on in one turn
MAX_CUT_ANSWERS = 3  # answers in a row that are cut at their limit
PLAN_MODE = (
    "Plan mode is on: look at files and ask questions, and change nothing. When you know what to"
    " do, present the plan with exit_plan_mode, and wait for the user's approval."
)
CUT = "Your answer was cut at its limit of tokens. Go on from there, in smaller steps."


class Turn:
    """Plays one turn of the agent that has these parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._log = parts.log
        self._guard = Guard()
        self._has_checkpoint = False  # or it was tried to take one
        self._blocks = 0  # times that hooks made the agent go on
        self._cuts = 0  # answers in a row that were cut at their limit
        self._notifications: set[asyncio.Task[Any]] = set()
        self._runner = CallRunner(parts, self._take_checkpoint, self._notify_user)

    async def play(self, text: str) -> Ending:
        """Play the turn to its end; a text of the user of "" goes on with what is there."""
        refusal = await self._begin(text)
        if refusal is not None:
            return refusal
        conversation = self._parts.conversation
        while True:
            self._deliver()
            usage = self._parts.spent() if self._parts.spent else conversation.turn_usage
            limit = self._parts.limits.reached(conversation.turn_answers, usage)
            if limit:
                return Ending("limit", limit)
            try:
                answer = self._log.append(await self._ask())
            except ModelError as error:
                return Ending("limit" if error.is_context_full else "infrastructure", str(error))
            ending = await self._act_on(answer)
            if ending is not None:
                return ending

    async def _begin(self, text: str) -> Ending | None:
        """Log what the user says; return how the turn ends where a hook refuses it."""
        self._log.append(events.TurnStarted(turn=self._parts.conversation.turn + 1))
        if not text:
            return None
        outcome = await self._parts.run_hooks("UserPromptSubmit", {"prompt": text})
        if outcome.decision == "block" or outcome.stop:
            return Ending("aborted", outcome.message or "a hook refuses the message")
        self._log.append(events.UserMessage(text=text))
        return None

    def _deliver(self) -> None:
        """Log what waits for the model."""
        parts = self._parts
        is_planning = parts.conversation.mode == "plan"
        if is_planning and not parts.knows_plan_mode:
            parts.inbox.put(PLAN_MODE, "reminder")
        parts.knows_plan_mode = is_planning
        parts.inbox.deliver()

    # -- asking

    async def _ask(self) -> AssistantMessage:
        """Ask the model; where the context is too long for it, make that shorter and ask again."""
        parts = self._parts
        try:
            return await self._ask_once()
        except ModelError as error:
            if not error.is_context_full or parts.context is None:
                raise
        await parts.context.compact(parts, "overflow")
        return await self._ask_once()

    async def _ask_once(self) -> AssistantMessage:
        parts = self._parts
        schemas = parts.schemas()
        messages: Sequence[Message] = parts.conversation.messages
        if parts.context is not None:
            messages = await parts.context.prepare(parts)

        def show(text: str, is_reasoning: bool) -> None:
            self._log.append(events.TextDelta(text=text, is_reasoning=is_reasoning))

        answer = await parts.model.ask(messages, schemas, edge=parts.edge, on_text=show)
        parts.edge = None
        return answer

    # -- acting

    async def _act_on(self, message: AssistantMessage) -> Ending | None:
        """Do what an answer asks for; return how the turn ends with it, None where it goes on."""
        if self._parts.environment is not None:
            result = await self._parts.environment.answer(message)
            if result is not None:
                self._log.append(result.finished(""))
                return Ending("finished") if result.ends_turn else None
        if message.malformed:
            text = f"A tool call could not be read: {message.malformed}"
            self._parts.inbox.put(text, "reminder")
            return self._take_finding(self._guard.observe_malformed())
        if message.tool_calls:
            self._cuts = 0
            first = len(self._log.events)
            ending = await self._runner.run(message.tool_calls)
            return ending or self._guard_since(first, message)
        return await self._end(message)

    def _guard_since(self, first: int, message: AssistantMessage) -> Ending | None:
        """Let the guard see the results since an event; return how the turn ends with them."""
        calls = {call.id: call for call in message.tool_calls}
        for event in self._log.events[first:]:
            if isinstance(event, events.ToolFinished) and event.call_id in calls:
                ending = self._take_finding(self._guard.observe(calls[event.call_id], event))
                if ending is not None:
                    return ending
        return None

    def _take_finding(self, finding: Finding | None) -> Ending | None:
        if finding is None:
            return None
        if finding.stops:
            return Ending("limit", finding.text)
        self._log.append(events.Notice(text=finding.text, level="warning"))
        self._parts.inbox.put(finding.text, "reminder")
        return None

    async def _take_checkpoint(self) -> None:
        """Keep the files before the first change of the turn."""
        if not self._parts.has_checkpoints or self._has_checkpoint:
            return
        self._has_checkpoint = True
        try:
            checkpoint = await self._parts.workspace.snapshot()
        except (WorkspaceError, OSError) as error:
            text = f"no checkpoint was taken, so the files of this turn cannot be rewound: {error}"
            self._log.append(events.Notice(text=text, level="warning"))
            return
        self._log.append(events.CheckpointTaken(checkpoint=checkpoint))

    def _notify_user(self, text: str) -> None:
        """Run the hooks that tell the user of something, without waiting for them."""
        if self._parts.desk.is_attended:
            hooks = self._parts.run_hooks("Notification", {"message": text})
            task = asyncio.ensure_future(hooks)
            self._notifications.add(task)
            task.add_done_callback(self._notifications.discard)

    # -- ending

    async def _end(self, message: AssistantMessage) -> Ending | None:
        """End the turn with an answer that makes no call, unless there is more to do."""
        self._cuts = self._cuts + 1 if message.finish == "length" else 0
        if self._cuts:
            if message.chunk >= 0 or self._cuts > MAX_CUT_ANSWERS:
                return Ending("limit", "an answer was cut at its limit of tokens")
            self._parts.inbox.put(CUT, "reminder")
            return None
        if await self._has_news() or await self._is_kept_going():
            return None
        return Ending("finished")

    async def _has_news(self) -> bool:
        """Return whether something waits for the model.

        Where nobody is there, sub-agents in the background are waited for.
        """
        parts = self._parts
        while not parts.inbox and parts.conversation.subagents and not parts.desk.is_attended:
            await parts.inbox.wait()
        return bool(parts.inbox)

    async def _is_kept_going(self) -> bool:
        """Run the hooks at the end; return whether one of them makes the agent go on."""
        if self._blocks >= MAX_STOP_BLOCKS:
            return False
        event = "SubagentStop" if self._parts.parent else "Stop"
        outcome = await self._parts.run_hooks(event, {"stop_hook_active": self._blocks > 0})
        if outcome.decision != "block" or outcome.stop:
            return False
        self._blocks += 1
        self._parts.inbox.put(outcome.message or "A hook says that the work is not done.", "hook")
        return True
