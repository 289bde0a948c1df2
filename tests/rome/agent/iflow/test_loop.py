"""The loop: what it runs, in which order, how it ends, and that nothing breaks it."""

import asyncio
import json

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.limits import Limits
from rome.agent.iflow.loop import AgentError
from rome.agent.iflow.models.model import ModelError
from tests.rome.agent.iflow.doubles import (
    CONTEXT_FULL,
    Note,
    Programs,
    Rules,
    ScriptedModel,
    Shortener,
    Stubborn,
    calls,
    until,
)
from tests.rome.agent.iflow.turns import make, of, play, results, told


def test_a_turn_runs_calls_until_the_model_makes_none():
    agent, model = make(calls(("note", {"text": "a"})), "done", system="You are it.")
    finished = play(agent)
    assert finished.outcome == "finished"
    assert finished.usage.prompt == 20 and finished.usage.completion == 10
    roles = [message.role for message in model.asked[1]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert model.asked[1][3].content == "noted a"
    kinds = [event.kind for event in agent.log.events]
    assert kinds == [
        "session_started",
        "turn_started",
        "user_message",
        "assistant_message",
        "tool_started",
        "tool_finished",
        "assistant_message",
        "turn_finished",
    ]


def test_calls_run_together_only_where_all_of_them_may():
    safe, other = Note("safe", is_parallel=True), Note("other")
    slow_first = [("safe", {"text": str(n), "wait": 0.15 - 0.05 * n}) for n in range(3)]
    agent, model = make(calls(*slow_first), "done", tools=[safe, other])
    play(agent)
    assert safe.most_running == 3 and safe.seen == ["2", "1", "0"]
    shown = [message.content for message in model.asked[1] if message.role == "tool"]
    assert shown == ["noted 0", "noted 1", "noted 2"], "results stand in the order of the calls"
    mixed = [*slow_first, ("other", {"text": "x"})]
    safe.seen.clear()
    safe.most_running = 0
    agent, _ = make(calls(*mixed), "done", tools=[safe, other])
    play(agent)
    assert safe.most_running == 1 and safe.seen == ["0", "1", "2"]


def test_no_more_calls_run_at_once_than_the_limit_says():
    safe = Note("safe", is_parallel=True)
    many = [("safe", {"text": str(n), "wait": 0.02}) for n in range(9)]
    agent, _ = make(calls(*many), "done", tools=[safe], limits=Limits(parallel=2))
    play(agent)
    assert safe.most_running == 2 and len(safe.seen) == 9


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nothing", {}, "there is no tool 'nothing'; there are note"),
        ("note", "{broken", "the arguments of note are no JSON"),
        ("note", "[1]", "must be an object"),
        ("note", {}, "note needs text"),
        ("note", {"text": 3}, "must be of type string"),
        ("note", {"text": "x", "more": 1}, "takes no more"),
        ("note", "[" * 100_000, "no JSON"),
        ("note", {"text": "fail"}, "it failed as asked"),
        ("note", {"text": "bug"}, "failed inside: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_call_is_told_to_the_model(name, arguments, message):
    agent, model = make(calls((name, arguments)), "I see")
    assert play(agent).outcome == "finished"
    [(status, output)] = results(agent)
    assert status == "error" and message in output
    assert model.asked[1][-1].content == output


def test_an_answer_that_cannot_be_read_is_answered():
    agent, model = make(AssistantMessage(text="<tool_call>{", malformed="it is no JSON"), "sorry")
    assert play(agent).outcome == "finished"
    assert "could not be read: it is no JSON" in model.asked[1][-1].content
    assert model.asked[1][-1].role == "user"


def test_a_broken_workspace_ends_the_turn_as_infrastructure():
    agent, _ = make(calls(("note", {"text": "broken place"}), ("note", {"text": "b"})))
    assert play(agent).outcome == "infrastructure"
    assert [status for status, _ in results(agent)] == ["infrastructure", "cancelled"]


def test_a_model_that_does_not_answer_ends_the_turn_as_infrastructure():
    agent, _ = make(ModelError("no server at http://x"))
    finished = play(agent)
    assert (finished.outcome, finished.reason) == ("infrastructure", "no server at http://x")


def test_a_context_that_is_too_long_is_made_shorter_once():
    shortener = Shortener()
    agent, model = make(CONTEXT_FULL, "done", context=shortener)
    assert play(agent).outcome == "finished"
    assert shortener.triggers == ["overflow"]
    assert [message.content for message in model.asked[1]] == ["all of it"]
    assert model.edges[1] == "compaction"
    agent, _ = make(CONTEXT_FULL, context=Shortener())
    assert play(agent).outcome == "limit"
    agent, _ = make(CONTEXT_FULL)
    assert play(agent).outcome == "limit"


@pytest.mark.parametrize(
    ("limits", "answers"),
    [
        (Limits(turns=3), 3),
        (Limits(tokens=40), 3),  # 15 an answer
        (Limits(price=0.25), 3),  # 0.1 an answer
    ],
)
def test_a_limit_ends_the_turn(limits, answers):
    steps = [calls(("note", {"text": str(n)}), price=0.1) for n in range(10)]
    agent, model = make(*steps, limits=limits)
    finished = play(agent)
    assert finished.outcome == "limit" and "limit of" in finished.reason
    assert len(model.asked) == answers
    assert len(results(agent)) == answers, "the calls of the last answer are run"
    assert play(agent).outcome == "limit"
    assert len(model.asked) == 2 * answers, "each turn has its own limits"


def test_the_limit_of_time_ends_a_call_that_runs():
    agent, _ = make(calls(("note", {"text": "a", "wait": 600})), limits=Limits(seconds=0.2))
    assert play(agent).outcome == "limit"
    assert [status for status, _ in results(agent)] == ["cancelled"]


def test_one_call_has_a_limit_of_time_that_waiting_for_the_user_does_not_count_for():
    agent, _ = make(
        calls(("note", {"text": "a", "wait": 600})), "ok", limits=Limits(tool_seconds=0.1)
    )
    assert play(agent).outcome == "finished"
    assert "did not end within 0.1 s" in results(agent)[0][1]

    async def steps():
        limits = Limits(tool_seconds=0.1)
        agent, _ = make(
            calls(("note", {"text": "question"})), "ok", is_attended=True, limits=limits
        )
        agent.log.listen(
            lambda event: (
                isinstance(event, events.QuestionAsked)
                and asyncio.get_running_loop().call_later(
                    0.4, lambda: agent.desk.respond(event.request, answer="b")
                )
            )
        )
        await agent.run("go")
        assert results(agent) == [("ok", "b")]

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_the_same_call_again_and_again_is_noticed_and_then_stopped():
    agent, model = make(calls(("note", {"text": "same"})))
    finished = play(agent)
    assert finished.outcome == "limit" and "made 8 times" in finished.reason
    assert len(model.asked) == 8
    assert len(told(agent, "reminder")) == 1
    assert "made 5 times" in model.asked[5][-1].content


def test_a_circle_of_two_calls_is_stopped_and_progress_is_not():
    two = [calls(("note", {"text": str(n % 2)})) for n in range(40)]
    agent, model = make(*two)
    assert play(agent).outcome == "limit" and len(model.asked) == 15
    agent, model = make(*[calls(("note", {"text": str(n)})) for n in range(60)], "done")
    assert play(agent).outcome == "finished"


def test_failures_in_a_row_are_noticed_and_then_stopped():
    steps = [calls(("note", json.dumps({"text": "fail", "wait": n / 1000}))) for n in range(9)]
    agent, _ = make(*steps)
    finished = play(agent)
    assert finished.outcome == "limit" and "8 calls in a row failed" in finished.reason
    assert "5 calls in a row failed" in told(agent, "reminder")[0]
    agent, _ = make(AssistantMessage(text="<tool_call>", malformed="no end"))
    assert play(agent).outcome == "limit"


def test_an_answer_that_is_cut_goes_on_a_few_times():
    agent, model = make(AssistantMessage(text="long", finish="length"), "the rest")
    assert play(agent).outcome == "finished" and len(model.asked) == 2
    agent, model = make(AssistantMessage(text="long", finish="length"))
    assert play(agent).outcome == "limit" and len(model.asked) == 4
    agent, model = make(AssistantMessage(text="long", finish="length", chunk=0))
    assert play(agent).outcome == "limit" and len(model.asked) == 1


def test_what_the_user_says_meanwhile_arrives_between_two_steps():
    async def steps():
        note = Note()
        script = [calls(("note", {"text": "a", "wait": 0.1})), "done", "done again"]
        agent, model = make(*script, tools=[note])
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: note.running)
        agent.steer("and b")
        assert (await turn).outcome == "finished"
        assert [message.role for message in model.asked[1]] == ["user", "assistant", "tool", "user"]
        assert model.asked[1][-1].content == "and b"

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_what_the_user_says_during_the_last_answer_is_read():
    agent, model = make(lambda _: (agent.steer("wait"), "done")[1], "really done")
    assert play(agent).outcome == "finished"
    assert [message.content for message in model.asked[1]][-2:] == ["done", "wait"]


def cancel_during(*steps, tool, has_begun):
    """Play the steps, cancel the turn once `has_begun(agent, model)`, and go on with another one.

    What the steps wait for takes longer than this function may: a turn that waited for it fails.
    """

    async def run():
        agent, model = make(*steps, "after", tools=[tool])
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: has_begun(agent, model))
        agent.cancel()
        finished = await turn
        assert finished.outcome == "aborted"
        again = await agent.run("go on")
        assert again.outcome == "finished"
        return agent, model

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_turn_can_be_cancelled_while_the_model_answers():
    is_answering = asyncio.Event()

    async def slow():
        is_answering.set()
        await asyncio.sleep(600)

    _, model = cancel_during(
        lambda _: slow(), tool=Note(), has_begun=lambda agent, model: is_answering.is_set()
    )
    assert [message.content for message in model.asked[1]] == ["go", "go on"]


def test_a_turn_can_be_cancelled_while_calls_run():
    note = Note()
    waits = [("note", {"text": "a", "wait": 600}), ("note", {"text": "b"})]
    agent, model = cancel_during(
        calls(*waits), tool=note, has_begun=lambda agent, model: note.running
    )
    assert [status for status, _ in results(agent)] == ["cancelled", "cancelled"]
    roles = [message.role for message in model.asked[1]]
    assert roles == ["user", "assistant", "tool", "tool", "user"]
    note = Note(is_parallel=True)
    waits = [("note", {"text": "a"}), ("note", {"text": "b", "wait": 600})]
    agent, _ = cancel_during(
        calls(*waits), tool=note, has_begun=lambda agent, model: note.running and results(agent)
    )
    assert sorted(status for status, _ in results(agent)) == ["cancelled", "ok"]


def test_a_tool_that_ignores_its_cancellation_is_left_behind():
    stubborn = Stubborn()
    agent, _ = cancel_during(
        calls(("stubborn", {})), tool=stubborn, has_begun=lambda agent, model: stubborn.running
    )
    assert [status for status, _ in results(agent)] == ["cancelled"]
    assert any("left behind" in notice.text for notice in of(agent, events.Notice))


def test_a_program_that_cancels_a_turn_leaves_a_state_to_go_on_from():
    async def steps():
        note = Note()
        agent, _ = make(calls(("note", {"text": "a", "wait": 600})), "after", tools=[note])
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: note.running)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert not agent.is_working and not agent.conversation.open_calls
        assert of(agent, events.TurnFinished)[-1].outcome == "aborted"
        assert (await agent.run("on")).outcome == "finished"

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_a_second_turn_at_the_same_time_is_refused():
    async def steps():
        note = Note()
        agent, _ = make(calls(("note", {"text": "a", "wait": 0.2})), "done", tools=[note])
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: note.running)
        with pytest.raises(AgentError, match="steer it"):
            await agent.run("other")
        with pytest.raises(AgentError, match="cancel its turn"):
            await agent.rewind(0)
        await turn

    asyncio.run(asyncio.wait_for(steps(), 60))


# -- modes, rewind, environment
# -------------------------------------------------------------------------------------------------


def test_plan_mode_is_told_once_and_the_policy_knows_every_change():
    policy = Rules()
    agent, _ = make("one", "two", policy=policy, mode="plan")
    play(agent)
    play(agent)
    assert len(told(agent, "reminder")) == 1 and policy.mode == "plan"
    agent.set_mode("yolo")
    assert policy.mode == "yolo" and agent.conversation.mode == "yolo"


def test_a_rewind_takes_back_what_was_said_and_done():
    async def steps():
        write = Note("write", access="write")
        two = calls(("write", {"text": "a"}), ("write", {"text": "b"}))
        agent, model = make("zero", two, "one", "two", "three", tools=[write], has_checkpoints=True)
        files = agent.workspace
        for text in ("first", "second", "third"):
            await agent.run(text)
        assert files.taken == 1, "one before the first change of a turn"
        _, second, third = agent.conversation.requests
        await agent.rewind(third.number, conversation=False)
        assert files.restored == [], "nothing was changed since then"
        await agent.rewind(second.number)
        assert files.restored == ["checkpoint 1"]
        await agent.run("other")
        assert [message.content for message in model.asked[-1]] == ["first", "zero", "other"]
        with pytest.raises(AgentError, match="no message"):
            await agent.rewind(third.number)
        return agent

    agent = asyncio.run(asyncio.wait_for(steps(), 60))
    assert Conversation.of(agent.log.events).messages == agent.conversation.messages


def test_a_model_can_be_changed_and_a_session_ended():
    async def steps():
        hooks = Programs()
        agent, _ = make("one", hooks=hooks)
        await agent.run("a")
        other = ScriptedModel("two")
        other.name = "other"
        agent.set_model(other)
        await agent.run("b")
        assert len(other.asked) == 1 and agent.conversation.model == "other"
        await agent.aclose()
        assert isinstance(agent.log.events[-1], events.SessionEnded)
        assert hooks.payloads[-1]["hook_event_name"] == "SessionEnd"

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_an_agent_that_is_closed_while_it_works_ends_its_turn_first():
    async def steps():
        note = Note()
        agent, _ = make(calls(("note", {"text": "a", "wait": 600})), tools=[note])
        turn = asyncio.create_task(agent.run("go"))
        await until(lambda: note.running)
        await agent.aclose("aborted")
        assert [event.kind for event in agent.log.events[-2:]] == ["turn_finished", "session_ended"]
        assert (await turn).outcome == "aborted"

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_cut_answers_count_in_a_row_only():
    script = []
    for number in range(5):
        script += [
            AssistantMessage(text="part", finish="length"),
            calls(("note", {"text": str(number)})),
        ]
    agent, _ = make(*script, "done")
    assert play(agent).outcome == "finished"
