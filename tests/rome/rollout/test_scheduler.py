"""Asynchronous rollouts: staleness is bounded, and nothing is lost or taken twice."""

import asyncio
import collections
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.rollout.episode import RolloutError
from rome.rollout.group import GroupPlan
from rome.rollout.scheduler import Rules
from rome.rollout.simulator.clock import run
from rome.stopping import Stopped
from tests.rome.rollout.runs import RULES, World, names, play_all, staleness


def test_without_asynchrony_each_step_takes_its_own_wave_in_order_and_all_of_it_is_fresh():
    world = play_all(RULES)
    assert names(world.steps) == [
        [(3 * step + index, number) for index in range(3) for number in range(2)]
        for step in range(6)
    ]
    assert set(staleness(world.steps)) == {0}
    assert world.accounting.to_json() == {
        "started": 36,
        "trained": 36,
        "dropped": {},
        "in_flight": 0,
    }
    assert world.most_running == RULES.concurrency


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from(["wait", "drop", "keep"]),
    st.integers(0, 2),
    st.booleans(),
    st.floats(0, 5),
    st.integers(0, 10**6),
)
def test_whatever_the_numbers_nothing_is_lost_taken_twice_or_staler_than_allowed(
    alpha,
    groups,
    size,
    concurrency,
    stale_samples,
    redundancy,
    replace,
    train_s,
    seed,
):
    rules = Rules(
        groups_per_step=groups,
        group_size=size,
        concurrency=concurrency,
        steps=7,
        async_ratio=alpha,
        redundancy=redundancy,
        replace_equal=replace,
        stale_samples=stale_samples,
    )
    world = play_all(rules, seed=seed, train_s=train_s)
    assert [step for step, _ in world.steps] == list(range(7))
    taken = [name for step in names(world.steps) for name in step]
    assert len(taken) == len(set(taken)) == 7 * groups * size
    assert all(len(group) == size for _, taken in world.steps for group in taken.groups)
    assert stale_samples == "keep" or max(staleness(world.steps)) <= alpha
    assert min(staleness(world.steps)) >= 0
    dropped = set(world.accounting.dropped)
    possible = {
        "redundant": redundancy > 0,
        "equal_group": replace,
        "stale": stale_samples == "drop",
    }
    assert dropped <= {reason for reason, can_occur in possible.items() if can_occur}
    assert world.most_running <= concurrency and not world.running
    world.accounting.check()


def test_with_waiting_alone_nothing_is_dropped_and_steps_overlap_with_rollouts():
    synchronous, asynchronous = (
        play_all(dataclasses.replace(RULES, async_ratio=alpha, concurrency=6), train_s=2.0)
        for alpha in (0, 1)
    )
    assert not asynchronous.accounting.dropped
    assert set(staleness(asynchronous.steps)) == {0, 1}
    seconds = [
        sum(taken.seconds for _, taken in world.steps) for world in (synchronous, asynchronous)
    ]
    assert seconds[1] < 0.8 * seconds[0]
    assert sum(taken.waited for _, taken in asynchronous.steps) < sum(
        taken.waited for _, taken in synchronous.steps
    )


def test_the_slowest_of_a_group_are_cancelled():
    world = play_all(dataclasses.replace(RULES, redundancy=2, concurrency=12))
    assert world.accounting.dropped == {"redundant": 36} and len(world.files) == 36


def test_a_group_without_spread_is_replaced_at_once_by_another_task_and_seen_by_the_curriculum():
    world = play_all(
        dataclasses.replace(RULES, replace_equal=True),
        reward=lambda episode: float("again" in episode.task and episode.episode == 0),
    )
    assert all(
        t.task.endswith("again1")
        for _, taken in world.steps
        for group in taken.groups
        for t in group
    )
    assert all(
        [t.group for t in taken.replaced] == sorted(t.group for t in taken.replaced)
        for _, taken in world.steps
    )
    assert (
        sum(len(taken.replaced) for _, taken in world.steps)
        == world.accounting.dropped["equal_group"]
        == 36
    )


def test_a_task_that_never_has_spread_is_taken_in_the_end():
    world = play_all(
        dataclasses.replace(RULES, replace_equal=True, steps=1), reward=lambda episode: 0.0
    )
    assert {
        t.task.rpartition("again")[2]
        for _, taken in world.steps
        for group in taken.groups
        for t in group
    } == {"4"}


def test_single_episodes_are_taken_without_their_siblings_and_still_know_their_group():
    rules = Rules(6, 1, 6, 4, async_ratio=1, siblings=2, stale_samples="keep")
    world = play_all(rules)
    groups = [[t.group for group in taken.groups for t in group] for _, taken in world.steps]
    assert any(step.count(group) == 1 for step in groups for group in step)
    counts = collections.Counter(group for step in groups for group in step)
    assert set(counts.values()) == {2} and len(counts) == 12
    tasks = collections.defaultdict(set)
    for _, taken in world.steps:
        for [t] in taken.groups:
            tasks[t.group].add((t.task, t.episode))
    assert all(
        len(entries) == 2 and len({task for task, _ in entries}) == 1 for entries in tasks.values()
    )


def test_an_episode_that_fails_for_good_ends_the_step_with_its_cause_and_the_rest_stays():
    world = World(
        RULES, fault=lambda episode: RolloutError("spoiled") if episode.group == 2 else None
    )

    async def main():
        world.make()
        with pytest.raises(RolloutError, match="spoiled"):
            await world.train()
        await world.rollouts.close()

    run(main())
    assert world.files and not world.running


def test_a_stop_is_heard_while_waiting_and_what_runs_is_closed():
    world = World(RULES)

    async def main():
        world.make()
        asyncio.get_running_loop().call_later(0.1, setattr, world, "stop", True)
        with pytest.raises(Stopped):
            await world.train()
        await world.rollouts.close()

    run(main())
    assert not world.running
    world.accounting.check()


def test_an_episode_that_something_else_cancels_ends_the_step_with_its_name():
    world = World(
        RULES, fault=lambda episode: asyncio.CancelledError() if episode.group == 2 else None
    )

    async def main():
        world.make()
        with pytest.raises(RolloutError, match="000000_g002_e00 of task/0_2 was cancelled"):
            await world.train()
        await world.rollouts.close()

    run(main())


def test_a_resampled_group_is_not_replaced_whatever_its_episodes_did():
    world = World(
        dataclasses.replace(RULES, replace_equal=True, steps=1), reward=lambda episode: 1.0
    )
    world.plan = lambda wave: [
        GroupPlan("hard", source="expert.json"),
        GroupPlan("open"),
        GroupPlan("open"),
    ]

    async def main():
        world.make()
        await world.train()
        await world.rollouts.close()

    run(main())
    assert [group[0].task == "hard" for group in world.steps[0][1].groups] == [True, False, False]
    assert world.accounting.dropped == {"equal_group": 2 * 4 * 2}


def test_the_accounting_is_compared_with_what_is_in_flight():
    world = World(RULES)

    async def main():
        world.make()
        await world.train(0, 2)
        world.accounting.drop("twice")
        with pytest.raises(AssertionError, match="are in flight, and the sample accounting says"):
            await world.rollouts.check()
        await world.rollouts.close()

    run(main())


class SharedForks:
    def __init__(self):
        self.closed = 0

    async def aclose(self):
        self.closed += 1


def test_forks_of_siblings_are_closed_with_the_last_of_them():
    world, forks, seen = World(Rules(1, 1, 4, 4, async_ratio=3, siblings=4)), SharedForks(), []
    world.plan = lambda wave: [GroupPlan("hard", source="expert.json", forks=forks)]

    async def main():
        world.make()
        await world.rollouts.advance(0)
        for step in range(4):
            world.accounting.train(sum(map(len, (await world.rollouts.take(step)).groups)))
            await asyncio.sleep(0.1)
            seen.append(forks.closed)
        await world.rollouts.close()

    run(main())
    assert seen == [0, 0, 0, 1]
