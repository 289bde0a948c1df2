"""Engines that fail at once cost no request while a good engine is left."""

import asyncio

import pytest

from rome.engine.completion import Sampling
from rome.engine.errors import RequestRejected
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


@pytest.mark.parametrize("trap", ["fails_fast", "rejects_fast"])
@pytest.mark.parametrize("num_bad", [1, 3])
def test_fast_errors_of_engines_cost_no_request_while_a_good_engine_is_left(trap, num_bad):
    """An engine that fails at once always has the fewest requests in flight."""
    servers = [FakeSGLang(traps=(trap,)) for _ in range(num_bad)] + [FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            completions = await asyncio.gather(
                *(pool.generate(PROMPT, Sampling(3), 30, affinity=str(i)) for i in range(24))
            )
            for completion in completions:
                assert_by_one_version_each(completion, PROMPT)
            assert [pool.states[server.url] for server in servers] == [
                *["suspect"] * num_bad,
                "ready",
            ]
            assert servers[0].url in pool.causes[servers[0].url]

    run(conversation())


def test_a_wrong_answer_amid_a_completion_moves_it_without_a_token_lost_or_twice():
    server, other = FakeSGLang(), FakeSGLang()
    real_answer = server._answer
    answers = []

    def answer(*arguments):
        whole = real_answer(*arguments)
        answers.append(whole)
        if len(answers) == 2:  # the rest of the completion, after the pause
            whole["meta_info"]["weight_versions"][0]["version"] = None
        return whole

    server._answer = answer

    async def conversation():
        async with fakes(server, other) as engines:
            pool = EnginePool(engines)
            task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(40), 30))
            await until(lambda: any(request["ids"] for request in server.running.values()))
            await engines[0].pause("abort")
            await engines[0].resume()
            completion = await task
            assert len(completion.output_ids) == 40
            assert_by_one_version_each(completion, PROMPT)
            assert pool.states == {server.url: "suspect", other.url: "ready"}

    run(conversation())


def test_a_request_that_every_engine_rejects_is_the_request_and_costs_no_engine():
    servers = [FakeSGLang(traps=("rejects_fast",)) for _ in range(3)]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            with pytest.raises(RequestRejected, match="context of 8"):
                await pool.generate(PROMPT, Sampling(3), 30)
            assert set(pool.states.values()) == {"ready"}

    run(conversation())


def test_an_engine_that_proves_its_weights_and_fails_its_requests_is_tried_ever_less_often(
    tmp_path,
):
    bad, good = FakeSGLang(traps=("fails_fast",)), FakeSGLang()

    async def conversation():
        async with fakes(bad, good) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 2)
            async with supervised(pool, interval_seconds=0.02):
                ends = asyncio.get_running_loop().time() + 1.5
                while asyncio.get_running_loop().time() < ends:
                    completion = await pool.generate(PROMPT, Sampling(1), 30)
                    assert completion.versions == [(2, 0, 1)]
                asked = [body for route, body in bad.bodies if route == "/generate"]
                failed = [body for body in asked if body["logprob_start_len"] < 0]
                assert 2 <= len(failed) <= 9
                bad.traps.clear()
                await until(lambda: pool.states[bad.url] == "ready")
                await until(lambda: pool.states[good.url] == "ready")
                await asyncio.gather(*(pool.generate(PROMPT, Sampling(1), 30) for _ in range(4)))
                assert pool.strikes[bad.url] == 0

    run(conversation())
