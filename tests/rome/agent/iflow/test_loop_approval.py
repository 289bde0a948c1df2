"""Which calls the loop runs: what the user, the rules and the supervisor say before each."""

import asyncio

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.desk import UnknownRequest
from tests.rome.agent.iflow.doubles import Judge, Note, Rules, calls, until
from tests.rome.agent.iflow.turns import make, of, play, results


def answer_approvals(agent, *answers):
    """Answer the approvals in order, each shortly after it is asked."""
    waiting = list(answers)

    def on_event(event):
        if isinstance(event, events.ApprovalRequested):
            decision, options = waiting.pop(0)
            asyncio.get_running_loop().call_soon(
                lambda: agent.desk.respond(event.request, decision, **options)
            )

    agent.log.listen(on_event)


def test_where_nobody_is_there_approvals_are_denied_and_questions_empty():
    steps = [calls(("note", {"text": "a"})), calls(("free", {"text": "question"})), "done"]
    agent, _ = make(*steps, tools=[Note(), Note("free")], policy=Rules(note="ask"))
    assert play(agent).outcome == "finished"
    (status, output), question = results(agent)
    assert status == "denied" and "rule for note" in output and "yolo" in output
    assert question == ("ok", "")


@pytest.mark.parametrize(
    ("decision", "options", "outcome", "status", "output"),
    [
        ("allow", {}, "finished", "ok", "noted a"),
        (
            "deny",
            {"note": "use b"},
            "finished",
            "denied",
            "the user denied this call of note: use b",
        ),
        ("stop", {}, "aborted", "denied", "the user denied this call of note"),
    ],
)
def test_an_approval_is_the_users(decision, options, outcome, status, output):
    policy = Rules(note="ask")
    agent, _ = make(calls(("note", {"text": "a"})), "done", policy=policy, is_attended=True)
    answer_approvals(agent, (decision, options))
    assert play(agent).outcome == outcome
    assert results(agent) == [(status, output)]
    [asked] = of(agent, events.ApprovalRequested)
    assert asked.reason == "rule for note" and asked.rule == "note()"


def test_an_approval_for_the_session_adds_a_rule():
    policy = Rules(note="ask")
    steps = [calls(("note", {"text": "a"})), calls(("note", {"text": "b"})), "done"]
    agent, _ = make(*steps, policy=policy, is_attended=True)
    answer_approvals(agent, ("allow", {"scope": "session"}))
    assert play(agent).outcome == "finished"
    assert policy.added == [("note()", "session")]
    assert len(of(agent, events.ApprovalRequested)) == 1


def test_a_cancelled_approval_is_answered_and_an_unknown_one_refused():
    async def steps():
        policy = Rules(note="ask")
        agent, _ = make(calls(("note", {"text": "a"})), policy=policy, is_attended=True)
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: agent.conversation.open_requests)
        assert len(agent.conversation.open_requests) == 1
        agent.cancel()
        await turn
        assert not agent.conversation.open_requests
        request = of(agent, events.ApprovalRequested)[0].request
        with pytest.raises(UnknownRequest):
            agent.desk.respond(request, "allow")

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_a_denied_call_does_not_run_and_the_others_do():
    note, free = Note(), Note("free")
    steps = [calls(("note", {"text": "a"}), ("free", {"text": "b"})), "done"]
    agent, _ = make(*steps, tools=[note, free], policy=Rules(note="deny"))
    assert play(agent).outcome == "finished"
    assert note.seen == [] and free.seen == ["b"]
    assert [status for status, _ in results(agent)] == ["denied", "ok"]


def test_a_supervisor_stops_and_pauses():
    judge = Judge(secret="stop", odd="pause")
    agent, _ = make(calls(("note", {"text": "secret"})), supervisor=judge)
    finished = play(agent)
    assert finished.outcome == "aborted" and "stopped by the supervisor: secrets" in finished.reason
    assert of(agent, events.SupervisorJudged)[0].cost == 0.5
    agent, _ = make(calls(("note", {"text": "odd"})), "ok", supervisor=judge, is_attended=True)
    answer_approvals(agent, ("allow", {}))
    assert play(agent).outcome == "finished"
    assert results(agent) == [("ok", "noted odd")]
