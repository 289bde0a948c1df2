"""Sessions are found, listed, forked and gone on with; long ones stay quick."""

import json
import pathlib
import resource
import subprocess
import sys
import time

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventError, EventLog
from rome.agent.iflow.sessions import SessionStore, SessionUnavailable
from tests.paths import ROOT


@pytest.fixture
def store(tmp_path):
    return SessionStore(tmp_path / "project", tmp_path / "home")


def say(session, text):
    session.log.append(events.UserMessage(text=text))


def begin(store, text):
    session = store.new()
    say(session, text)
    session.close()
    return session.id


def test_sessions_are_listed_newest_first_with_their_first_request(store):
    first = begin(store, "fix the parser\nplease")
    second = begin(store, "write tests")
    store.new().close()  # nothing was said in it
    opened = store.open(first)
    time.sleep(0.01)
    say(opened, "go on")
    opened.close()
    assert [(one.id, one.title) for one in store.list()] == [
        (first, "fix the parser"),
        (second, "write tests"),
    ]
    latest = store.latest()
    assert latest.id == first and len(latest.log.events) == 2
    latest.close()


def test_a_session_is_found_by_the_beginning_of_its_id(store):
    id = begin(store, "a")
    store.open(id[:-2]).close()
    for wrong in ("nothing", "../x", ""):
        with pytest.raises(SessionUnavailable):
            store.open(wrong)
    begin(store, "b")
    with pytest.raises(SessionUnavailable, match="several sessions"):
        store.open(id[:4])


def test_projects_do_not_see_each_others_sessions(store, tmp_path):
    begin(store, "a")
    for other in ("project-x", "project/x", "x/project"):
        assert SessionStore(tmp_path / other, tmp_path / "home").list() == []
    with pytest.raises(SessionUnavailable, match="no session to continue"):
        SessionStore(tmp_path / "other", tmp_path / "home").latest()


def test_a_fork_goes_its_own_way(store):
    id = begin(store, "a")
    folder = store.folder / id
    (folder / "subagents").mkdir()
    (folder / "subagents" / "x").write_text("kept")
    open_elsewhere = store.open(id)
    fork = store.fork(id)
    say(fork, "b")
    assert len(fork.log.events) == 2 and len(open_elsewhere.log.events) == 1
    assert (fork.folder / "subagents" / "x").read_text() == "kept"
    fork.close()
    open_elsewhere.close()


def test_a_session_is_open_in_one_process_and_free_after_a_kill(store):
    id = begin(store, "a")
    program = (
        "import sys, time, pathlib\n"
        "from rome.agent.iflow.sessions import OpenSession\n"
        "held = OpenSession(pathlib.Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(store.folder / id)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(SessionUnavailable, match="another process"):
            store.open(id)
        process.kill()
        process.wait(60)
    store.open(id).close()


def test_a_torn_line_is_cut_and_a_damaged_file_named(store):
    id = begin(store, "a")
    path = store.folder / id / "events.jsonl"
    with path.open("ab") as file:
        file.write(b'{"kind": "user_message", "te')
    session = store.open(id)
    say(session, "b")
    session.close()
    assert [event.text for event in EventLog(path).events] == ["a", "b"]
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(EventError, match=r"events.jsonl:1"):
        store.open(id)


@pytest.mark.parametrize("line", ["[]", "5", "null", '{"kind": []}'])
def test_a_line_that_is_no_event_is_named(store, line):
    id = begin(store, "a")
    with (store.folder / id / "events.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(EventError, match=r"events.jsonl:2 is no event"):
        store.open(id)
    assert [one.title for one in store.list()] == ["a"]


def test_the_file_is_utf_8_whatever_was_said(store):
    session = store.new()
    said = "caf\udce9 \ud83d \u00e9"  # as from a file in latin-1, and half of a pair
    session.log.append(events.UserMessage(text=said))
    session.close()
    lines = (session.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["text"] == said
    assert store.open(session.id).log.events[-1].text == said


def test_a_full_disk_keeps_whole_lines_only(store):
    """An event that does not fit is not kept; those after it are whole once there is room."""
    session = store.new()
    say(session, "a")
    told = []
    session.log.listen(told.append)
    size = session.log.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the session.*events.jsonl"):
            say(session, "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not told and len(session.log.events) == 1
    say(session, "c")
    session.close()
    kept = EventLog(session.log.path).events
    assert [(event.number, event.text) for event in kept] == [(0, "a"), (1, "c")]


def long_session(path: pathlib.Path, count: int) -> None:
    """Write a session of so many events, as an agent would: calls of 200 characters of output."""
    log = EventLog(path)
    log.append(
        events.SessionStarted(session="s", directory="/p", model="m", mode="yolo", system="s" * 999)
    )
    number = 0
    while len(log.events) < count:
        call = events.ToolCall(f"c{number}", "shell", '{"command": "ls"}')
        log.append(events.AssistantMessage(text="I look", tool_calls=(call,), finish="tool_calls"))
        log.append(events.ToolStarted(call=call))
        log.append(events.ToolFinished(call_id=call.id, output="x" * 200))
        number += 1
    log.close()


def seconds_to_open(path: pathlib.Path) -> float:
    began = time.process_time()
    log = EventLog(path)
    conversation = Conversation.of(log.events)
    assert len(conversation.messages) > len(log.events) / 2
    log.close()
    return time.process_time() - began


def test_a_session_of_10000_events_is_linear_in_size_and_in_the_time_to_open(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    long_session(small, 1_000)
    long_session(large, 10_000)
    ratio = large.stat().st_size / small.stat().st_size
    assert 9 < ratio < 11
    # Ten times as long were it linear, a hundred times were it a square.
    assert seconds_to_open(large) < 40 * max(seconds_to_open(small) for _ in range(3))


def test_a_session_of_a_newer_version_is_refused_and_says_so(store):
    session = begin(store, "hello")
    with open(store.folder / session / "events.jsonl", "a") as file:
        file.write('{"kind": "telepathy", "number": 1, "at": 0}\n')
    with pytest.raises(EventError, match="kind 'telepathy': a newer one wrote this session; go on"):
        store.open(session)
    assert [one.id for one in store.list()] == [session]
