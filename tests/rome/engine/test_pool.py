"""Routing and states, with engines that need no server."""

import asyncio

import pytest

from rome.engine.client import Engine
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineDead, EngineError
from rome.engine.pool import EnginePool


class Scripted(Engine):
    """An engine whose requests end when the test says so."""

    def __init__(self, name):
        super().__init__(f"http://{name}:1")
        self.started = 0
        self.error = None
        self.done = asyncio.Event()

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None, begun=None):
        self.started += 1
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return Completion([1], [0.0], "stop", [(0, 0, 1)])


def ask(pool, affinity=None):
    return asyncio.ensure_future(pool.generate([1], Sampling(1), 30, affinity=affinity))


async def soon():
    for _ in range(5):
        await asyncio.sleep(0)


def test_new_episodes_go_where_least_is_in_flight_and_old_ones_where_they_were():
    async def run():
        a, b = Scripted("a"), Scripted("b")
        pool = EnginePool([a, b])
        first = ask(pool, "one")
        await soon()
        second = ask(pool, "two")
        await soon()
        assert (a.started, b.started) == (1, 1)
        again = [ask(pool, "one") for _ in range(3)]
        await soon()
        assert (a.started, b.started) == (4, 1) and pool.in_flight == {a.url: 4, b.url: 1}
        a.done.set(), b.done.set()
        await asyncio.gather(first, second, *again)
        assert set(pool.in_flight.values()) == {0}

    asyncio.run(run())


def test_a_dying_engine_hands_its_requests_to_another_one():
    async def run():
        a, b = Scripted("a"), Scripted("b")
        pool = EnginePool([a, b])
        task = ask(pool, "one")
        await soon()
        a.error = EngineDead("engine a is dead")
        a.done.set(), b.done.set()
        assert (await task).finish_reason == "stop"
        assert pool.states == {a.url: "dead", b.url: "ready"} and b.started == 1

    asyncio.run(run())


def test_with_no_engine_left_every_request_fails_at_once_with_the_cause():
    async def run():
        a = Scripted("a")
        pool = EnginePool([a])
        a.error = EngineDead("engine http://a:1 is dead: start it again")
        a.done.set()
        for _ in range(2):
            with pytest.raises(
                EngineError, match="no engine is left: engine http://a:1 is dead: start it again"
            ):
                await pool.generate([1], Sampling(1), 3600)
        assert a.started == 1

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_error_of_the_request_leaves_the_engine_alive():
    async def run():
        a = Scripted("a")
        pool = EnginePool([a])
        a.error = EngineError("too long")
        a.done.set()
        with pytest.raises(EngineError, match="too long"):
            await pool.generate([1], Sampling(1), 30)
        assert pool.states[a.url] == "ready"

    asyncio.run(run())


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one engine"):
        EnginePool([])
