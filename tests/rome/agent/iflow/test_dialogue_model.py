"""The agent on a policy: what it answers is recorded with its exact tokens."""

import asyncio

from rome.agent.dialogue import Dialogue
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.dialogue_model import DialogueModel
from rome.agent.session import Session
from rome.data.tree import ROOT
from rome.engine.completion import Completion
from rome.engine.errors import EngineFailed
from rome.model.tokenizer import TINY, Chat, Tokenizer
from tests.rome.agent.iflow.doubles import Folder, Note, Shortener

TOKENIZER = Tokenizer.load(TINY)
CALL = '<tool_call>\n{"name": "note", "arguments": {"text": "a"}}\n</tool_call>'


class Engine:
    """Says one text a request; an exception is raised."""

    def __init__(self, *texts):
        self.texts = list(texts)
        self.requests = []

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        self.requests.append(list(input_ids))
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        ids = [*TOKENIZER.encode_turn(text), TOKENIZER.im_end]
        if len(ids) > sampling.max_new_tokens:
            ids = ids[: sampling.max_new_tokens]
            return Completion(ids, [-1.0] * len(ids), "length", [(1, 0, len(ids))])
        return Completion(ids, [-1.0] * len(ids), "stop", [(1, 0, len(ids))])


def play(*texts, max_context=4000, max_new_tokens=400, requests=("do it",), **options):
    engine = Engine(*texts)
    session = Session(
        engine,
        TOKENIZER,
        seed=1,
        max_context=max_context,
        max_new_tokens=max_new_tokens,
        completion_seconds=10,
    )
    model = DialogueModel(Dialogue(session, Chat(TOKENIZER)))
    agent = Agent(model, [Note()], EventLog(), Folder(), system="You are it.", **options)

    async def steps():
        return [await agent.run(text) for text in requests]

    endings = asyncio.run(asyncio.wait_for(steps(), 60))
    return agent, session, endings, engine, model


def test_every_answer_is_a_chunk_and_the_context_only_grows():
    agent, session, [ending], engine, _ = play(f"I look.\n{CALL}", "done")
    assert ending.outcome == "finished"
    answers = [event for event in agent.log.events if isinstance(event, AssistantMessage)]
    assert [answer.chunk for answer in answers] == [0, 1]
    first, second = session.chunks
    assert engine.requests[1] == [*first.prompt_ids, *first.action_ids, *second.prompt_ids]
    assert answers[1].usage.prompt == len(engine.requests[1])
    assert "noted a" in TOKENIZER.decode(second.prompt_ids)


def test_two_same_questions_are_two_samples():
    _, session, _, _, _ = play("one", "one", requests=("go", "go"))
    assert len(session.chunks) == 2 and session.chunks[1].edge == "continuation"


def test_a_malformed_call_and_one_that_is_cut_are_told_apart():
    agent, session, [ending], _, _ = play('<tool_call>\n{"name": \n</tool_call>', "sorry")
    assert ending.outcome == "finished" and session.chunks[0].status == "malformed"
    answers = [event for event in agent.log.events if isinstance(event, AssistantMessage)]
    assert "not JSON" in answers[0].malformed
    _, _, [ending], _, _ = play("x " * 50, max_new_tokens=10)
    assert ending.outcome == "limit"


def test_a_full_context_is_compacted_into_a_branch():
    long = f"{'x ' * 100}\n{CALL}"
    _, session, [ending], _, _ = play(long, long, "done", max_context=640, context=Shortener())
    assert ending.outcome == "finished"
    assert [chunk.edge for chunk in session.chunks] == ["continuation", "compaction", "compaction"]
    assert all(chunk.parent == ROOT for chunk in session.chunks[1:])


def test_a_fault_of_the_engine_is_kept():
    _, _, [ending], _, model = play(EngineFailed("it broke"))
    assert ending.outcome == "infrastructure" and "it broke" in ending.reason
    assert isinstance(model.fault, EngineFailed)
