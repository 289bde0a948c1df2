"""Feedback of users as rows and pairs, with exact tokens where the session has them."""

import json
import subprocess
import sys

import pytest

from launch.feedback import main
from rome.agent.iflow import events
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage, FeedbackGiven, ToolCall
from rome.agent.iflow.feedback import (
    FeedbackError,
    judged_answers,
    preference_pairs,
    sft_rows,
)
from rome.data.formats.conversation import Conversation
from rome.data.formats.detect import read_record
from rome.data.trajectory import Chunk, Trajectory, save_trajectory

SCHEMA = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}
CALL = ToolCall("c1", "shell", '{"command": "ls"}')


class Session:
    """Writes a session, event by event."""

    def __init__(self, path=None):
        self.log = EventLog(path)
        self.turn = 0
        self.add(
            events.SessionStarted(
                session="s", directory="/", model="m", mode="yolo", system="Be brief.",
                tools=("shell",), schemas=(SCHEMA,),
            )
        )  # fmt: skip

    def add(self, event) -> int:
        return self.log.append(event).number

    def ask(self, text: str) -> int:
        number = self.add(events.UserMessage(text=text))
        self.turn += 1
        self.add(events.TurnStarted(turn=self.turn))
        return number

    def call(self, output="out", chunk=-1) -> int:
        number = self.add(
            AssistantMessage(text="I look.", tool_calls=(CALL,), finish="tool_calls", chunk=chunk)
        )
        self.add(events.ToolFinished(call_id=CALL.id, output=output))
        return number

    def say(self, text: str, chunk=-1) -> int:
        return self.add(AssistantMessage(text=text, chunk=chunk))

    def judge(self, target: int, verdict: str, **given) -> None:
        self.add(FeedbackGiven(target=target, verdict=verdict, **given))

    @property
    def judged(self):
        return judged_answers(self.log.events)


def learned(row) -> list[str]:
    _, conversation = read_record(row)
    assert isinstance(conversation, Conversation)
    assert [tool["function"]["name"] for tool in conversation.tools] == ["shell"]
    return [one.text for one in conversation.messages if one.role == "assistant" and one.learned]


def test_accepting_the_last_word_accepts_the_turn_and_no_earlier_one():
    session = Session()
    session.ask("first")
    session.say("one")
    session.ask("second")
    session.call()
    session.judge(session.say("two"), "accept", text="good")
    (row,) = sft_rows(session.judged)
    assert learned(row) == ["I look.", "two"]
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert row["extra"] == {"session": "s", "event": 8, "rating": 5, "comment": "good"}


def test_accepting_a_call_learns_that_call_alone():
    session = Session()
    session.ask("x")
    session.call()
    session.judge(session.call(), "rate", rating=4)
    session.say("done")
    (row,) = sft_rows(session.judged)
    assert learned(row) == ["I look."] and len(row["messages"]) == 5


def test_what_is_not_good_is_not_learned_and_the_last_judgement_holds():
    session = Session()
    session.ask("x")
    answer = session.say("a")
    session.judge(answer, "accept")
    session.judge(answer, "rate", rating=3)
    assert list(sft_rows(session.judged)) == []
    session.judge(answer, "reject")
    assert list(sft_rows(session.judged)) == []
    assert list(preference_pairs(session.judged)) == []


def test_a_correction_is_learned_and_preferred():
    session = Session()
    session.ask("x")
    session.call()
    session.judge(session.say("wrong"), "correct", text="right")
    assert [learned(row) for row in sft_rows(session.judged)] == [["right"]]
    (pair,) = preference_pairs(session.judged)
    assert pair["chosen"] == [{"role": "assistant", "content": "right"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "wrong"}]
    assert pair["prompt"][-1]["content"] == "out" and learned(pair) == ["right"]


def test_two_answers_to_one_context_make_a_pair():
    session = Session()
    asked = session.ask("x")
    session.judge(session.say("worse"), "reject")
    session.add(events.Rewound(to=asked, conversation=True, files=False))
    session.ask("x")
    session.judge(session.say("better"), "accept")
    session.ask("y")
    session.judge(session.say("another"), "reject")
    (pair,) = preference_pairs(session.judged)
    assert pair["chosen"][0]["content"] == "better"
    assert pair["rejected"][0]["content"] == "worse"
    assert [message["content"] for message in pair["prompt"]] == ["Be brief.", "x"]


def trajectory() -> Trajectory:
    """Return the tokens of: a call, its end; a rewind to the start, and another end."""
    made = [
        Chunk([1, 2], [3, 4], [-0.1, -0.2], text="call"),
        Chunk([5], [6], [-0.3], text="worse"),
        Chunk([5], [7, 8], [-0.4, -0.5], text="better", parent=0, edge="rewind"),
    ]
    return Trajectory("task", "", made, 0.0, "failure")


def test_exact_tokens_are_kept():
    session = Session()
    session.ask("x")
    session.call(chunk=0)
    session.judge(session.say("worse", chunk=1), "reject")
    session.judge(session.say("better", chunk=2), "accept")
    (row,) = sft_rows(session.judged, trajectory())
    name, record = read_record(row)
    assert name == "atif" and record.trainable and record.reward == 1
    assert [(one.prompt_ids, one.action_ids) for one in record.chunks] == [
        ([1, 2], [3, 4]),
        ([5], [7, 8]),
    ]
    assert [chunk.kind for chunk in record.chunks] == ["imitation", "imitation"]
    assert record.chunks[1].logprobs == [-0.4, -0.5]
    session.judge(session.say("wrong", chunk=1), "correct", text="right")
    pair = next(preference_pairs(session.judged, trajectory()))
    assert pair["prompt_token_ids"] == [1, 2, 3, 4, 5]
    assert pair["rejected_token_ids"] == [6] and "chosen_token_ids" not in pair


def test_tokens_of_another_session_are_refused():
    session = Session()
    session.ask("x")
    session.judge(session.say("a", chunk=7), "accept")
    with pytest.raises(FeedbackError, match=r"has chunk 7, which is not in trajectory.json"):
        list(sft_rows(session.judged, trajectory()))


def test_feedback_on_what_is_no_answer_is_refused():
    session = Session()
    session.judge(0, "accept")
    with pytest.raises(FeedbackError, match="event 0, which is no answer"):
        _ = session.judged


def test_the_command_writes_both_kinds(tmp_path, capsys):
    session = Session(tmp_path / "a" / "events.jsonl")
    session.ask("x")
    session.call(chunk=0)
    session.judge(session.say("worse", chunk=1), "correct", text="right \ud800")
    session.judge(session.say("better", chunk=2), "accept")
    save_trajectory(trajectory(), tmp_path / "a" / "trajectory.json")
    out = tmp_path / "out.jsonl"
    flags = [str(tmp_path / "a"), "--kind", "preference", "--out", str(out)]
    line = [sys.executable, "-m", "launch.feedback", *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"1 records in {out}\n"), done.stderr
    assert json.loads(out.read_text())["rejected_token_ids"] == [6]
    assert main([str(tmp_path / "a" / "events.jsonl"), "--out", str(out)]) == 0
    assert [read_record(json.loads(line))[0] for line in out.read_text().splitlines()] == [
        "openai",
        "atif",
    ]
    assert main([str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "launch.feedback: session" in capsys.readouterr().err
