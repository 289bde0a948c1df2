"""The engine inside the trainer: the same answers as a server's, and a device that is divided in
time.
"""

import asyncio
import dataclasses
import random
import time

import jax
import numpy as np
import pytest

from rome.engine.client import Engine
from rome.engine.completion import Completion, Sampling
from rome.engine.control import MEMORY_TAGS
from rome.engine.errors import EngineDead, EngineError, RequestRejected
from rome.engine.handover import hand_over
from rome.engine.inside import InsideEngine
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights
from rome.model.hf.checkpoint import save_hf
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from rome.stopping import Stopped
from tests.rome.serve.tiny import (
    CHUNK,
    CONTEXT,
    SLOTS,
    Oracle,
    make_config,
    make_params,
    serve,
    until_running,
)

pytestmark = pytest.mark.long

PROBE = list(range(20, 50))
SHAPES = Shapes(slots=SLOTS, max_context=CONTEXT, page_tokens=CHUNK, call_tokens=16)
MODES = ["abort", "retract", "in_place"]


def model():
    """Its end token lies outside of the vocabulary: an answer has its full length."""
    config = make_config()
    return dataclasses.replace(config, eos_token_id=config.vocab_size)


def handed(seed):
    return hand_over(make_params(seed), model(), jax.devices()[0])


def expected(seed):
    return [0.0, *Oracle(make_config(), make_params(seed)).logprobs(PROBE)]


@pytest.fixture(scope="module")
def started():
    engine = InsideEngine(handed(0), SHAPES)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def engine(started):
    """The engine as nobody has used it yet, with weights 0 of seed 0."""
    # A new client of the same thread: what a test proves stays its own.
    client = InsideEngine.__new__(InsideEngine)
    Engine.__init__(client, started.url, model=started.model, wire=started._connection)
    client._scheduler = started._scheduler

    async def reset():
        await publish(EnginePool([client]), 0, 0)

    run(reset())
    client._proven.clear()
    return client


def run(conversation):
    return asyncio.run(asyncio.wait_for(conversation, 240))


async def publish(pool, version, seed, mode="abort"):
    return await publish_weights(handed(seed), version, pool, PROBE, expected(seed), mode=mode)


async def state(engine):
    return (await engine.server_info())["internal_states"][0]


async def work(engine):
    """What the device has done for the engine so far: its calls, tokens and milliseconds."""
    counts = (await state(engine)).items()
    return {name: count for name, count in counts if name.endswith(("_calls", "_tokens", "_ms"))}


def assert_sampled_by(completion, seed_of_version):
    """Each token has the logprob that the weights of its version give it."""
    ids = PROBE + completion.output_ids
    for version, start, end in completion.versions:
        oracle = Oracle(make_config(), make_params(seed_of_version[version]))
        logprobs = oracle.logprobs(ids)[len(PROBE) - 1 :]
        np.testing.assert_allclose(completion.logprobs[start:end], logprobs[start:end], atol=1e-4)


def test_tokens_and_logprobs_are_bitwise_those_of_a_server(engine, tmp_path):
    save_hf(make_params(0), model(), tmp_path / "model")
    samplings = [
        Sampling(30, seed=1),
        Sampling(20, seed=2, temperature=0.7, top_p=0.9),
        Sampling(25, seed=3, top_k=20, stop_token_ids=(5, 6, 7), routes_from=0),
        Sampling(10, temperature=0.0),
    ]

    async def ask(url_or_inside):
        pool = EnginePool([url_or_inside])
        async with pool:
            answers = [pool.generate(PROBE, sampling, 120) for sampling in samplings]
            return await asyncio.gather(*answers), await url_or_inside.score(PROBE)

    flags = ["--skip_tokenizer_init"]
    with serve(tmp_path / "model", tmp_path / "log", *flags) as server:
        theirs, their_scores = run(ask(Engine(server.url, model=model())))
    ours, our_scores = run(ask(engine))
    assert our_scores == their_scores
    for one, other in zip(ours, theirs, strict=True):
        fields = dataclasses.asdict(one), dataclasses.asdict(other)
        for document in fields:
            document.pop("seconds_held")
            document.pop("cached_tokens")  # the fixture's probe may have left a prefix
            routes = document.pop("routes")
            document["routes"] = None if routes is None else routes.tolist()
        assert fields[0] == fields[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
def test_requests_go_on_through_an_update_with_the_weights_that_follow(engine, mode, frees):
    """Whatever the pause: before the update tokens of the old weights, afterwards of the new."""

    async def conversation():
        pool = EnginePool([engine])
        await publish(pool, 1, 1)
        running = [
            asyncio.create_task(pool.generate(PROBE, Sampling(90, seed=n), 60))
            for n in range(2 * SLOTS)
        ]
        await until_running(engine, *running)
        await pool.suspend(mode, MEMORY_TAGS if frees else ())
        paused, done = await state(engine), await work(engine)
        assert paused["paused"] and (paused["device_bytes"] == 0) == frees
        late = asyncio.create_task(pool.generate(PROBE, Sampling(5, seed=99), 60))
        await asyncio.sleep(0.3)
        assert await work(engine) == done
        published = await publish(pool, 2, 2, mode)
        assert published.engines == 1 and published.probe_error < 1e-4
        assert (await state(engine))["device_bytes"] > 0
        return await asyncio.gather(*running, late)

    *amid, late = run(conversation())
    assert late.versions == [(2, 0, 5)] and late.seconds_held > 0.3  # not of its deadline
    assert {len(completion.output_ids) for completion in amid} == {90}
    spans = {tuple(version for version, _, _ in one.versions) for one in amid}
    assert (1, 2) in spans and spans <= {(1,), (1, 2), (2,)}
    for completion in amid:
        if mode != "in_place" or frees:  # else new weights read keys of the old ones
            assert_sampled_by(completion, {1: 1, 2: 2})


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_sampled_during_an_update_whenever_requests_come(engine, seed):
    """A property of the division in time, over random arrivals, pauses and lengths."""
    rng = random.Random(seed)

    async def episode(pool):
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        sampling = Sampling(rng.randrange(1, 60), seed=rng.randrange(1000))
        done = await pool.generate(PROBE[: rng.randrange(1, 30)], sampling, 60)
        assert len(done.output_ids) == sampling.max_new_tokens
        versions = [version for version, _, _ in done.versions]
        assert versions == sorted(set(versions))

    async def trainer(pool):
        for version in range(1, 5):
            mode, frees = rng.choice(MODES), rng.random() < 0.5
            await asyncio.sleep(rng.uniform(0.0, 0.1))
            await pool.suspend(mode, MEMORY_TAGS if frees else ())
            before = await work(engine)
            await asyncio.sleep(rng.uniform(0.0, 0.1))  # the update
            assert await work(engine) == before
            await publish(pool, version, version % 2, mode)
            assert await work(engine) != before

    async def conversation():
        pool = EnginePool([engine])
        await asyncio.gather(trainer(pool), *(episode(pool) for _ in range(30)))

    run(conversation())


def test_a_thread_that_fails_is_an_error_at_once_for_all_who_wait_and_all_who_come():
    engine = InsideEngine(handed(0), SHAPES)
    engine.start()

    async def conversation():
        pool = EnginePool([engine])
        running = asyncio.create_task(pool.generate(PROBE, Sampling(400), 600))
        await until_running(engine, running)
        poison = Request("poison", [1], SamplingParams(max_new_tokens=1))

        def fail(request):
            raise MemoryError("the device is out of memory")

        poison.notify = fail
        engine._scheduler.submit(poison)
        started = time.monotonic()
        cause = "the engine's scheduler ended: MemoryError the device is out of memory"
        with pytest.raises(EngineError, match=cause):
            await running
        with pytest.raises(EngineError, match=cause):
            await pool.generate(PROBE, Sampling(1), 600)
        with pytest.raises(EngineError, match=cause):
            await publish(pool, 1, 0)
        for call in (engine.model_info(), engine.pause(), engine.score(PROBE)):
            with pytest.raises(EngineDead, match=r"slots$"):
                await call
        assert await engine.health() == "gone"
        assert time.monotonic() - started < 30  # of deadlines of 60 and 600 s

    run(conversation())
    engine.stop()


def test_stopping_ends_its_requests_and_frees_its_memory():
    engine = InsideEngine(handed(0), SHAPES)
    engine.start()

    async def conversation():
        task = asyncio.create_task(engine.generate(PROBE, Sampling(400), 600))
        await until_running(engine, task)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineDead, match="shutting down"):
            await task

    run(conversation())
    assert engine._scheduler.device.allocated_bytes() == 0
    engine.stop()  # again


def test_a_start_hears_a_wish_to_stop_and_has_a_deadline():
    engine = InsideEngine(handed(0), SHAPES)
    with pytest.raises(Stopped):
        engine.start(should_stop=lambda: True)
    engine.stop()
    engine = InsideEngine(handed(0), SHAPES)
    with pytest.raises(EngineError, match="was not ready within 0 s"):
        engine.start(deadline_seconds=0.0)
    engine.stop()


def test_weights_that_cannot_be_loaded_are_an_error_of_the_start():
    weights = handed(0)
    for leaf in jax.tree.leaves(weights.params):
        leaf.delete()
    engine = InsideEngine(weights, SHAPES)
    with pytest.raises(EngineError, match=r"scheduler ended: .*deleted"):
        engine.start()
    engine.stop()


def test_a_request_that_does_not_fit_is_rejected_and_the_engine_is_not_blamed(engine):
    async def conversation():
        pool = EnginePool([engine])
        with pytest.raises(RequestRejected, match="exceed the context of 512"):
            await pool.generate(PROBE, Sampling(500), 60)
        with pytest.raises(RequestRejected, match="outside the vocabulary"):
            await pool.generate([10**6], Sampling(1), 60)
        assert pool.states[engine.url] == "ready"

    run(conversation())


def test_weights_that_the_trainer_does_not_have_are_found_out(engine):
    """By their checksums: the probe does not hold the token whose row is another."""
    params = jax.tree.map(np.copy, make_params(3))
    weights = handed(3)
    params["embed"]["embedding"][600] += 1.0
    other = hand_over(params, model(), jax.devices()[0])
    mixed = dataclasses.replace(other, checksums=weights.checksums)

    async def conversation():
        pool = EnginePool([engine])
        with pytest.raises(
            EngineError, match=r"holds other bytes than weights 3 in 1 tensors \(embed/embedding"
        ):
            await publish_weights(mixed, 3, pool, PROBE, expected(3))
        assert pool.states[engine.url] == "suspect"

    run(conversation())


def test_files_are_not_what_an_engine_inside_the_trainer_takes(engine, tmp_path):
    async def conversation():
        with pytest.raises(EngineError, match="takes arrays"):
            await publish_weights(tmp_path, 3, EnginePool([engine]), PROBE, expected(0))

    run(conversation())


def test_a_caller_that_leaves_a_call_does_not_end_the_thread(engine):
    """A cancelled future takes no result."""
    scheduler = engine._scheduler
    block = scheduler.call(lambda: time.sleep(0.3))
    left = scheduler.call(lambda: 1)
    assert left.cancel()
    block.result(60)
    assert scheduler.call(lambda: 2).result(60) == 2


def test_a_request_whose_caller_leaves_makes_room(engine):
    async def conversation():
        task = asyncio.create_task(engine.generate(PROBE, Sampling(400), 60))
        await until_running(engine, task)
        task.cancel()
        while (await state(engine))["running"]:
            await asyncio.sleep(0.003)

    run(conversation())
    run(conversation())  # on another event loop: the first one is closed
    begun = Completion.unfinished()
    assert len(run(engine.generate(PROBE, Sampling(3), 60, begun=begun)).output_ids) == 3
