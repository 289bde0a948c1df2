"""Hooks: real processes that answer, block, hang and lie."""

import asyncio
import json
import os
import pathlib
import signal
import time

import pytest

from rome.agent.iflow.specs.hooks import Hooks, fits
from rome.agent.iflow.specs.settings_values import HookCommand


def run(*commands, event="PreToolUse", matcher="", payload=None, folder=".", **fields):
    hooks = [
        one if isinstance(one, HookCommand) else HookCommand(event, one, **fields)
        for one in commands
    ]
    given = {"session_id": "s1", "transcript_path": "/t"} | (payload or {})
    return asyncio.run(Hooks(hooks, str(folder)).run(event, given, matcher=matcher))


def said(**answer) -> str:
    return f"echo '{json.dumps(answer)}'"


def special(**answer) -> str:
    return said(hookSpecificOutput=answer)


def test_a_hook_is_given_the_event_and_the_variables(tmp_path):
    command = f"cat > {tmp_path}/event; env > {tmp_path}/env"
    payload = {"tool_name": "shell", "tool_input": {"command": "ls"}}
    outcome = run(command, payload=payload, matcher="shell", folder=tmp_path)
    assert outcome.decision == "" and outcome.ran[0].exit_code == 0
    event = json.loads((tmp_path / "event").read_text())
    assert event["hook_event_name"] == "PreToolUse" and event["session_id"] == "s1"
    assert event["tool_input"] == {"command": "ls"} and event["cwd"] == str(tmp_path)
    variables = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert variables["IFLOW_TOOL_NAME"] == "shell"
    assert "Bash" in json.loads(variables["IFLOW_TOOL_ALIASES"])
    assert json.loads(variables["IFLOW_TOOL_ARGS"]) == {"command": "ls"}
    assert variables["IFLOW_CWD"] == str(tmp_path) == variables["PWD"]


def test_a_key_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("IFLOW_apiKey", "sk-secret")
    assert "sk-secret" not in run("env", event="SessionStart").context
    assert "IFLOW_SESSION_ID" in run("env", event="SessionStart").context


@pytest.mark.parametrize(
    ("command", "decision", "message"),
    [
        ("exit 0", "", ""),
        ("echo no >&2; exit 2", "block", "no"),
        ("exit 2", "block", "blocked it"),
        ("echo broken >&2; exit 1", "", ""),
        (said(decision="block", reason="why"), "block", "why"),
        (said(decision="approve"), "allow", ""),
        (special(permissionDecision="deny", permissionDecisionReason="r"), "block", "r"),
        (special(permissionDecision="ask"), "ask", ""),
        (special(permissionDecision="allow"), "allow", ""),
        (said(decision=["block"]), "", ""),
        (said(hookSpecificOutput=3), "", ""),
        ("echo '{broken'", "", ""),
        ("head -c 300000 /dev/zero | tr '\\0' x", "", ""),
        ("exec /nonexistent", "", ""),
    ],
)
def test_what_a_hook_may_say(command, decision, message):
    outcome = run(command)
    assert outcome.decision == decision
    assert message in outcome.message


def test_in_iflows_own_files_any_failure_blocks():
    assert run("echo broken >&2; exit 1", is_strict=True).decision == "block"
    assert run("sleep 60", is_strict=True, timeout=0.1).decision == "block"
    assert run("exit 1", is_strict=True, event="PostToolUse").decision == ""


def test_the_strictest_of_several_holds_and_the_last_change_of_arguments():
    outcome = run(
        said(decision="approve", reason="fine"),
        special(permissionDecision="ask", updatedInput={"a": 1}),
        "echo stop >&2; exit 2",
        special(updatedInput={"a": 2}, additionalContext="more"),
    )
    assert (outcome.decision, outcome.message) == ("block", "stop")
    assert outcome.arguments == {"a": 2} and outcome.context == "more"
    assert [one.decision for one in outcome.ran] == ["allow", "ask", "block", ""]


def test_a_hook_may_end_the_turn():
    outcome = run(said(**{"continue": False, "stopReason": "enough"}))
    assert outcome.stop and outcome.message == "enough"


def test_plain_text_is_context_where_the_event_is_about_context():
    assert run("echo hello", event="UserPromptSubmit").context == "hello"
    assert run("echo hello", event="PostToolUse").context == ""


def test_a_matcher_is_the_whole_of_a_name_or_of_another_name():
    def hook(matcher):
        return HookCommand("PreToolUse", "x", matcher)

    assert fits(hook("Bash"), "shell") and fits(hook("Edit|Shell"), "shell")
    assert fits(hook("mcp__github__.*"), "github__get_issue")
    assert fits(hook(""), "x") and fits(hook("*"), "x") and fits(hook("startup|resume"), "resume")
    assert not fits(hook("Edit"), "multi_edit") and not fits(hook("she"), "shell")


def test_hooks_run_at_once(tmp_path):
    meet = f"touch {tmp_path}/$$; until [ $(ls {tmp_path} | wc -l) = 5 ]; do sleep 0.05; done"
    outcome = run(*[meet] * 5)  # none of them ends before all have begun
    assert [one.exit_code for one in outcome.ran] == [0] * 5


def test_a_hook_that_hangs_is_ended_with_its_children(tmp_path):
    # Both sleep for longer than a test may take.
    command = f"sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & sleep 1000"
    outcome = run(command, timeout=2)
    assert outcome.decision == "" and "did not end in 2 s" in outcome.ran[0].message
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_children_that_keep_the_output_open_do_not_hold_the_session(tmp_path):
    outcome = run(f"sleep 1000 & echo $! > {tmp_path}/pid; echo said", event="SessionStart")
    assert outcome.context == "said"
    child = int((tmp_path / "pid").read_text())
    assert is_running(child), "the child's end was waited for"
    os.kill(child, signal.SIGKILL)


def test_a_hook_that_reads_nothing_of_a_large_event():
    assert run("exit 0", payload={"tool_input": {"content": "x" * 5_000_000}}).ran[0].exit_code == 0


def test_a_cancelled_session_leaves_no_hook_behind(tmp_path):
    async def cancel():
        hooks = Hooks([HookCommand("Stop", f"echo $$ > {tmp_path}/pid; exec sleep 100")])
        task = asyncio.create_task(hooks.run("Stop", {}))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancel(), 60))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_hooks_nothing_runs():
    outcome = run(HookCommand("Stop", "exit 2"), event="PreToolUse")
    assert outcome.ran == () and outcome.decision == ""


def test_a_prompt_that_no_variable_can_hold_is_given_all_the_same(tmp_path):
    command = f"cat > {tmp_path}/event"
    payload = {"prompt": "half a pair \ud83d and a nul \0"}
    outcome = run(command, event="UserPromptSubmit", payload=payload, folder=tmp_path)
    assert outcome.ran[0].exit_code == 0
    assert json.loads((tmp_path / "event").read_text())["prompt"] == payload["prompt"]
