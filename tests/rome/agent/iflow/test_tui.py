"""The terminal interface: as a filter, and in a real pseudo-terminal whose screen is looked at."""

import io
import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rome.agent.iflow import events
from rome.agent.iflow.event_log import read_events
from rome.agent.iflow.tui.screen import MarkdownBlocks, Screen
from tests.paths import ROOT
from tests.rome.agent.iflow.pseudo_terminal import PseudoTerminal

LINES = st.sampled_from(["", "a", "- b", "```", "```py", "~~~", "    x", "# c", "````", "text ```"])


def terminal(folder, **options):
    pytest.importorskip("pyte", reason="pip install -r tests/requirements-live.txt")
    arguments = ["-m", "tests.rome.agent.iflow.opened", "tui", str(folder / "sessions")]
    return PseudoTerminal(arguments, directory=folder, **options)


@settings(max_examples=50, deadline=None)
@given(st.lists(LINES, max_size=20), st.lists(st.integers(0, 60), max_size=10))
def test_blocks_hold_all_of_the_text_however_it_comes(lines, cuts):
    text = "\n".join(lines)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[left:right] for left, right in itertools.pairwise(places)]
    blocks = MarkdownBlocks()
    found = [block for piece in pieces for block in blocks.feed(piece)] + blocks.finish()
    whole = MarkdownBlocks()
    assert found == whole.feed(text) + whole.finish()
    assert "".join(found).split() == text.split()


def test_fenced_code_stays_in_one_block():
    blocks = MarkdownBlocks()
    code = "```py\na\n\n```js\n\nb\n```\n"
    assert blocks.feed(f"one\n\n{code}\ntwo") == ["one\n\n", f"{code}\n"]
    assert blocks.finish() == ["two"]


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x1b[31mred\r\x9b5Aup\x1b]52;c;aGk=\x07"


@pytest.mark.parametrize(
    "event",
    [
        events.AssistantMessage(text=f"said {HOSTILE}"),
        events.TextDelta(text=f"{HOSTILE}\n\n"),
        events.ToolFinished(call_id="1", output=HOSTILE),
        events.ToolFinished(call_id="1", output="", diff=f"--- a\n+++ b\n+{HOSTILE}\n"),
        events.ToolStarted(call=events.ToolCall("1", HOSTILE, "{}"), summary=HOSTILE),
        events.ApprovalRequested(
            request="r", call=events.ToolCall("1", "x", HOSTILE), reason=HOSTILE, summary=HOSTILE
        ),
        events.QuestionAsked(request="r", question=HOSTILE, choices=(HOSTILE,)),
        events.TodoChanged(items=(events.TodoItem(HOSTILE),)),
        events.UserMessage(text=HOSTILE),
        events.Notice(text=HOSTILE),
        events.SubagentStarted(id="1", agent="a", prompt=HOSTILE),
        events.JobStarted(job="1", command=HOSTILE),
        events.TurnFinished(outcome="aborted", reason=HOSTILE),
        events.ContextCompacted(
            summary="", kept_from=0, tokens_before=1, tokens_after=1, fallback=HOSTILE
        ),
    ],
)
def test_nothing_that_a_model_or_a_tool_writes_controls_the_terminal(event):
    file = io.StringIO()
    Screen(Console(file=file, force_terminal=True, width=200)).take(event)
    shown = file.getvalue()
    assert "owned" in shown
    for control in ("\x1b[2J", "\x1b]", "\x07", "\r", "\x9b"):
        assert control not in shown


def shown(*given):
    file = io.StringIO()
    screen = Screen(Console(file=file, width=80))
    for event in given:
        screen.take(event)
    return file.getvalue()


def test_the_beginning_and_the_end_of_what_is_long_are_shown():
    call = events.ToolCall("1", "shell", "{}")
    output = "\n".join(f"line {number}" for number in range(100))
    text = shown(events.ToolStarted(call=call), events.ToolFinished(call_id="1", output=output))
    assert "line 0\n" in text and "... 94 more lines" in text and "line 99\n" in text
    assert "line 50" not in text
    text = shown(events.UserMessage(text=f"read this\n{output}"))
    assert "read this" in text and "more lines" in text and "line 99" not in text


def test_a_changed_list_is_shown_once():
    call = events.ToolCall("1", "todo", "{}")
    changed = events.TodoChanged(items=(events.TodoItem("sweep"),))
    finished = events.ToolFinished(call_id="1", output="[ ] sweep")
    text = shown(events.ToolStarted(call=call), changed, finished)
    assert text.count("sweep") == 1
    again = events.ToolStarted(call=events.ToolCall("2", "shell", "{}"))
    text = shown(again, events.ToolFinished(call_id="2", output="swept"))
    assert "swept" in text


@pytest.mark.long
def test_as_a_filter_each_line_is_a_message_and_nothing_is_asked(tmp_path):
    lines = [
        "say hello **you**",
        'call write_file {"path": "a", "content": "x"}',
        "!echo from the shell; exit 3",
        "/greet bob",
        "/nothing",
        "/feedback rate 5",
        "/cost",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "tests.rome.agent.iflow.opened", "tui", str(tmp_path / "s")],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    for said in (
        "hello **you**",
        "nobody is here to approve it",
        "from the shell",
        "status 3",
        "hello bob",
        "there is no command /nothing",
        "feedback: rate",
        "context",
    ):
        assert said in " ".join(run.stdout.split())
    assert "\x1b" not in run.stdout and not (tmp_path / "a").exists()
    (session,) = (tmp_path / "s").glob("*/events.jsonl")
    stored = list(read_events(session))
    (given,) = (event for event in stored if isinstance(event, events.FeedbackGiven))
    assert isinstance(stored[given.target], events.AssistantMessage) and given.rating == 5


@pytest.mark.live
def test_an_edit_is_shown_approved_and_refused_with_a_note(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with terminal(tmp_path) as screen:
        screen.wait_for("iFlow in", "context 0%")
        screen.enter('call write_file {"path": "a.txt", "content": "one\\n2\\n"}')
        screen.wait_for("Write a.txt", "-two", "+2", "Allow?")
        assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"
        screen.enter("perhaps")
        screen.wait_for("y yes, a always write_file")
        screen.enter("n use another name")
        screen.wait_for("the user denied this call of write_file: use another name", "Done.")
        screen.enter('call write_file {"path": "b.txt", "content": "b"}')
        screen.wait_for("Write b.txt", "Allow?")
        screen.enter("a")
        screen.wait_for("Write b.txt", "Done.", "cost")
        screen.enter('call write_file {"path": "c.txt", "content": "c"}')
        deadline_text = screen.wait_for("Write c.txt", "+c")
        assert "Allow?" not in deadline_text.split("Write c.txt")[-1]
        screen.enter("/quit")
        assert screen.wait_end() == 0
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"
    assert (tmp_path / "b.txt").exists() and (tmp_path / "c.txt").exists()


@pytest.mark.live
@pytest.mark.slow
def test_while_it_works_one_steers_queues_and_cancels(tmp_path):
    with terminal(tmp_path) as screen:
        screen.wait_for("iFlow in")
        screen.enter("slow " + "word " * 300)
        screen.wait_for("Ctrl-C cancels: writing", "word word")
        screen.enter("/later say this was queued")
        screen.enter("say this was steered")
        screen.wait_for("reads this before its next step", "1 later")
        screen.enter("/compact")
        screen.wait_for("the agent is working")
        screen.type("a half-typed line")
        screen.read(0.5)
        screen.type("\x03")  # clears the line
        screen.read(0.3)
        screen.type("\x03")  # cancels, the queue as well
        screen.wait_for("stopped (aborted): the user cancelled the turn")
        assert screen.text.count("this was queued") == 0
        screen.enter("say next")  # what was steered is read by now
        screen.wait_for("> say next", "> say this was steered", "\nthis was steered")
        screen.enter("wait 1")
        screen.wait_for("working")
        screen.enter("/later say it was queued")
        screen.wait_for("\nit was queued")
        screen.type("\x03")
        screen.wait_for("Ctrl-C once more ends the program")
        screen.type("\x03")
        assert screen.wait_end() == 0


@pytest.mark.live
@pytest.mark.slow
def test_a_draft_survives_an_approval_that_comes_meanwhile(tmp_path):
    with terminal(tmp_path) as screen:
        screen.wait_for("iFlow in")
        screen.enter("wait 1.5")
        screen.wait_for("working")
        screen.enter('call shell {"command": "echo it ran"}')
        screen.wait_for("reads this")
        screen.type("say kept")
        screen.wait_for("Allow?")
        screen.enter("y")
        screen.wait_for("it ran", "> say kept")
        screen.type("\r")
        screen.wait_for("\nkept")


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"columns": 40}, {"term": "dumb"}, {"term": "screen-256color"}]
)
def test_commands_questions_and_completion_on_all_kinds_of_terminals(tmp_path, options):
    (tmp_path / "notes.txt").write_text("buy milk")
    with terminal(tmp_path, **options) as screen:
        screen.wait_for("iFlow in")
        screen.enter('call ask_user {"question": "Which colour?", "choices": ["red", "blue"]}')
        screen.wait_for("Which colour?", "2. blue", "A number, or words:")
        screen.enter("2")
        screen.wait_for("Done.")
        screen.enter('call todo {"items": ["look", "write it"]}')
        screen.wait_for("write it")
        screen.enter("/mode plan")
        screen.wait_for("mode: plan")
        screen.enter("/plan")
        screen.wait_for("mode: default")
        screen.enter("/tools")
        screen.wait_for("write_file\nshell\ntodo")
        screen.enter("/rewind")
        screen.wait_for("call ask_user")
        screen.enter("/rewind 1 conversation")
        screen.wait_for("went back: conversation")
        screen.enter("/model other")
        screen.wait_for("model: other")
        if options.get("term") != "dumb":
            screen.type("tell me of @no")
            screen.wait_for("@notes.txt")
            screen.type("\t")
            screen.read(0.5)
            screen.type("\r")
        else:
            screen.enter("tell me of @notes.txt")
        screen.wait_for("I heard", "buy milk")
        screen.enter("/clear")
        screen.wait_for("Ctrl-C")
        screen.enter("/resume")
        screen.wait_for("call ask_user")
        screen.enter("/quit")
        assert screen.wait_end() == 0
        if options.get("term") == "dumb":
            assert b"\x1b" not in screen.output


@pytest.mark.live
@pytest.mark.slow
def test_a_session_that_was_left_goes_on(tmp_path):
    with terminal(tmp_path) as screen:
        screen.wait_for("iFlow in")
        screen.enter("say the first word")
        screen.wait_for("\nthe first word")
        screen.process.kill()
    (session,) = os.listdir(tmp_path / "sessions")
    with terminal(tmp_path) as screen:
        screen.wait_for("iFlow in")
        screen.enter(f"/resume {session}")
        screen.wait_for("> say the first word", "\nthe first word")
        screen.enter("say another")
        screen.wait_for("\nanother")
