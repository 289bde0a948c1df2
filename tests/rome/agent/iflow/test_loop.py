"""The loop: what it runs, in which order, how it ends, and that nothing breaks it."""

import asyncio
import json
import time

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.desk import Desk, UnknownRequest
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.limits import Limits
from rome.agent.iflow.loop import Agent, AgentError
from rome.agent.iflow.models.model import ModelError
from tests.rome.agent.iflow.doubles import (
    CONTEXT_FULL,
    Folder,
    Judge,
    Note,
    Programs,
    Rules,
    Said,
    ScriptedModel,
    Shortener,
    Stubborn,
    calls,
)


def make(*steps, tools=(), log=None, is_attended=False, **options):
    log = log or EventLog()
    desk = Desk(log, is_attended=is_attended)
    model = ScriptedModel(*steps)
    tools = tools or [Note()]
    return Agent(model, tools, log, Folder(), desk=desk, **options), model


def play(agent, text="do it"):
    return asyncio.run(asyncio.wait_for(agent.run(text), 20))


def of(agent, kind):
    return [event for event in agent.log.events if isinstance(event, kind)]


def results(agent):
    return [(done.status, done.output) for done in of(agent, events.ToolFinished)]


def told(agent, source):
    return [said.text for said in of(agent, events.UserMessage) if said.source == source]


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
    agent, _ = make(calls(("note", {"text": "a", "wait": 30})), limits=Limits(seconds=0.2))
    began = time.monotonic()
    assert play(agent).outcome == "limit"
    assert time.monotonic() - began < 2
    assert [status for status, _ in results(agent)] == ["cancelled"]


def test_one_call_has_a_limit_of_time_that_waiting_for_the_user_does_not_count_for():
    agent, _ = make(
        calls(("note", {"text": "a", "wait": 30})), "ok", limits=Limits(tool_seconds=0.1)
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

    asyncio.run(asyncio.wait_for(steps(), 20))


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
        agent, model = make(calls(("note", {"text": "a", "wait": 0.1})), "done", "done again")
        turn = asyncio.create_task(agent.run("go"))
        await asyncio.sleep(0.05)
        agent.steer("and b")
        assert (await turn).outcome == "finished"
        assert [message.role for message in model.asked[1]] == ["user", "assistant", "tool", "user"]
        assert model.asked[1][-1].content == "and b"

    asyncio.run(asyncio.wait_for(steps(), 20))


def test_what_the_user_says_during_the_last_answer_is_read():
    agent, model = make(lambda _: (agent.steer("wait"), "done")[1], "really done")
    assert play(agent).outcome == "finished"
    assert [message.content for message in model.asked[1]][-2:] == ["done", "wait"]


def cancel_during(*steps, tools=()):
    async def run():
        agent, model = make(*steps, "after", tools=tools)
        turn = asyncio.create_task(agent.run("go"))
        await asyncio.sleep(0.15)
        began = time.monotonic()
        agent.cancel()
        finished = await turn
        assert time.monotonic() - began < 1
        assert finished.outcome == "aborted"
        again = await agent.run("go on")
        assert again.outcome == "finished"
        return agent, model

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_a_turn_can_be_cancelled_while_the_model_answers():
    async def slow():
        await asyncio.sleep(30)

    _, model = cancel_during(lambda _: slow())
    assert [message.content for message in model.asked[1]] == ["go", "go on"]


def test_a_turn_can_be_cancelled_while_calls_run():
    waits = [("note", {"text": "a", "wait": 30}), ("note", {"text": "b"})]
    agent, model = cancel_during(calls(*waits))
    assert [status for status, _ in results(agent)] == ["cancelled", "cancelled"]
    roles = [message.role for message in model.asked[1]]
    assert roles == ["user", "assistant", "tool", "tool", "user"]
    waits = [("note", {"text": "a"}), ("note", {"text": "b", "wait": 30})]
    agent, _ = cancel_during(calls(*waits), tools=[Note(is_parallel=True)])
    assert sorted(status for status, _ in results(agent)) == ["cancelled", "ok"]


def test_a_tool_that_ignores_its_cancellation_is_left_behind():
    agent, _ = cancel_during(calls(("stubborn", {})), tools=[Stubborn()])
    assert [status for status, _ in results(agent)] == ["cancelled"]
    assert any("left behind" in notice.text for notice in of(agent, events.Notice))


def test_a_program_that_cancels_a_turn_leaves_a_state_to_go_on_from():
    async def steps():
        agent, _ = make(calls(("note", {"text": "a", "wait": 30})), "after")
        turn = asyncio.create_task(agent.run("go"))
        await asyncio.sleep(0.1)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert not agent.is_working and not agent.conversation.open_calls
        assert of(agent, events.TurnFinished)[-1].outcome == "aborted"
        assert (await agent.run("on")).outcome == "finished"

    asyncio.run(asyncio.wait_for(steps(), 20))


def test_a_second_turn_at_the_same_time_is_refused():
    async def steps():
        agent, _ = make(calls(("note", {"text": "a", "wait": 0.2})), "done")
        turn = asyncio.create_task(agent.run("go"))
        await asyncio.sleep(0.05)
        with pytest.raises(AgentError, match="steer it"):
            await agent.run("other")
        with pytest.raises(AgentError, match="cancel its turn"):
            await agent.rewind(0)
        await turn

    asyncio.run(asyncio.wait_for(steps(), 20))


# -- approval
# -------------------------------------------------------------------------------------------------


def answer_approvals(agent, *answers):
    """AssistantMessage the approvals in order, each shortly after it is asked."""
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
        await asyncio.sleep(0.05)
        assert len(agent.conversation.open_requests) == 1
        agent.cancel()
        await turn
        assert not agent.conversation.open_requests
        request = of(agent, events.ApprovalRequested)[0].request
        with pytest.raises(UnknownRequest):
            agent.desk.respond(request, "allow")

    asyncio.run(asyncio.wait_for(steps(), 20))


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


# -- hooks
# -------------------------------------------------------------------------------------------------


def test_hooks_block_change_and_comment_calls():
    def before(payload):
        text = payload["tool_input"]["text"]
        if text == "bad":
            return Said("block", message="not this one")
        return Said(arguments={"text": text.upper()}, context="be quick")

    hooks = Programs(PreToolUse=before, PostToolUse=Said("block", message="run the tests"))
    note = Note()
    steps = [calls(("note", {"text": "bad"})), calls(("note", {"text": "good"})), "done"]
    agent, _ = make(*steps, tools=[note], hooks=hooks)
    assert play(agent).outcome == "finished"
    assert results(agent) == [("denied", "not this one"), ("ok", "noted GOOD")]
    assert told(agent, "hook") == ["be quick", "run the tests"]
    assert of(agent, events.ToolStarted)[0].call.arguments == '{"text": "GOOD"}'
    assert hooks.payloads[-1]["session_id"] == agent.session


def test_hooks_refuse_a_prompt_and_make_the_agent_go_on():
    agent, model = make("done", hooks=Programs(UserPromptSubmit=Said("block", message="no")))
    finished = play(agent)
    assert (finished.outcome, finished.reason, model.asked) == ("aborted", "no", [])
    agent, model = make("done", hooks=Programs(Stop=Said("block", message="test it")))
    assert play(agent).outcome == "finished", "a hook that always blocks does not hold for ever"
    assert len(model.asked) == 9 and told(agent, "hook") == ["test it"] * 8


def test_a_hook_allows_or_asks_in_place_of_the_rules_but_never_lifts_a_denial():
    def play_with(decision, rule):
        hooks = Programs(PreToolUse=Said(decision))
        agent, _ = make(calls(("note", {"text": "a"})), "ok", hooks=hooks, policy=Rules(note=rule))
        play(agent)
        return results(agent)[0][0]

    assert play_with("allow", "ask") == "ok"
    assert play_with("ask", "allow") == "denied"
    assert play_with("allow", "deny") == "denied"


def test_the_hook_of_the_environment_adds_to_the_system_text():
    hooks = Programs(SetUpEnvironment=Said(context="CUDA 12"), SessionStart=Said(context="hello"))
    agent, model = make("done", hooks=hooks, system="You are it.")
    play(agent)
    assert model.asked[0][0].content == "You are it.\n\nCUDA 12"
    assert "hello" in model.asked[0][-1].content


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

    agent = asyncio.run(asyncio.wait_for(steps(), 20))
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

    asyncio.run(asyncio.wait_for(steps(), 20))


def test_an_agent_that_is_closed_while_it_works_ends_its_turn_first():
    async def steps():
        agent, _ = make(calls(("note", {"text": "a", "wait": 30})))
        turn = asyncio.create_task(agent.run("go"))
        await asyncio.sleep(0.05)
        await agent.aclose("aborted")
        assert [event.kind for event in agent.log.events[-2:]] == ["turn_finished", "session_ended"]
        assert (await turn).outcome == "aborted"

    asyncio.run(asyncio.wait_for(steps(), 20))


def test_cut_answers_count_in_a_row_only():
    script = []
    for number in range(5):
        script += [
            AssistantMessage(text="part", finish="length"),
            calls(("note", {"text": str(number)})),
        ]
    agent, _ = make(*script, "done")
    assert play(agent).outcome == "finished"
