"""The states of a pool's engines: hanging, dead, joining, slow and lent ones."""

import asyncio

import pytest

from rome.engine import publish
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool
from tests.rome.engine.fake_sglang import FakeSGLang, fakes
from tests.rome.engine.pools import (
    PROMPT,
    assert_by_one_version_each,
    bring,
    run,
    supervised,
    until,
)


def test_an_engine_that_hangs_is_noticed_and_its_requests_go_on_elsewhere_from_what_they_had(
    tmp_path,
):
    hanging, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(hanging, good) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 3)
            async with supervised(pool, probe_seconds=2.0):
                tasks = [
                    asyncio.ensure_future(pool.generate(PROMPT, Sampling(100), 30))
                    for _ in range(4)
                ]
                await until(lambda: hanging.running and good.running)
                for request in hanging.running.values():  # frozen, as by SIGSTOP
                    request["finish"] = None
                hanging.traps.add("hangs")
                hanging.paused = "in_place"
                for completion in await asyncio.gather(*tasks):
                    assert len(completion.output_ids) == 100
                    assert_by_one_version_each(completion, PROMPT)
                assert (
                    pool.states[hanging.url] in ("suspect", "starting")
                    and "did not answer its health probe within 2 s" in pool.causes[hanging.url]
                )
                hanging.traps.clear()
                await until(lambda: pool.states[hanging.url] == "ready")

    run(conversation())


def test_a_partial_answer_of_one_engine_is_gone_on_with_by_another_one(tmp_path):
    """The first part comes from the engine that then fails its update; its tokens stay, with their
    version.
    """
    bad, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(bad, good) as engines:
            pool = EnginePool(engines)
            task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(50), 30))
            await until(lambda: any(len(request["ids"]) > 5 for request in bad.running.values()))
            bad.traps.add("update_half")
            await bring(pool, tmp_path, 9)
            completion = await task
            assert [version for version, _, _ in completion.versions] == [
                0,
                9,
            ] and completion.versions[0][2] > 5
            assert_by_one_version_each(completion, PROMPT)
            second = next(
                body
                for route, body in good.bodies
                if route == "/generate" and body["sampling_params"]["max_new_tokens"] > 1
            )
            assert (
                second["input_ids"] == PROMPT + completion.output_ids[: completion.versions[0][2]]
            )

    run(conversation())


def test_an_engine_that_was_started_anew_unseen_is_found_out_by_its_versions_and_brought_back(
    tmp_path,
):
    """Between two health probes: its answers carry weights that were not proven there, and none of
    them is used.
    """
    server, other = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(server, other) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 5)
            await server.crash()
            await server.start()
            completions = await asyncio.gather(
                *(pool.generate(PROMPT, Sampling(3), 30) for _ in range(6))
            )
            assert {completion.versions[0][0] for completion in completions} == {5}
            assert (
                pool.states[server.url] == "suspect"
                and "answered with weights 'default'; proven there were 5"
                in pool.causes[server.url]
            )
            async with supervised(pool):
                await until(lambda: pool.states[server.url] == "ready")
            assert server.weight_version == "5"

    run(conversation())


def test_a_late_joiner_serves_only_when_it_has_the_current_weights(tmp_path):
    first, late = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(first, late) as (engine, joining):
            pool = EnginePool([engine])
            await bring(pool, tmp_path, 5)
            pool.join(joining)
            await asyncio.gather(*(pool.generate(PROMPT, Sampling(2), 30) for _ in range(4)))
            assert late.bodies == [] and pool.states[late.url] == "starting"
            with pytest.raises(ValueError, match="has an engine at"):
                pool.join(joining)
            async with supervised(pool):
                await until(lambda: pool.states[late.url] == "ready")
            assert late.weight_version == "5"
            completions = await asyncio.gather(
                *(pool.generate(PROMPT, Sampling(2), 30) for _ in range(4))
            )
            assert {completion.versions[0][0] for completion in completions} == {
                5
            } and "/generate" in dict(late.bodies)

    run(conversation())


def test_a_url_engine_that_died_is_taken_back_when_it_answers_again_and_requests_wait_for_it(
    tmp_path,
):
    server = FakeSGLang()

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 5)
            async with supervised(pool):
                task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(50), 30))
                await until(lambda: server.running)
                await server.crash()
                await until(lambda: pool.states[server.url] == "dead")
                waiting = asyncio.ensure_future(pool.generate(PROMPT, Sampling(2), 30))
                with pytest.raises(
                    EngineError, match="no engine came back within 0 s: .*" + server.url
                ):
                    await pool.generate(PROMPT, Sampling(2), 0.1)
                await server.start()
                for completion in await asyncio.gather(task, waiting):
                    assert [version for version, _, _ in completion.versions] == [5]

    run(conversation())


def test_a_straggler_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "STRAGGLER_SECONDS", 0.3)
    hanging, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(hanging, good) as engines:
            pool = EnginePool(engines)
            hanging.traps.add("hangs")
            published = await bring(pool, tmp_path, 2)
            assert (
                published.engines == 1 and "did not take weights 2 in time" in published.failed[0]
            )
            assert (await pool.generate(PROMPT, Sampling(2), 30)).versions == [(2, 0, 2)]

    run(conversation())


def test_a_slow_engine_gets_fewer_requests(tmp_path):
    slow, fast = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(slow, fast) as engines:
            pool = EnginePool(engines)
            slow.traps.add("hangs")
            stuck = [
                asyncio.ensure_future(pool.generate(PROMPT, Sampling(1), 30)) for _ in range(4)
            ]
            await until(
                lambda: sum(pool.in_flight.values()) == 2
            )  # the fast one has answered its two
            for _ in range(10):
                await pool.generate(PROMPT, Sampling(1), 30)
            assert len([1 for route, _ in slow.bodies if route == "/generate"]) == 2
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    run(conversation())


def test_memory_is_lent_to_the_learner_and_nothing_is_sampled_before_weights_are_proven_again(
    tmp_path,
):
    servers = [FakeSGLang(), FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            async with supervised(pool):
                task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(30), 30))
                await until(lambda: servers[0].running or servers[1].running)
                await pool.lend(2)
                assert all(server.released == {"weights", "kv_cache"} for server in servers)
                await asyncio.sleep(0.2)
                assert not task.done() and set(pool.states.values()) == {"lent"}
                await pool.take_back()
                assert all(server.released == set() for server in servers)
                await asyncio.sleep(0.1)
                assert not task.done()
                await bring(pool, tmp_path, 2)
                completion = await task
                assert [version for version, _, _ in completion.versions] in ([1, 2], [2])
                assert_by_one_version_each(completion, PROMPT)

    run(conversation())


def test_what_an_engine_was_sampling_when_it_is_lent_goes_on_on_another_one_from_its_tokens(
    tmp_path,
):
    servers = [FakeSGLang(), FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            async with supervised(pool):
                tasks = [
                    asyncio.ensure_future(
                        pool.generate(PROMPT, Sampling(30), 30, affinity=str(number))
                    )
                    for number in range(4)
                ]
                await until(lambda: servers[0].running and servers[1].running)
                await pool.lend(1)
                assert (pool.states[engines[0].url], pool.states[engines[1].url]) == (
                    "ready",
                    "lent",
                )
                assert servers[1].released == {"weights", "kv_cache"} and not servers[0].released
                for completion in await asyncio.gather(*tasks):
                    assert_by_one_version_each(completion, PROMPT)
                await pool.take_back()
                assert pool.states[engines[1].url] == "updating" and servers[1].released == set()
                await bring(pool, tmp_path, 2)
                assert set(pool.states.values()) == {"ready"}

    run(conversation())
