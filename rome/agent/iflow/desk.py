"""Requests that wait for a person: approvals of calls, and questions of the agent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Literal

from rome.agent.iflow import events
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import ApprovalAnswered, Decision, ToolCall

Scope = Literal["once", "session", "project"]
NOBODY = (
    "nobody is here to approve it. Do without it, or say what you need; a rule that allows it, or"
    " the mode yolo, would let it run"
)


class UnknownRequest(ValueError):
    """An answer to a request that does not wait: it was answered, or there was none."""


class Desk:
    """Where requests wait. Sub-agents use the desk of the agent that started them.

    Args:
      log: where requests and their answers are events.
      is_attended: whether an interface is there that answers. Otherwise approvals are denied and
        questions answered "" at once.
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
        # Where the turn is cancelled meanwhile:
        answer = ApprovalAnswered(request=request, decision="stop")
        try:
            if self.is_attended:
                waiting = self._approvals[request] = asyncio.get_running_loop().create_future()
                answer = await waiting
            else:
                answer = _unanswered(request)
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
        """Answer a request: an approval by `decision`, a question by `answer`.

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

    def leave(self) -> None:
        """Note that nothing answers from now on; what waits is answered as where it never did."""
        self.is_attended = False
        for request, approval in self._approvals.items():
            if not approval.done():
                approval.set_result(_unanswered(request))
        for question in self._questions.values():
            if not question.done():
                question.set_result("")


def _unanswered(request: str) -> ApprovalAnswered:
    return ApprovalAnswered(request=request, decision="deny", note=NOBODY, by="policy")
