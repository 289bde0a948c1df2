"""What is lost when a process is killed, as events: so that every beginning has its end."""

from __future__ import annotations

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.events import Event

KILLED = "the process ended while it ran"


def events_after_a_kill(conversation: Conversation) -> list[Event]:
    """Return the events that end what a killed process left open: calls, requests, jobs, the turn.

    Whether a call had its effect before the kill is not known, and the model is told so.
    """
    lost: list[Event] = []
    for call in conversation.open_calls:
        output = (
            f"[This call has no result: {KILLED}. It may have had its effect, or a part of it.]"
        )
        lost.append(events.ToolFinished(call_id=call, output=output, status="cancelled"))
    for request, asked in conversation.open_requests.items():
        if isinstance(asked, events.ApprovalRequested):
            lost.append(
                events.ApprovalAnswered(request=request, decision="stop", note=KILLED, by="timeout")
            )
        else:
            lost.append(events.QuestionAnswered(request=request, answer=""))
    for subagent in conversation.subagents:
        result = f"{KILLED}; go on with it by its id"
        lost.append(events.SubagentFinished(id=subagent, outcome="aborted", result=result))
    lost += [events.JobFinished(job=job) for job in conversation.jobs]
    if conversation.is_working:
        usage = conversation.turn_usage
        lost.append(events.TurnFinished(outcome="aborted", reason=KILLED, usage=usage))
    return lost
