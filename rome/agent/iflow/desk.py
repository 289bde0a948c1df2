"""What waits: requests for a person (approvals, questions), and messages for the model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Literal

from rome.agent.iflow import events
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import ApprovalAnswered, Decision, Scope, ToolCall, UserMessage

NOBODY = (
    "nobody is here to approve it. Do without it, or say what you need; a rule that allows it, or"
    " the mode yolo, would let it run"
)


class UnknownRequest(ValueError):
    """An answer to a request that does not wait: it was answered, or there was none."""


class Desk:
    """Where requests wait. Sub-agents use the desk of the agent that started them.

    Where no interface is there to answer, approvals are denied and questions answered "" at once.
    """

    def __init__(self, log: EventLog, *, is_attended: bool = False) -> None:
        self.log = log
        self.is_attended = is_attended
        self._approvals: dict[str, asyncio.Future[ApprovalAnswered]] = {}
        self._questions: dict[str, asyncio.Future[str]] = {}

    @property
    def is_waiting(self) -> bool:
        """Return whether a request waits."""
        return bool(self._approvals or self._questions)

    async def approve(
        self, call: ToolCall, *, reason: str, summary: str = "", diff: str = "", rule: str = ""
    ) -> ApprovalAnswered:
        """Ask whether a call may run."""
        request = secrets.token_hex(6)
        self.log.append(
            events.ApprovalRequested(
                request=request, call=call, reason=reason, summary=summary, diff=diff, rule=rule
            )
        )
        if not self.is_attended:
            denied = ApprovalAnswered(request=request, decision="deny", note=NOBODY, by="policy")
            return self.log.append(denied)
        answer = ApprovalAnswered(request=request, decision="stop")  # if it is cancelled meanwhile
        waiting = self._approvals[request] = asyncio.get_running_loop().create_future()
        try:
            answer = await waiting
        finally:
            self._approvals.pop(request, None)
            answer = self.log.append(answer)
        return answer

    async def question(self, question: str, choices: Sequence[str] = ()) -> str:
        """Return the user's answer; "" where nobody can answer."""
        request = secrets.token_hex(6)
        asked = events.QuestionAsked(request=request, question=question, choices=tuple(choices))
        self.log.append(asked)
        answer = ""
        try:
            if self.is_attended:
                waiting = self._questions[request] = asyncio.get_running_loop().create_future()
                answer = await waiting
        finally:
            self._questions.pop(request, None)
            self.log.append(events.QuestionAnswered(request=request, answer=answer))
        return answer

    def respond(
        self,
        request: str,
        decision: Decision | None = None,
        *,
        scope: Scope = "once",
        note: str = "",
        answer: str = "",
    ) -> None:
        """Answer a request, an approval by `decision`, a question by `answer`.

        Raises:
          UnknownRequest: it does not wait, or is of the other kind.
        """
        approval = self._approvals.get(request)
        question = self._questions.get(request)
        if approval is not None and not approval.done() and decision is not None:
            approved = ApprovalAnswered(request=request, decision=decision, scope=scope, note=note)
            approval.set_result(approved)
        elif question is not None and not question.done() and decision is None:
            question.set_result(answer)
        else:
            kind = "question" if decision is None else "approval"
            raise UnknownRequest(f"no {kind} {request!r} waits for an answer")


class Inbox:
    """What the model is to read; it is in the log once the model is about to read it."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._waiting: list[UserMessage] = []
        self._changed = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, text: str, source: Literal["steer", "hook", "reminder", "notification"]) -> None:
        """Let the model read something."""
        self._waiting.append(UserMessage(text=text, source=source))
        self.wake()

    def deliver(self) -> None:
        """Log what waits."""
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._log.append(message)

    def wake(self) -> None:
        """End a wait."""
        self._changed.set()

    async def wait(self) -> None:
        """Wait until something is put in, or `wake` is called."""
        self._changed.clear()
        await self._changed.wait()
