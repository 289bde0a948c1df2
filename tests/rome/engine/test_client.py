"""The client against the embedded engine."""

import asyncio
import dataclasses
import os
import signal
import time

import aiohttp
import numpy as np
import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.connection import Deadline
from rome.engine.errors import EngineDead, EngineError
from rome.rollout.simulator.clock import run as run_virtually
from tests.rome.serve.tiny import (
    ONE_PROGRAM,
    Oracle,
    make_checkpoint,
    make_config,
    serve,
    until_running,
)

PROMPT = [(5 * i) % 200 + 3 for i in range(20)]
LONG = Sampling(max_new_tokens=480, seed=1)
LONGEST = 4096  # tokens of a context
# One step a dispatch: else answers may end before a conversation gets a turn to disturb them.
LENGTHS = ("--max_context", str(LONGEST), "--cache_tokens", str(2 * LONGEST), "--decode_steps", "1")
LONGER = dataclasses.replace(LONG, max_new_tokens=3000)  # still runs when something is done to it
V = make_config().vocab_size


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return [
        make_checkpoint(directory / str(seed), seed, endless=True, max_position=LONGEST)
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with serve(checkpoints[0], log, *LENGTHS) as running:
        yield running


def talk(server, conversation, **options):
    async def run():
        async with Engine(server.url, **options) as engine:
            return await conversation(engine)

    return asyncio.run(run())


async def abort_all(engine):
    body = {"abort_all": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(engine.url + "/abort_request", json=body) as response,
    ):
        assert response.status == 200


def test_a_completion_has_the_plain_forward_passes_logprobs_and_routes(server, checkpoints):
    sampling = Sampling(30, temperature=0.9, seed=3, routes_from=0)
    completion = talk(
        server, lambda engine: engine.generate(PROMPT, sampling, 60), model=make_config()
    )
    oracle, ids = Oracle.load(checkpoints[0]), PROMPT + completion.output_ids
    np.testing.assert_allclose(
        completion.logprobs, oracle.logprobs(ids, 0.9)[len(PROMPT) - 1 :], atol=1e-4
    )
    assert np.array_equal(completion.routes, oracle.logits_and_routes(ids)[1][:-1] + 1)
    rest = talk(
        server,
        lambda engine: engine.generate(PROMPT, dataclasses.replace(sampling, routes_from=17), 60),
        model=make_config(),
    )
    assert np.array_equal(rest.routes, completion.routes[17:])
    assert completion.versions == [(0, 0, len(completion.output_ids))]


def test_a_score_is_the_plain_forward_passes(server, checkpoints):
    scores = talk(server, lambda engine: engine.score(PROMPT))
    assert scores[0] == 0
    np.testing.assert_allclose(scores[1:], Oracle.load(checkpoints[0]).logprobs(PROMPT), atol=1e-4)


def test_finish_reasons_are_stop_and_length(server):
    async def conversation(engine):
        free = await engine.generate(PROMPT, Sampling(10, seed=1), 60)
        return free, await engine.generate(
            PROMPT, Sampling(10, seed=1, stop_token_ids=(free.output_ids[4],)), 60
        )

    free, stopped = talk(server, conversation)
    assert free.finish_reason == "length" and stopped.finish_reason == "stop"
    assert stopped.output_ids == free.output_ids[: free.output_ids.index(free.output_ids[4]) + 1]


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_update_amid_a_completion_is_told_by_its_spans(server, checkpoints, mode):
    async def conversation(engine, tokens):
        sampling = dataclasses.replace(LONG, max_new_tokens=tokens)
        task = asyncio.ensure_future(engine.generate(PROMPT, sampling, 120))
        await until_running(engine, task)
        await engine.pause(mode)
        await engine.update_weights(str(checkpoints[1]), 5)
        assert (await engine.model_info())["weight_version"] == "5"
        await engine.resume()
        completion = await task
        await engine.update_weights(str(checkpoints[0]), 0)
        return completion

    # where this process waits for the processor, a short completion ends before it is paused
    for tokens in (480, 960, 1920, 3840):
        completion = talk(server, lambda engine, tokens=tokens: conversation(engine, tokens))
        if len(completion.versions) > 1:
            break
    (old, begin, border), (new, border_again, end) = completion.versions
    assert (old, new, begin, border, end) == (0, 5, 0, border_again, tokens) and border > 0
    assert (
        len(completion.output_ids) == len(completion.logprobs) == tokens
        and completion.finish_reason == "length"
    )
    ids = (PROMPT + completion.output_ids)[:128]
    expected = [
        Oracle.load(checkpoint).logprobs(ids)[len(PROMPT) - 1 :] for checkpoint in checkpoints
    ]
    border = min(border, len(expected[0]))
    np.testing.assert_allclose(completion.logprobs[:border], expected[0][:border], atol=1e-4)
    np.testing.assert_allclose(
        completion.logprobs[border : len(expected[1])], expected[1][border:], atol=1e-4
    )


@pytest.mark.long
def test_an_aborted_completion_is_taken_up_again_to_the_same_tokens(server):
    async def conversation(engine):
        undisturbed = await engine.generate(PROMPT, LONGER, 120)
        task = asyncio.ensure_future(engine.generate(PROMPT, LONGER, 120))
        await until_running(engine, task)
        await abort_all(engine)
        return undisturbed, await task

    undisturbed, aborted = talk(server, conversation)
    assert aborted.output_ids == undisturbed.output_ids and aborted.versions == [(0, 0, 3000)]


def test_a_held_engine_sends_nothing_until_it_is_released(server):
    async def conversation(engine):
        engine.hold()
        task = asyncio.ensure_future(engine.generate(PROMPT, Sampling(5), 60))
        done, _ = await asyncio.wait([task], timeout=0.2)
        assert not done and len(await engine.score(PROMPT)) == len(PROMPT)
        engine.release()
        return await task

    completion = talk(server, conversation)
    assert len(completion.output_ids) == 5
    assert completion.seconds_held >= 0.2  # which did not count for its deadline


def test_a_deadline_stands_still_while_it_is_stopped():
    """On a virtual clock: a publication may take longer than the deadline of an answer."""

    async def wait(hold_seconds, then_seconds):
        async with Deadline(10.0, "too late") as deadline:
            await asyncio.sleep(4.0)
            deadline.stop()
            deadline.stop()  # a publication may follow another one
            await asyncio.sleep(hold_seconds)
            deadline.go_on()
            await asyncio.sleep(then_seconds)
        return deadline.seconds_stopped

    assert run_virtually(wait(900.0, 5.9)) == 900.0
    with pytest.raises(EngineError, match="too late"):
        run_virtually(wait(900.0, 6.1))


def test_a_refused_request_says_why_with_the_url(server):
    with pytest.raises(
        EngineError, match=f"{server.url}/generate answered 400: .*outside the vocabulary"
    ):
        talk(server, lambda engine: engine.generate([V], Sampling(5), 60))


def test_a_deadline_ends_the_wait_and_the_request_on_the_server(server):
    async def conversation(engine):
        await engine.pause("in_place")
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"did not give a completion within 0.3 s"):
            await engine.generate(PROMPT, LONG, 0.3)
        assert time.monotonic() - started < 30
        for _ in range(6000):
            figures = (await engine.server_info())["internal_states"][0]
            if not figures["waiting"]:
                break
            await asyncio.sleep(0.01)
        await engine.resume()
        return figures

    figures = talk(server, conversation)
    assert figures["waiting"] == figures["running"] == 0


def test_one_client_serves_several_event_loops_in_turn(server):
    engine = Engine(server.url)
    first, second = (
        asyncio.run(engine.generate(PROMPT, Sampling(5, seed=2), 60)) for _ in range(2)
    )
    assert first.output_ids == second.output_ids


@pytest.mark.long
def test_a_server_killed_amid_a_completion_is_an_error_that_names_it_in_bounded_time(
    checkpoints, tmp_path
):
    with serve(checkpoints[0], tmp_path / "serve.log", *LENGTHS, *ONE_PROGRAM) as doomed:

        async def conversation(engine):
            task = asyncio.ensure_future(engine.generate(PROMPT, LONGER, 600))
            await until_running(engine, task)
            os.kill(doomed.process.pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match=f"engine {doomed.url} is dead.*start it again"):
                async with asyncio.timeout(60):
                    await task
            return await engine.health()

        assert talk(doomed, conversation, dead_after_seconds=1.0) == "gone"
