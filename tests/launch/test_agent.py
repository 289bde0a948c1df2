"""The command `iflow`: what scripts read of it, and that a killed session goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from launch.agent import main
from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import read_events
from tests.paths import ROOT
from tests.processes import host_processes
from tests.rome.agent.iflow.scripted import Fail, Say, ScriptedEndpoint, call

HIDDEN = ("IFLOW_", "OPENAI_", "HTTP", "http")  # variables that would change what it does


class Command:
    """Runs `iflow` in a project and a home of their own."""

    def __init__(self, folder):
        self.project, self.home = folder / "project", folder / "home"
        self.project.mkdir()
        self.home.mkdir()

    def start(self, *flags, **options):
        command = [sys.executable, "-m", "launch.agent", "--directory", str(self.project), *flags]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, *flags, given=""):
        """Return the exit status, standard output and standard error."""
        with self.start(*flags) as process:
            try:
                out, err = process.communicate(given, timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return process.returncode, out, err

    def call(self, capsys, *flags):
        """Do the same in this process, which is quicker."""
        try:
            status = main(["--directory", str(self.project), *flags])
        except SystemExit as ended:  # of the parser of flags
            status = ended.code
        return status, *capsys.readouterr()

    def files(self):
        """Return the files of events of all sessions, the oldest first."""
        return sorted(self.home.glob(".iflow/sessions/*/*/events.jsonl"))


@pytest.fixture
def iflow(tmp_path, monkeypatch):
    for name in [*os.environ]:
        if name.startswith(HIDDEN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Command(tmp_path)


HOST = ("--workspace=host", "--yolo")


def test_a_task_is_done_and_its_answer_printed(iflow, capsys):
    with ScriptedEndpoint([call("shell", command="echo 1 > made"), "It is made."]) as server:
        status, out, err = iflow.call(capsys, "-p", "make it", "--base-url", server.url, *HOST)
    assert (status, out, err) == (0, "It is made.\n", "")
    assert (iflow.project / "made").read_text() == "1\n"


def test_json_is_one_object_and_a_session_is_continued(iflow, capsys):
    with ScriptedEndpoint(["one", "two"]) as server:
        flags = ("--base_url", server.url, "--output-format=json", *HOST)
        _, first, _ = iflow.call(capsys, "-p", "a", *flags)
        status, out, _ = iflow.call(capsys, "-p", "b", "--continue", *flags)
    said = json.loads(out)
    assert status == 0 and said["session"] == json.loads(first)["session"]
    assert said["outcome"] == "finished" and said["result"] == "two" and said["turns"] == 1
    assert set(said["usage"]) == {"prompt", "completion", "cached", "price"}
    status, out, _ = iflow.call(capsys, "--list-sessions")
    assert status == 0 and said["session"] in out and " a" in out


def test_the_stream_is_the_file_of_the_session(iflow, capsys):
    script = [call("shell", command="echo hi"), "done"]
    with ScriptedEndpoint(script) as server:
        flags = ("--base_url", server.url, "--output-format", "stream-json", *HOST)
        status, out, _ = iflow.call(capsys, "-p", "a", *flags)
    printed = [json.loads(line) for line in out.splitlines()]
    stored = [json.loads(line) for line in iflow.files()[0].read_text().splitlines()]
    assert status == 0 and [one for one in printed if one["number"] >= 0] == stored
    assert any(one["kind"] == "text_delta" for one in printed)
    assert stored[0]["kind"] == "session_started" and stored[-1]["kind"] == "session_ended"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "say what is to be done"),
        (("-p", "a", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("-p", "a"), "--base_url"),
        (("-p", "a", "--resume", "x", "--base_url=http://127.0.0.1:1"), "no session 'x'"),
        (("-p", "a", "--directory=/none", "--base_url=http://127.0.0.1:1"), "is no directory"),
        (("-p", "a", "--max_price=1", "--base_url=http://127.0.0.1:1"), "--max_price needs"),
    ],
)
def test_wrong_usage_is_one_line_and_status_1(iflow, flags, words, capsys):
    status, out, err = iflow.call(capsys, *flags)
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line_and_status_2(iflow, capsys):
    status, _, err = iflow.call(capsys, "-p", "a", "--base_url=http://127.0.0.1:1/v1", *HOST)
    assert status == 2 and "no server at http://127.0.0.1:1/v1" in err and err.count("\n") == 1


def test_a_limit_is_status_3_and_a_refusing_server_status_2(iflow, capsys):
    with ScriptedEndpoint([call("shell", command="date +%N")] * 5) as server:
        flags = ("--base_url", server.url, *HOST)
        status, _, err = iflow.call(capsys, "-p", "a", "--max-turns=2", *flags)
        assert status == 3 and "limit of 2 turns" in err
    with ScriptedEndpoint([Fail(401, "no")]) as server:
        assert iflow.call(capsys, "-p", "a", "--base_url", server.url, *HOST)[0] == 2


def test_a_worktree_keeps_the_work_apart_and_goes_where_there_was_none(iflow, capsys):
    git = ("git", "-C", str(iflow.project), "-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "begin")):
        subprocess.run([*git, *command], check=True, timeout=60)
    flags = ("--worktree=feature", *HOST)
    with ScriptedEndpoint([call("shell", command="echo 1 > made"), "ok", "nothing"]) as server:
        status, _, err = iflow.call(capsys, "-p", "a", "--base_url", server.url, *flags)
        assert status == 0 and "iflow/feature" in err
        assert not (iflow.project / "made").exists()
        made = iflow.project / ".iflow" / "worktrees" / "feature" / "made"
        assert made.read_text() == "1\n"
        flags = ("--worktree=idle", *HOST)
        assert iflow.call(capsys, "-p", "a", "--base_url", server.url, *flags)[0] == 0
        assert not (iflow.project / ".iflow" / "worktrees" / "idle").exists()
    assert iflow.call(capsys, "-p", "a", "--base_url=x", "--worktree=../x")[0] == 1


def test_a_damaged_settings_file_is_named(iflow, capsys):
    (iflow.project / ".iflow").mkdir()
    (iflow.project / ".iflow" / "settings.json").write_text("{")
    status, _, err = iflow.call(capsys, "-p", "a", "--base_url=http://127.0.0.1:1/v1")
    assert status == 1 and "settings.json" in err


@pytest.mark.long
def test_sigterm_ends_the_turn_in_order_and_is_status_4(iflow):
    nap = f"600.{os.getpid()}"  # longer than the wait for the end
    with (
        ScriptedEndpoint([call("shell", command=f"sleep {nap}")]) as server,
        iflow.start("-p", "a", "--base_url", server.url, "--output-format=json", *HOST) as process,
    ):
        while not host_processes(f"sleep\0{nap}") and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 4 and json.loads(out)["outcome"] == "aborted"
    said = list(read_events(iflow.files()[0]))
    assert isinstance(said[-1], events.SessionEnded)
    assert [one.status for one in said if isinstance(one, events.ToolFinished)] == ["cancelled"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["mcpServers", "hooks"])
def test_a_signal_before_and_after_the_turn_leaves_nothing_behind(iflow, where, number):
    """Before it an MCP server does not answer; after it a hook does not end."""
    command = "touch begun; echo $$ > pid; exec sleep 60"
    server = {"hung": {"command": "bash", "args": ["-c", command]}}
    hook = {"SessionEnd": [{"hooks": [{"command": command}]}]}
    (iflow.project / ".iflow").mkdir()
    settings = {where: server if where == "mcpServers" else hook}
    (iflow.project / ".iflow" / "settings.json").write_text(json.dumps(settings))
    with (
        ScriptedEndpoint(["said"]) as model,
        iflow.start("-p", "a", "--base_url", model.url, "--trust", *HOST) as process,
    ):
        while not (iflow.project / "begun").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 4 and "Traceback" not in err
    assert out == ("said\n" if where == "hooks" else "")
    with pytest.raises(ProcessLookupError):
        os.kill(int((iflow.project / "pid").read_text()), 0)


def test_a_session_without_an_open_turn_needs_a_prompt(iflow, capsys):
    with ScriptedEndpoint(["one", "two"]) as server:
        flags = ("--base_url", server.url, *HOST)
        iflow.call(capsys, "-p", "a", *flags)
        status, out, err = iflow.call(capsys, "--continue", *flags)
        assert (status, out) == (1, "") and "say more by -p" in err
        assert iflow.call(capsys, "--continue", "-p", "b", *flags)[:2] == (0, "two\n")


# -- kill -9
# -------------------------------------------------------------------------------------------------

STEPS = 12


def count_on(messages):
    """Make one call after the other: which one comes next, the results say."""
    done = sum(message["role"] == "tool" for message in messages)
    if done >= STEPS:
        return "done"
    return Say("next", [("shell", {"command": f"echo {done} >> log; sleep 0.03"})], pause=0.005)


def kill_and_resume(iflow, seconds):
    """Kill a session so many seconds after its first question, and go on with it."""
    with ScriptedEndpoint(count_on) as server:
        flags = ("--base_url", server.url, *HOST)
        with iflow.start("-p", "count", *flags) as process:
            while not server.requests:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            time.sleep(seconds)
            process.kill()
        status, out, err = iflow.run("--continue", *flags)
        assert (status, out) == (0, "done\n"), err
        prompt = server.prompts[-1]
    said = list(read_events(iflow.files()[0]))
    assert [event.number for event in said] == list(range(len(said)))
    calls = [one for event in said if isinstance(event, events.AssistantMessage)
             for one in event.tool_calls]  # fmt: skip
    ends = {one.call_id: one.status for one in said if isinstance(one, events.ToolFinished)}
    finished = [one.call_id for one in said if isinstance(one, events.ToolFinished)]
    assert sorted(finished) == sorted(one.id for one in calls), "each call has one result"
    lines = (iflow.project / "log").read_text().split()
    assert len(set(lines)) == len(lines), "nothing was done twice"
    assert len(lines) >= sum(status == "ok" for status in ends.values())
    assert (
        sum(message["role"] == "user" and message["content"] == "count" for message in prompt) == 1
    )
    conversation = Conversation.of(said)
    assert not conversation.open_calls and not conversation.is_working
    return sum(status == "cancelled" for status in ends.values())


@pytest.mark.long
def test_a_killed_session_goes_on(iflow):
    kill_and_resume(iflow, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_session_that_is_killed_anywhere_goes_on(iflow, seed):
    kill_and_resume(iflow, random.Random(seed).uniform(0, 1.2))
