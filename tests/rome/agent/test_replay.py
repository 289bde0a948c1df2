"""A record answers as the model did, and says where an agent does something else."""

import asyncio
import dataclasses

import pytest

from rome.agent.dialogue import Dialogue
from rome.agent.messages import Message
from rome.agent.replay import Replay
from rome.agent.session import Session
from rome.engine.errors import RequestRejected
from tests.rome.agent.test_dialogue import CHAT, dialogue


def replaying(chunks):
    engine = Replay(chunks, CHAT.tokenizer.turn_ends)
    session = Session(
        engine,
        CHAT.tokenizer,
        seed=9,
        max_context=2000,
        max_new_tokens=500,
        completion_seconds=5.0,
    )
    return Dialogue(session, CHAT), engine


def fields(chunk):
    return {**dataclasses.asdict(chunk), "cached_tokens": 0}


async def ask(conversation, *contents):
    messages = []
    for content in contents:
        messages.append(Message("user", content))
        reply = await conversation.complete(messages)
        messages.append(Message("assistant", reply.text))
    return messages


def test_an_agent_that_does_the_same_makes_the_same_record():
    async def work():
        recorded, _ = dialogue("one", "two", "three")
        messages = await ask(recorded, "a", "b")
        fork = [*messages[:2], Message("user", "c")]
        await recorded.complete(fork)
        again, engine = replaying(recorded.session.chunks)
        assert await ask(again, "a", "b") == messages
        await again.complete(fork)
        return recorded.session.chunks, again.session.chunks, engine.left

    recorded, again, left = asyncio.run(work())
    assert [fields(chunk) for chunk in again] == [fields(chunk) for chunk in recorded]
    assert left == 0


def test_an_answer_that_was_cut_is_cut_again():
    async def work():
        recorded, _ = dialogue("one", finish_reason="length", end=CHAT.tokenizer.encode("x")[0])
        first = await recorded.complete([Message("user", "a")])
        again, _ = replaying(recorded.session.chunks)
        return first.finish_reason, (await again.complete([Message("user", "a")])).finish_reason

    assert asyncio.run(work()) == ("length", "length")


def test_an_agent_that_does_something_else_is_told():
    async def work():
        recorded, _ = dialogue("one")
        await ask(recorded, "a")
        again, _ = replaying(recorded.session.chunks)
        await ask(again, "b")

    with pytest.raises(RequestRejected, match="does something else than when it was recorded"):
        asyncio.run(work())
