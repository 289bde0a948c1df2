"""The agent on an engine of token ids: a real `launch.serve` process with a small random model."""

import asyncio
import dataclasses
import pathlib

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.assemble import assemble
from rome.agent.iflow.connect import TOKENS
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.feedback import export
from rome.agent.iflow.models.engine_model import connect_engine
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.options import Options
from rome.data.formats.records import read_trajectory
from rome.data.trajectory import load_trajectory
from rome.engine.process import start_server
from rome.model.hf.checkpoint import save_hf
from rome.model.qwen3 import init_params
from rome.model.tokenizer import TINY, Tokenizer
from tests.rome.agent.iflow.whole import Whole
from tests.rome.serve import tiny


def test_an_engine_that_is_not_there_is_one_clear_line():
    with pytest.raises(
        ModelError, match=r"there is no engine at http://127.0.0.1:1: .*launch.serve"
    ):
        asyncio.run(connect_engine(Options(pathlib.Path(), engine="http://127.0.0.1:1")))


@pytest.mark.slow
def test_a_session_on_an_engine_keeps_its_tokens_and_goes_on(tmp_path):
    """The model says noise that is cut at 16 tokens: two turns, then a resumed one."""
    import jax

    checkpoint = tmp_path / "checkpoint"
    config = dataclasses.replace(tiny.make_config(), max_position=16_384)
    save_hf(jax.device_get(init_params(config, jax.random.key(0))), config, checkpoint)
    Tokenizer.load(TINY).save(checkpoint)
    whole = Whole(tmp_path)

    async def play(url, session, *prompts):
        options = Options(whole.project, workspace="host", mode="yolo", engine=url, max_tokens=16)
        assembled = await assemble(options, session, home=whole.home)
        try:
            for prompt in prompts:
                await assembled.agent.run(prompt)
            await assembled.keep()
        finally:
            await assembled.close()
        log = assembled.agent.log.events
        return [one for one in log if isinstance(one, events.AssistantMessage)], session.folder

    flags = ("--slots", "2", "--max_context", "16384")
    log = tmp_path / "serve.log"
    with start_server(checkpoint, log, flags=flags, deadline_seconds=200) as server:
        session = whole.store.new()
        first, folder = asyncio.run(play(server.url, session, "hello", "more"))
        answers, _ = asyncio.run(play(server.url, whole.store.open(session.id), "and more"))
    assert [answer.chunk for answer in answers] == [0, 1, 2]
    assert len(first) == 2
    kept = load_trajectory(folder / TOKENS)
    assert len(kept.chunks) == 3 and not kept.trainable
    assert kept.chunks[0].text.strip() in (answers[0].text, answers[0].reasoning)
    shown = Tokenizer.load(TINY).decode(kept.chunks[2].prompt_ids)
    assert "You are iFlow" in shown and "and more" in shown

    events_file = EventLog(folder / "events.jsonl")
    events_file.append(events.FeedbackGiven(target=answers[1].number, verdict="accept"))
    events_file.close()
    assert export([folder], tmp_path / "rows.jsonl") == 1
    row = read_trajectory((tmp_path / "rows.jsonl").read_bytes(), Tokenizer.load(TINY))
    assert row.trainable and row.chunks[-1].action_ids == kept.chunks[1].action_ids
    assert row.chunks[-1].kind == "imitation"
