"""A resumed run takes what the killed one took and goes on from there."""

import asyncio
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.group import GroupPlan
from rome.rollout.rules import Rules
from rome.rollout.simulator.clock import run
from tests.rome.rollout.runs import RULES, World, names, play_all, staleness


@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_a_run_that_is_killed_and_resumed_takes_the_same_groups_with_the_same_trajectories(
    alpha, tmp_path
):
    rules = dataclasses.replace(RULES, async_ratio=alpha, steps=8)
    alone = play_all(rules)
    first = World(rules, journal=tmp_path / "steps.jsonl")
    saved = {}

    async def until_killed():
        first.make()
        await first.train(0, 3)
        saved.update(
            json.loads(
                json.dumps(
                    {
                        "state": await first.rollouts.get_state(),
                        "accounting": first.accounting.to_json(),
                    }
                )
            )
        )
        await first.train(3, 6)  # beyond the checkpoint; its weights are lost
        await first.rollouts.close()

    run(until_killed())
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 6, "gro')  # the kill came in the middle of a line
    second = World(
        rules,
        journal=tmp_path / "steps.jsonl",
        files=first.files,
        accounting=Accounting.from_json(saved["accounting"]),
    )
    played = dict(first.played)

    async def resume():
        second.make().set_state(saved["state"], lambda entry: GroupPlan(entry["task"]))
        await second.train(3)
        await second.rollouts.close()

    run(resume())
    assert names(second.steps[:3]) == names(first.steps[3:])
    assert [taken.groups for _, taken in second.steps[:3]] == [
        taken.groups for _, taken in first.steps[3:]
    ]
    again = [
        name
        for name in second.played
        if played.get(name) and name in first.files and first.played[name] > 1
    ]
    assert not again  # what was finished is not paid for twice
    everything = [name for step in names(first.steps[:3]) + names(second.steps) for name in step]
    assert len(everything) == len(set(everything)) == 8 * 6
    assert second.accounting.to_json() == {
        "started": 48,
        "trained": 48,
        "dropped": {},
        "in_flight": 0,
    }
    if alpha == 0:
        assert names(first.steps[:3]) + names(second.steps) == names(alone.steps)
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "steps.jsonl").read_text().splitlines()
        if line.endswith("}")
    ] == list(range(8))


def test_a_lost_journal_costs_samples_that_became_too_old_but_no_more():
    rules = dataclasses.replace(RULES, async_ratio=1)
    world = World(rules)
    old = Trajectory("t", "f", [Chunk([1], [2], [-0.5], [(0, 0, 1)])], 1.0, "success")

    async def main():
        world.make().set_state(
            {
                "waves": 4,
                "groups": [
                    {"number": 9 + index, "attempt": 0, "task": "t", "source": "", "prefixes": []}
                    for index in range(3)
                ],
            },
            lambda entry: GroupPlan(entry["task"]),
        )
        world.files["000003_g000_e00"] = old
        await world.train(3)
        await world.rollouts.close()

    run(main())
    assert world.accounting.dropped == {"stale": 1} and max(staleness(world.steps)) <= 1


def killed_and_resumed(rules, tmp_path, *, save_at, kill_at, late_save=0.0, **options):
    """(first, second) of a run whose checkpoint is taken `late_save` seconds after step `save_at` -
    1 and that is killed in step `kill_at`.
    """
    first = World(rules, journal=tmp_path / "steps.jsonl", **options)
    saved = {}

    async def until_killed():
        first.make()
        await first.train(0, save_at)
        await asyncio.sleep(late_save)
        saved.update(json.loads(json.dumps(await first.rollouts.get_state())))
        await first.train(save_at, kill_at)
        await asyncio.sleep(0.3)
        await first.rollouts.close()

    run(until_killed())
    # The run may have deleted the files of waves that are past at its checkpoint.
    wave_left = first.rollouts.first_wave_left(save_at)
    assert wave_left >= save_at or any((rules.async_ratio, rules.redundancy, rules.siblings > 1))
    second = World(
        rules,
        journal=tmp_path / "steps.jsonl",
        files={name: t for name, t in first.files.items() if int(name[:6]) >= wave_left},
        accounting=Accounting.from_json(saved["accounting"]),
        life=1,
        **options,
    )

    async def resume():
        second.make().set_state(saved, lambda entry: GroupPlan(entry["task"]))
        await second.train(save_at)
        await second.rollouts.close()

    run(resume())
    return first, second


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from(["wait", "keep", "drop"]),
    st.integers(0, 2),
    st.booleans(),
    st.sets(st.tuples(st.integers(0, 6), st.integers(0, 2)), max_size=7),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 3),
    st.floats(0, 3),
    st.integers(0, 10**6),
)
def test_whatever_the_rules_and_the_broken_tasks_a_resumed_run_repeats_its_steps(
    tmp_path_factory,
    alpha,
    groups,
    size,
    siblings,
    concurrency,
    stale_samples,
    redundancy,
    replace,
    broken,
    flaky,
    save_at,
    more,
    late_save,
    seed,
):
    size = 1 if siblings > 1 else size
    rules = Rules(
        groups_per_step=groups * siblings,
        group_size=size,
        concurrency=concurrency,
        steps=7,
        async_ratio=alpha,
        redundancy=0 if siblings > 1 else redundancy,
        replace_equal=replace and siblings == 1,
        stale_samples=stale_samples,
        siblings=siblings,
    )
    one_a_wave = {wave: index % groups for wave, index in broken}
    names_of_broken = frozenset(f"task/{wave}_{index}" for wave, index in one_a_wave.items())
    folder = tmp_path_factory.mktemp("run")
    first, second = killed_and_resumed(
        rules,
        folder,
        save_at=save_at,
        kill_at=save_at + more,
        seed=seed,
        late_save=late_save,
        broken=names_of_broken,
        breaks=lambda episode: episode.seed % 2 or not flaky,
        spoiled=folder / "spoiled.jsonl",
    )
    assert [taken.groups for _, taken in second.steps[:more]] == [
        taken.groups for _, taken in first.steps[save_at:]
    ]
    everything = [
        name for step in names(first.steps[:save_at]) + names(second.steps) for name in step
    ]
    assert len(everything) == len(set(everything)) == 7 * groups * siblings * size
    for _, taken in first.steps + second.steps:
        tasks = {(t.group, t.task) for group in taken.groups for t in group}
        assert len(tasks) == len({group for group, _ in tasks})  # siblings are of one task
        assert flaky or not names_of_broken & {task for _, task in tasks}
    # What one life has set aside, the other never plays.
    assert not first.set_aside & second.tasks
    assert stale_samples == "keep" or max(staleness(second.steps)) <= alpha
    assert stale_samples == "drop" or not second.accounting.dropped["stale"]
    assert second.accounting.trained == 7 * groups * siblings * size


def test_what_was_taken_of_a_task_before_it_was_set_aside_is_taken_again(tmp_path):
    """The first of two siblings is taken; the second breaks afterwards, and goes on elsewhere."""
    rules = Rules(2, 1, 8, 4, async_ratio=1, siblings=2, stale_samples="keep")
    first, second = killed_and_resumed(
        rules,
        tmp_path,
        save_at=0,
        kill_at=3,
        broken=frozenset({"task/0_0"}),
        breaks=lambda episode: episode.episode == 1,
        length=lambda episode: 1.5 if (episode.group, episode.episode) == (0, 1) else 0.5,
        spoiled=tmp_path / "spoiled.jsonl",
    )
    tasks = [[t.task for group in taken.groups for t in group] for _, taken in first.steps]
    assert tasks[0] == ["task/0_0", "task/1_0"] and any(
        "task/0_again1_in0" in step for step in tasks[1:]
    )
    assert [taken.groups for _, taken in second.steps[:3]] == [
        taken.groups for _, taken in first.steps
    ]


def test_a_repeated_step_takes_the_episodes_that_it_took_although_redundant_ones_are_on_disk_too(
    tmp_path,
):
    rules = dataclasses.replace(RULES, redundancy=2, concurrency=20)
    first, second = killed_and_resumed(rules, tmp_path, save_at=1, kill_at=4, saves_cancelled=True)
    assert len(first.files) > first.accounting.trained
    assert any(
        t.episode >= RULES.group_size
        for _, taken in first.steps[1:]
        for group in taken.groups
        for t in group
    )
    assert [taken.names for _, taken in second.steps[:3]] == [
        taken.names for _, taken in first.steps[1:]
    ]


def test_what_was_replaced_before_a_checkpoint_is_still_handed_on_after_it(tmp_path):
    rules = dataclasses.replace(RULES, replace_equal=True)
    alone = play_all(
        rules, reward=lambda episode: float("again" in episode.task and episode.episode == 0)
    )
    first, second = killed_and_resumed(
        rules, tmp_path, save_at=2, kill_at=2, late_save=3.0, reward=alone.reward
    )
    assert first.accounting.dropped["equal_group"] > 12  # some of the third wave already
    assert [(taken.groups, taken.replaced) for _, taken in second.steps] == [
        (taken.groups, taken.replaced) for _, taken in alone.steps[2:]
    ]
    assert second.accounting == alone.accounting


def test_a_record_that_cannot_come_true_any_more_does_not_hold_the_run(tmp_path):
    (tmp_path / "steps.jsonl").write_text(
        '{"step": 0, "groups": [[0, 1], [1, 0], [2, 0]], "episodes": [[0, 1], [0, 1], [0, 1]],'
        ' "replaced": []}\n'
    )  # the first was replaced; its files are lost, and now it has spread
    world = World(
        dataclasses.replace(RULES, replace_equal=True, steps=1),
        reward=lambda episode: float(episode.episode == 0),
        journal=tmp_path / "steps.jsonl",
    )

    async def main():
        world.make()
        await world.train()
        await world.rollouts.close()

    run(main())
    assert names(world.steps) == [[(group, number) for group in range(3) for number in range(2)]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_a_run_that_is_killed_twice_after_one_checkpoint_still_repeats_what_either_took(
    alpha, seed, tmp_path
):
    rules = dataclasses.replace(RULES, async_ratio=alpha, steps=8, redundancy=1, replace_equal=True)
    lives, files, saved = [], {}, {}

    async def live(world, first, last):
        world.make()
        if saved:
            world.rollouts.set_state(saved, lambda entry: GroupPlan(entry["task"]))
        await world.train(first, min(2, last) if first == 0 else last)
        if first == 0:
            saved.update(json.loads(json.dumps(await world.rollouts.get_state())))
            await world.train(2, last)
        await asyncio.sleep(0.3 if last < 8 else 0)
        await world.rollouts.close()

    for number, (first, last) in enumerate([(0, 4), (2, 6), (2, 8)]):
        counts = Accounting.from_json(saved["accounting"]) if saved else Accounting()
        lives.append(
            World(
                rules,
                seed=seed + 10 * number,
                journal=tmp_path / "steps.jsonl",
                files=files,
                accounting=counts,
            )
        )  # another pace in each life
        run(live(lives[-1], first, last))
    took = [{step: taken.groups for step, taken in world.steps} for world in lives]
    for earlier, later in [(0, 1), (1, 2), (0, 2)]:
        assert all(
            took[later][step] == groups for step, groups in took[earlier].items() if step >= 2
        )
    assert max(staleness(lives[2].steps)) <= alpha and lives[2].accounting.trained == 8 * 6
