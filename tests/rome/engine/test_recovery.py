"""Real engine processes that are killed and stopped while requests run, and that lend their memory
out.
"""

import asyncio
import dataclasses
import os
import signal

import numpy as np
import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights, write_checkpoint
from rome.engine.supervise import supervise
from tests.rome.engine.probe import PROBE, expected
from tests.rome.engine.test_traps import supervised
from tests.rome.serve.tiny import (
    Oracle,
    make_checkpoint,
    make_config,
    make_params,
    serve,
    until_running,
)

LONGEST = 4096  # tokens of a context
TOKENS = 3000  # of a completion that runs while its engine is lent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("start") / "model", endless=True)


async def until(claim, seconds=60.0):
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_requests_of_an_engine_that_is_killed_or_stopped_finish_elsewhere_and_it_comes_back_proven(
    start, tmp_path, number
):
    with serve(start, tmp_path / "a.log") as a, serve(start, tmp_path / "b.log") as b:

        async def run():
            pool = EnginePool(
                [Engine(server.url, dead_after_seconds=0.5) for server in (a, b)],
                restart={a.url: a.restart, b.url: b.restart},
            )
            async with pool:
                params = make_params(4)
                supervisor = asyncio.create_task(
                    supervise(pool, interval_seconds=0.3, probe_seconds=3.0)
                )
                await publish_weights(
                    write_checkpoint(params, make_config(), tmp_path / "weights", 7),
                    7,
                    pool,
                    PROBE,
                    expected(params),
                )
                tasks = [
                    asyncio.ensure_future(pool.generate(PROBE, Sampling(400, seed=i), 120))
                    for i in range(16)
                ]
                await until_running(pool.engines[0], *tasks)
                first = a.process.pid
                os.kill(first, number)
                completions = await asyncio.gather(*tasks)
                assert {len(completion.output_ids) for completion in completions} == {400}
                assert {
                    version for completion in completions for version, _, _ in completion.versions
                } == {7}
                ids = (PROBE + completions[0].output_ids)[:128]
                np.testing.assert_allclose(
                    completions[0].logprobs[: 128 - len(PROBE)],
                    Oracle(make_config(), params).logprobs(ids)[len(PROBE) - 1 :],
                    atol=1e-4,
                )
                await until(lambda: pool.states[a.url] == "ready")
                assert (
                    a.process.pid != first
                    and (await pool.engines[0].model_info())["weight_version"] == "7"
                )
                again = await pool.engines[0].generate(PROBE, Sampling(400, seed=0), 60)
                assert again.output_ids == completions[0].output_ids
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)

        asyncio.run(asyncio.wait_for(run(), 240))


@pytest.mark.slow
def test_a_lone_engine_that_is_killed_during_a_publication_is_started_again_and_the_run_goes_on(
    start, tmp_path
):
    with serve(start, tmp_path / "a.log") as server:

        async def run():
            async with EnginePool(
                [Engine(server.url, dead_after_seconds=0.5)], restart={server.url: server.restart}
            ) as pool:
                supervisor = asyncio.create_task(supervise(pool, interval_seconds=0.3))
                await asyncio.sleep(0)
                params = make_params(5)
                path = write_checkpoint(params, make_config(), tmp_path / "weights", 3)
                os.kill(server.process.pid, signal.SIGKILL)
                published = await publish_weights(path, 3, pool, PROBE, expected(params))
                assert published.engines == 1
                assert (await pool.generate(PROBE, Sampling(5), 60)).versions == [(3, 0, 5)]
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)

        asyncio.run(asyncio.wait_for(run(), 240))


@pytest.mark.slow
def test_the_embedded_engine_lends_its_memory_and_samples_again_only_from_new_weights(tmp_path):
    params = make_params(6)
    config = dataclasses.replace(make_config(), max_position=LONGEST)
    start = make_checkpoint(tmp_path / "start", endless=True, max_position=LONGEST)
    lengths = ("--max_context", str(LONGEST), "--cache_tokens", str(2 * LONGEST))
    with serve(start, tmp_path / "a.log", *lengths) as server:

        async def run():
            async with EnginePool([Engine(server.url)]) as pool, supervised(pool):
                engine = pool.engines[0]
                full = (await engine.server_info())["internal_states"][0]["device_bytes"]
                task = asyncio.ensure_future(pool.generate(PROBE, Sampling(TOKENS), 120))
                await until_running(engine, task)
                with pytest.raises(EngineError, match="requests are in flight"):
                    await engine.release_memory()
                await pool.lend(1)
                empty = (await engine.server_info())["internal_states"][0]
                assert (
                    empty["released"] == ["kv_cache", "weights"]
                    and empty["device_bytes"] == 0 < full
                )
                for act, words in (
                    (engine.resume(), "cannot continue: .*resume_memory_occupation"),
                    (engine.checksum(), "is released"),
                    (engine.update_weights(str(start), 9), "call /resume_memory_occupation first"),
                ):
                    with pytest.raises(EngineError, match=words):
                        await act
                assert await engine.health() == "well"
                await pool.take_back()
                with pytest.raises(EngineError, match="load them by /update_weights_from_disk"):
                    await engine.resume()
                await publish_weights(
                    write_checkpoint(params, config, tmp_path / "weights", 2),
                    2,
                    pool,
                    PROBE,
                    expected(params),
                )
                completion = await task
                assert completion.versions[-1][0] == 2 and len(completion.output_ids) == TOKENS
                assert (await engine.server_info())["internal_states"][0]["device_bytes"] == full
                await engine.pause()
                await engine.release_memory(("kv_cache",))
                await engine.resume_memory()
                await engine.resume()  # the weights were not given away
                after = await pool.generate(PROBE, Sampling(10, seed=2), 60)
                np.testing.assert_allclose(
                    after.logprobs,
                    Oracle(make_config(), params).logprobs(PROBE + after.output_ids)[
                        len(PROBE) - 1 :
                    ],
                    atol=1e-4,
                )

        asyncio.run(asyncio.wait_for(run(), 120))
