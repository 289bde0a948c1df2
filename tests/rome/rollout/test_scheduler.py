"""Asynchronous rollouts: staleness is bounded, and nothing is lost or taken twice."""

import asyncio
import collections
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.rollout.episode import RolloutError
from rome.rollout.group import GroupPlan
from rome.rollout.rules import Rules
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


def test_a_task_that_cannot_be_played_is_set_aside_by_name_counted_and_replaced(tmp_path):
    path = tmp_path / "spoiled.jsonl"
    world = play_all(RULES, broken=frozenset({"task/1_2"}), spoiled=path, train_s=0.1)
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert line == {
        "task": "task/1_2",
        "ending": "infra_verifier",
        "note": "it breaks",
        "group": [5, 0],
        "replacement": ["task/5_again1_in0", 1],
    }
    assert [t.task for t in world.steps[1][1].groups[2]] == ["task/5_again1_in0"] * 2
    assert world.accounting.trained == 36 and world.accounting.dropped == {"spoiled_task": 2}


def test_a_wave_of_which_more_than_a_quarter_cannot_be_played_ends_the_run(tmp_path):
    rules = Rules(groups_per_step=8, group_size=1, concurrency=1, steps=2)

    def run_with(number):
        broken = frozenset(f"task/0_{index}" for index in range(number))
        world = World(rules, broken=broken, spoiled=tmp_path / f"{number}.jsonl")

        async def main():
            world.make()
            try:
                await world.train()
            finally:
                await world.rollouts.close()

        run(main())
        return world

    assert len(run_with(2).steps) == 2
    with pytest.raises(RolloutError, match=r"3 of 8 tasks could not be played.*task/0_2 \(infra_"):
        run_with(3)
    # The same command gets past them: they are known now.
    assert len(run_with(3).steps) == 2


def test_tasks_that_are_all_set_aside_leave_nothing_to_play(tmp_path):
    world = World(dataclasses.replace(RULES, steps=1), broken=frozenset({"task/0_0"}))
    world.replan = lambda number, attempt: GroupPlan("task/0_0")

    async def main():
        world.make()
        with pytest.raises(RolloutError, match="no task is left that can be played"):
            await world.train()
        await world.rollouts.close()

    run(main())


def test_a_step_in_which_nothing_ends_says_so():
    world = World(RULES)

    async def main():
        world.make()._quiet_seconds = 50.0
        world.play = lambda episode: asyncio.sleep(1000)
        world.rollouts._play = world.play
        with pytest.raises(RolloutError, match=r"none of 4 episodes has ended for 5[01] s"):
            await world.train()
        await world.rollouts.close()

    run(main())


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


def test_forks_of_a_task_that_was_set_aside_are_closed_with_the_last_of_its_siblings():
    world, forks = World(Rules(4, 1, 4, 1, siblings=4), broken=frozenset({"hard"})), SharedForks()
    world.plan = lambda wave: [GroupPlan("hard", source="expert.json", forks=forks)] * 4

    async def main():
        world.make()
        await world.train()
        await world.rollouts.close()

    run(main())
    tasks = [t.task for group in world.steps[0][1].groups for t in group]
    assert tasks == ["task/0_again1_in0"] * 4 and forks.closed == 1


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


def test_a_stale_sample_that_is_written_while_it_is_cancelled_is_not_taken_up_again():
    """An episode may be cancelled while its file is written; it is deleted after that."""
    rules = Rules(4, 1, 8, 12, async_ratio=1, stale_samples="drop")
    apart, meanwhile = (
        play_all(rules, saves_cancelled=saves, length=one_in_three_is_slow)
        for saves in (False, True)
    )
    assert apart.accounting.dropped["stale"] > 0
    assert apart.accounting.to_json() == meanwhile.accounting.to_json()
    assert names(apart.steps) == names(meanwhile.steps)


def one_in_three_is_slow(episode):
    return 9.0 if episode.seed % 3 == 0 else 0.5
