"""Virtual time: waiting takes none, timers fire in order, and a deadlock is an error."""

import asyncio

import pytest

from rome.rollout.simulator.clock import Level, run


def test_a_day_passes_at_once():
    async def sleep_for_a_day():
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time() - began

    assert run(sleep_for_a_day()) == 86_400  # and this test may take minutes at most


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_set():
    fired = []

    async def wait():
        loop = asyncio.get_running_loop()
        for number in range(20):
            loop.call_at(1.0, fired.append, number)
        loop.call_at(0.5, fired.append, "first")
        loop.call_at(1.0, fired.append, "cancelled").cancel()
        await asyncio.sleep(2)

    run(wait())
    assert fired == ["first", *range(20)]


def test_between_two_timers_every_task_goes_on_as_far_as_it_can():
    seen = []

    async def many_steps():
        await asyncio.sleep(1)
        for number in range(5):
            seen.append(number)
            await asyncio.sleep(0)

    async def main():
        task = asyncio.create_task(many_steps())
        await asyncio.sleep(0)  # its timer is set
        asyncio.get_running_loop().call_at(1.0, seen.append, "timer of the same moment")
        await task
        await asyncio.sleep(1)

    run(main())
    assert seen == [0, 1, 2, 3, 4, "timer of the same moment"]


def test_waiting_for_nothing_is_a_deadlock():
    async def wait_for_ever():
        await asyncio.sleep(3)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match=r"deadlock at 3\.000 virtual seconds"):
        run(wait_for_ever())


def test_timeouts_work_in_virtual_time():
    async def wait():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(10)
        return asyncio.get_running_loop().time()

    assert run(wait()) == 5


def test_the_integral_of_a_level_counts_from_its_last_reset():
    async def measure():
        level = Level(asyncio.get_running_loop(), 2.0)
        await asyncio.sleep(3)
        level.add(1.0)
        await asyncio.sleep(1)
        first = level.integral()
        level.reset()
        await asyncio.sleep(2)
        return first, level.integral()

    assert run(measure()) == (2 * 3 + 3, 3 * 2)
