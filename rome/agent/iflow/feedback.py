"""What users said of answers, as data to train on: rows for SFT, and pairs of answers.

A row for SFT is a conversation in OpenAI's form whose last answer is learned; earlier ones, which
the user did not judge, have the weight 0. Accepting the last word of a turn accepts the turn: the
calls that led to it are learned too. Where the session has its tokens (`trajectory.json` beside its
events), the row is an ATIF document with these, and nothing is tokenised again.

A pair is {"prompt", "chosen", "rejected", "tools"}: a correction against the answer that it
corrects, or two answers to the same context of which the user liked one better (after a rewind).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rome.agent.dialects.openai_chat import write_message
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog, read_events
from rome.agent.iflow.events import (
    AssistantMessage,
    Event,
    FeedbackGiven,
    SessionStarted,
    TurnStarted,
)
from rome.agent.messages import Message
from rome.data.trajectory import LAST, Trajectory, load_trajectory, to_atif
from rome.data.tree import path_to
from rome.files import write_atomically

EVENTS = "events.jsonl"
TRAJECTORY = "trajectory.json"
KINDS = ("sft", "preference")
VERDICTS = ("accept", "reject", "correct", "rate")
GOOD = 4  # rating from which on an answer is learned
_RATINGS = {"accept": 5, "reject": 1, "correct": 1}


class FeedbackError(ValueError):
    """A judgement is none, or a session cannot be exported; the message says why."""


def make_feedback(
    log: EventLog, verdict: str, *, target: object, rating: object = 0, text: str = ""
) -> FeedbackGiven:
    """Return a judgement of an answer, to be logged.

    `target` is the answer's number, `rating` is from 1 to 5 where the verdict is to rate, and
    `text` is a comment, or what would have been right. FeedbackError where one of them is none.
    """
    answers = [one.number for one in log.events if isinstance(one, AssistantMessage)]
    if type(target) is not int or target not in answers:
        raise FeedbackError(f"target {target!r} is not the number of an answer")
    if verdict not in VERDICTS:
        raise FeedbackError(f"verdict must be one of {', '.join(VERDICTS)}, not {verdict!r}")
    if verdict == "rate" and rating not in (1, 2, 3, 4, 5):
        raise FeedbackError(f"rating must be from 1 to 5, not {rating!r}")
    if verdict == "correct" and not text:
        raise FeedbackError("text must say what would have been right")
    return FeedbackGiven(
        target=target,
        verdict=verdict,  # type: ignore[arg-type]
        rating=rating if verdict == "rate" else 0,  # type: ignore[arg-type]
        text=text,
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer that the user judged; of several judgements the last one holds."""

    session: str
    answer: AssistantMessage  # that was judged
    context: tuple[Message, ...]  # what the model was shown before it
    turn_start: int  # place in `context` from which on its turn begins
    tools: tuple[dict[str, Any], ...]  # schemas of the tools that the model was shown
    # Numbers of the chunks of the answers of its turn, its own last; -1 for none
    chunks: tuple[int, ...]
    rating: int  # from 1 to 5
    correction: str = ""  # what would have been right; "" for none
    comment: str = ""  # of the user


def judged_answers(events: Sequence[Event]) -> list[Judged]:
    """Return the answers of a session that the user judged, in their order."""
    given = {event.target: event for event in events if isinstance(event, FeedbackGiven)}
    conversation = Conversation()
    tools: tuple[dict[str, Any], ...] = ()
    turn_starts_at = 0
    chunks: list[int] = []
    found = []
    for event in events:
        if isinstance(event, SessionStarted):
            tools = event.schemas or tools
        elif isinstance(event, TurnStarted):
            turn_starts_at = event.number
            chunks = []
        elif isinstance(event, AssistantMessage):
            chunks.append(event.chunk)
            feedback = given.pop(event.number, None)
            if feedback is not None:
                entries = conversation.entries
                system = len(conversation.messages) - len(entries)
                before = [entry for entry in entries if entry.number < turn_starts_at]
                judged = Judged(
                    session=conversation.session,
                    answer=event,
                    context=tuple(conversation.messages),
                    turn_start=system + len(before),
                    tools=tools,
                    chunks=tuple(chunks),
                    rating=feedback.rating or _RATINGS.get(feedback.verdict, 3),
                    correction=feedback.text if feedback.verdict == "correct" else "",
                    comment=feedback.text if feedback.verdict != "correct" else "",
                )
                found.append(judged)
        conversation.add(event)
    if given:
        raise FeedbackError(f"feedback is about event {min(given)}, which is no answer")
    return found


def sft_rows(
    judged: Iterable[Judged], trajectory: Trajectory | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a record for each answer that is worth learning, as `rome.data.formats` reads it."""
    for one in judged:
        if one.correction:
            yield _row(one, [Message("assistant", one.correction)], learns_turn=False)
        elif one.rating >= GOOD:
            is_last_word = not one.answer.tool_calls
            if trajectory is not None and one.answer.chunk >= 0:
                yield _tokens(one, trajectory, one.chunks if is_last_word else one.chunks[-1:])
            else:
                yield _row(one, [_message(one.answer)], learns_turn=is_last_word)


def preference_pairs(
    judged: Sequence[Judged], trajectory: Trajectory | None = None
) -> Iterator[dict[str, Any]]:
    """Yield pairs of a better and a worse answer to the same context."""
    for one in judged:
        if one.correction:
            yield _pair(None, one, trajectory)
    groups: dict[tuple[object, ...], list[Judged]] = {}
    for one in judged:
        groups.setdefault(tuple(message.key for message in one.context), []).append(one)
    for group in groups.values():
        for first, second in itertools.combinations(group, 2):
            better, worse = (first, second) if first.rating > second.rating else (second, first)
            if better.rating > worse.rating:
                yield _pair(better, worse, trajectory)


def export(sessions: Iterable[pathlib.Path], out: pathlib.Path, kind: str = "sft") -> int:
    """Write the feedback of sessions as JSON Lines, a row of SFT or a pair each; return how many.

    Sessions are given by their folders, or their files of events. FeedbackError where one cannot be
    read.
    """
    if kind not in KINDS:
        raise FeedbackError(f"kind {kind!r} unknown; known: {', '.join(KINDS)}")
    records = []
    for path in sessions:
        file = path / EVENTS if path.is_dir() else path
        try:
            judged = judged_answers(list(read_events(file)))
            tokens = file.with_name(TRAJECTORY)
            trajectory = load_trajectory(tokens) if tokens.exists() else None
            make = sft_rows if kind == "sft" else preference_pairs
            records += list(make(judged, trajectory))
        except (OSError, ValueError) as error:
            raise FeedbackError(f"session {path}: {error}") from error
    lines = [json.dumps(record, ensure_ascii=True) + "\n" for record in records]
    write_atomically(out, "".join(lines))
    return len(records)


def _row(one: Judged, learned: Sequence[Message], *, learns_turn: bool) -> dict[str, Any]:
    """Return a conversation of which only what the user judged is learned."""
    messages = []
    for place, message in enumerate(one.context):
        written = write_message(message)
        if message.role == "assistant" and not (learns_turn and place >= one.turn_start):
            written["weight"] = 0
        messages.append(written)
    messages += [write_message(message) for message in learned]
    return {"messages": messages, "tools": list(one.tools), "reward": 1.0, "extra": _source(one)}


def _tokens(one: Judged, trajectory: Trajectory, learned: Sequence[int]) -> dict[str, Any]:
    """Return the exact tokens up to an answer as an ATIF document."""
    chunks = []
    for number in path_to(_chunk_of(one, trajectory), trajectory.parents):
        chunk = trajectory.chunks[number]
        kind = "imitation" if number in learned else "context"
        chunks.append(dataclasses.replace(chunk, kind=kind, parent=LAST, edge="continuation"))
    return to_atif(
        dataclasses.replace(
            trajectory,
            task=trajectory.task or one.session,
            chunks=chunks,
            reward=1.0,
            ending="success",
            note=one.comment,
        )
    )


def _pair(better: Judged | None, worse: Judged, trajectory: Trajectory | None) -> dict[str, Any]:
    """Return one pair, with exact tokens of what was sampled; None is the worse one corrected."""
    one = better or worse
    chosen = Message("assistant", worse.correction) if better is None else _message(better.answer)
    pair: dict[str, Any] = {
        "prompt": [write_message(message) for message in one.context],
        "chosen": [write_message(chosen)],
        "rejected": [write_message(_message(worse.answer))],
        "tools": list(one.tools),
        "extra": _source(one),
    }
    if trajectory is not None and worse.answer.chunk >= 0:
        number = _chunk_of(worse, trajectory)
        path = [trajectory.chunks[place] for place in path_to(number, trajectory.parents)]
        prompt = [token for chunk in path[:-1] for token in (*chunk.prompt_ids, *chunk.action_ids)]
        pair["prompt_token_ids"] = [*prompt, *path[-1].prompt_ids]
        pair["rejected_token_ids"] = list(path[-1].action_ids)
        if better is not None and better.answer.chunk >= 0:
            chunk = trajectory.chunks[_chunk_of(better, trajectory)]
            pair["chosen_token_ids"] = list(chunk.action_ids)
    return pair


def _chunk_of(one: Judged, trajectory: Trajectory) -> int:
    """Return the number of an answer's chunk."""
    if one.answer.chunk >= len(trajectory.chunks):
        what = f"event {one.answer.number} has chunk {one.answer.chunk}"
        raise FeedbackError(f"{what}, which is not in {TRAJECTORY}: it is of another session")
    return one.answer.chunk


def _source(one: Judged) -> dict[str, Any]:
    return {
        "session": one.session,
        "event": one.answer.number,
        "rating": one.rating,
        "comment": one.comment,
    }


def _message(answer: AssistantMessage) -> Message:
    return Message("assistant", answer.text, answer.reasoning, answer.tool_calls)
