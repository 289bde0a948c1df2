"""What hooks block, change and add in the loop."""

from rome.agent.iflow import events
from tests.rome.agent.iflow.doubles import Note, Programs, Rules, Said, calls
from tests.rome.agent.iflow.turns import make, of, play, results, told


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
