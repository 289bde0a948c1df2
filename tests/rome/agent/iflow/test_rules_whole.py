"""The whole agent under rules, hooks and supervisor, against a scripted endpoint."""

import json

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.feedback import judged_answers, sft_rows
from rome.agent.iflow.user_input import InputError, expand
from rome.data.formats.detect import read_record
from tests.rome.agent.iflow.scripted import Say, call
from tests.rome.agent.iflow.whole import Whole


@pytest.fixture
def whole(tmp_path):
    return Whole(tmp_path)


def shell(command: str) -> Say:
    return call("shell", command=command)


def test_hooks_of_a_project_run_only_after_trust(whole):
    hook = {"matcher": "Bash", "hooks": [{"command": "echo not here >&2; exit 2"}]}
    whole.write(".iflow/settings.json", {"hooks": {"PreToolUse": [hook]}})
    played = whole.play([shell("echo hi"), Say("done")])
    assert played.statuses == ["ok"] and not played.of(events.HookRan)
    played = whole.play([shell("echo hi"), Say("done")], trust=True)
    assert played.statuses == ["denied"] and "not here" in played.outputs[0]
    assert played.ends[0].outcome == "finished"


def test_a_rule_of_the_project_that_forbids_holds_without_trust_and_in_yolo(whole):
    whole.write(".claude/settings.json", {"permissions": {"deny": ["Bash(touch:*)"]}})
    answers = [shell("echo ok"), shell("env A=b sh -c 'cd .; touch evil'"), Say("done")]
    played = whole.play(answers)
    assert played.statuses == ["ok", "denied"]
    assert "the rule deny Bash(touch:*)" in played.outputs[1]
    assert not (whole.project / "evil").exists()


def test_plan_mode_reads_and_nothing_else(whole):
    whole.write("a.txt", "text")
    answers = [
        shell("cat a.txt | head -1"),
        shell("cat a.txt; touch b"),
        call("write_file", path="c", content="x"),
        Say("done"),
    ]
    played = whole.play(answers, mode="plan")
    assert played.statuses == ["ok", "denied", "denied"]
    assert "plan mode only reads" in played.outputs[1]
    assert sorted(path.name for path in whole.project.iterdir()) == ["a.txt"]


def test_the_supervisor_stops_a_turn_and_its_verdicts_are_in_the_record(whole):
    whole.write("~/.iflow/settings.json", {"supervisor": True})
    whole.write(".env", "KEY=1")
    answers = [shell("echo work"), shell("cat .env"), shell("xmrig --version"), Say("not reached")]
    played = whole.play(answers)
    assert played.statuses == ["ok", "denied", "denied"]
    assert "it reads a secret" in played.outputs[1]
    judged = played.of(events.SupervisorJudged)
    assert [(one.verdict, one.rule, one.cost) for one in judged] == [
        ("pause", "secret_read", 0.5),
        ("stop", "mining", 1.0),
    ]
    assert played.ends[0].outcome == "aborted"
    assert "it uses the machine to earn money" in played.ends[0].reason


def test_feedback_on_a_real_session_becomes_a_row_that_training_reads(whole):
    played = whole.play([shell("echo hi"), Say("It says hi.")])
    answer = played.of(events.AssistantMessage)[-1]
    given = events.FeedbackGiven(target=answer.number, verdict="accept")
    (row,) = sft_rows(judged_answers([*played.events, given]))
    name, conversation = read_record(json.loads(json.dumps(row)))
    assert name == "openai"
    learned = [one for one in conversation.messages if one.role == "assistant" and one.learned]
    assert [one.text for one in learned][-1] == "It says hi." and learned[0].calls
    shown = [tool["function"]["name"] for tool in played.requests[0]["tools"]]
    assert [tool["function"]["name"] for tool in conversation.tools] == shown


def test_a_search_shows_nothing_of_files_that_may_not_be_read(tmp_path):
    whole = Whole(tmp_path)
    whole.write("~/.iflow/settings.json", {"permissions": {"deny": ["Read(secrets/**)"]}})
    whole.write("secrets/key", "token one")
    whole.write("a.txt", "token two")
    script = [call("search", pattern="token", files_only=only) for only in (True, False)]
    script.append(call("search", pattern="token", path="secrets"))
    played = whole.play([*script, "done"])
    assert played.outputs[:2] == ["a.txt", "a.txt:1:token two"]
    assert "key" not in played.outputs[2]


def test_a_file_that_must_not_be_read_is_not_in_the_sandbox(whole):
    """Whatever looks for it there: a pattern, an archive, a program of the agent's own."""
    whole.write(
        "~/.iflow/settings.json", {"permissions": {"deny": ["Read(secrets/**)", "Read(.env)"]}}
    )
    whole.write("secrets/key", "s3cret")
    whole.write("app/.env", "s3cret")
    whole.write("app/main.py", "print(1)")
    program = (
        "import os; print([open(os.path.join(a, n)).read() for a, _, f in os.walk('.') for n in f])"
    )
    script = [
        shell("grep -r s3cret . ; tar cf - . | grep -c s3cret; ls -A . app"),
        shell(f'python3 -c "{program}"'),
        "ok",
    ]
    played = whole.play(script, workspace="sandbox", mode="yolo")
    assert played.statuses == ["ok", "ok"]
    assert "s3cret" not in "".join(played.outputs) and "main.py" in played.outputs[0]
    assert (whole.project / "secrets" / "key").read_text() == "s3cret"


def test_in_a_sandbox_a_directory_of_an_earlier_call_hides_no_path(whole):
    whole.write("~/.iflow/settings.json", {"permissions": {"deny": ["Edit(kept/**)"]}})
    whole.write("kept/a.txt", "as it was")
    script = [shell("cd kept"), shell("echo x > a.txt"), shell("cd ..; cat kept/a.txt"), "ok"]
    played = whole.play(script, workspace="sandbox", mode="yolo")
    assert played.statuses == ["ok", "denied", "ok"]
    assert "as it was" in played.outputs[2]


def test_hooks_run_in_the_project_where_tools_work_in_a_sandbox(whole):
    hook = {"matcher": "Bash", "hooks": [{"command": "test -f here && exit 2 || exit 0"}]}
    whole.write("~/.iflow/settings.json", {"hooks": {"PreToolUse": [hook]}})
    whole.write("here", "")
    played = whole.play([shell("echo hi"), "ok"], workspace="sandbox")
    assert played.statuses == ["denied"]


def test_files_that_a_commands_text_names_are_read_under_the_rules(whole):
    whole.write(".iflow/settings.json", {"permissions": {"deny": ["Read(.env)"]}})
    named = {"leak": "../outside", "hidden": ".env", "fine": "a.txt"}
    for name, path in named.items():
        whole.write(f".claude/commands/{name}.md", f"Look at @{path}")
        whole.write(path, "what is in it")
    told = {}

    async def use(opened):
        for name in named:
            try:
                told[name] = await expand(f"/{name}", opened)
            except InputError as error:
                told[name] = str(error)

    whole.play([], use, mode="default")
    assert "outside the project" in told["leak"] and "Read(.env)" in told["hidden"]
    assert [name for name, text in told.items() if "what is in it" in text] == ["fine"]


def test_sub_agents_have_the_model_that_the_user_chose(whole):
    async def change(opened):
        model = await opened.make_model("scripted")
        model.name = model._endpoint.model = "another"
        opened.agent.set_model(model)

    played = whole.play([call("task", prompt="work"), "sub", "done"], change, "go")
    assert [request["model"] for request in played.requests] == ["another"] * 3
