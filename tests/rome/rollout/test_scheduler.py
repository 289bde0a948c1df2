"""Asynchronous rollouts: staleness is bounded, nothing is lost or taken twice, and a resumed run
takes what the killed one took.
"""

import asyncio
import collections
import dataclasses
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import RolloutError, Stopped
from rome.rollout.group import GroupPlan
from rome.rollout.scheduler import RolloutScheduler, Rules
from rome.rollout.simulator.clock import run

RULES = Rules(groups_per_step=3, group_size=2, concurrency=4, steps=6)


@dataclasses.dataclass
class World:
    """Plays an episode in a time that follows from its seed; a second attempt is another length.

    Keeps what it played, as files would.
    """

    rules: Rules
    seed: int = 0
    train_s: float = 1.0
    reward: object = None  # episode -> reward
    fault: object = None  # episode -> exception
    accounting: Accounting = dataclasses.field(default_factory=Accounting)
    files: dict = dataclasses.field(default_factory=dict)
    played: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    versions: dict = dataclasses.field(default_factory=dict)
    running: int = 0
    most_running: int = 0
    journal: object = None
    steps: list = dataclasses.field(default_factory=list)
    stop: bool = False
    saves_cancelled: bool = False  # a cancelled episode leaves its file, as if it had just ended

    def make(self):
        self.rollouts = RolloutScheduler(
            self.rules,
            self.play,
            self.plan,
            self.replan,
            accounting=self.accounting,
            forget=lambda episode: self.files.pop(episode.name, None),
            journal=self.journal,
            should_stop=lambda: self.stop,
        )
        return self.rollouts

    def plan(self, wave):
        return [
            GroupPlan(f"task/{wave}_{index // self.rules.siblings}")
            for index in range(self.rules.groups_per_step)
        ]

    def replan(self, number, attempt):
        return GroupPlan(f"task/{number}_again{attempt}")

    async def play(self, episode):
        if episode.name in self.files:
            return self.files[episode.name]
        self.played[episode.name] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            began = self.rollouts.version
            if self.fault is not None and (error := self.fault(episode)) is not None:
                raise error
            length = random.Random(f"{self.seed}/{episode.seed}").lognormvariate(0, 1)
            try:
                await asyncio.sleep(length)
            except asyncio.CancelledError:
                if self.saves_cancelled:
                    self.files[episode.name] = self.trajectory(episode, began)
                raise
            self.files[episode.name] = self.trajectory(episode, began)
            return self.files[episode.name]
        finally:
            self.running -= 1

    def trajectory(self, episode, began):
        chunk = Chunk([1], [2, 3], [-0.5, -0.5], [(began, 0, 1), (self.rollouts.version, 1, 2)])
        reward = float(episode.seed % 2) if self.reward is None else self.reward(episode)
        return Trajectory(
            episode.task,
            "f",
            [chunk],
            reward,
            "success" if reward else "failure",
            episode.group,
            episode.episode,
            episode.seed,
        )

    async def train(self, first=0, last=None):
        """Steps first to last, as the trainer runs them; returns what each took."""
        await self.rollouts.advance(first)
        for step in range(first, self.rules.steps if last is None else last):
            async with asyncio.timeout(500):  # virtual seconds
                taken = await self.rollouts.take(step)
            self.accounting.train(sum(map(len, taken.groups)))
            await self.rollouts.check()
            self.steps.append((step, taken))
            await asyncio.sleep(self.train_s)
            await self.rollouts.advance(step + 1)
        return self.steps


def play_all(rules, **options):
    world = World(rules, **options)

    async def main():
        world.make()
        await world.train()
        await world.rollouts.close()

    run(main())
    return world


def names(steps):
    return [[(t.group, t.episode) for group in taken.groups for t in group] for _, taken in steps]


def staleness(steps):
    return [
        step - t.oldest_version for step, taken in steps for group in taken.groups for t in group
    ]


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
    old = Trajectory("task/1_0", "f", [Chunk([1], [2], [-0.5], [(0, 0, 1)])], 1.0, "success")

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
    second = World(
        rules,
        journal=tmp_path / "steps.jsonl",
        files=first.files,
        accounting=Accounting.from_json(saved["accounting"]),
        **options,
    )

    async def resume():
        second.make().set_state(saved, lambda entry: GroupPlan(entry["task"]))
        await second.train(save_at)
        await second.rollouts.close()

    run(resume())
    return first, second


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from(["wait", "keep", "drop"]),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 3),
    st.floats(0, 3),
    st.integers(0, 10**6),
)
def test_whatever_the_rules_a_resumed_run_repeats_its_steps_and_reaches_its_end(
    tmp_path_factory,
    alpha,
    groups,
    size,
    concurrency,
    stale_samples,
    redundancy,
    replace,
    save_at,
    more,
    late_save,
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
    first, second = killed_and_resumed(
        rules,
        tmp_path_factory.mktemp("run"),
        save_at=save_at,
        kill_at=save_at + more,
        seed=seed,
        late_save=late_save,
    )
    assert [taken.groups for _, taken in second.steps[:more]] == [
        taken.groups for _, taken in first.steps[save_at:]
    ]
    everything = [
        name for step in names(first.steps[:save_at]) + names(second.steps) for name in step
    ]
    assert len(everything) == len(set(everything)) == 7 * groups * size
    assert stale_samples == "keep" or max(staleness(second.steps)) <= alpha
    assert (
        stale_samples == "drop" or not second.accounting.dropped["stale"]
    ) and second.accounting.trained == 7 * groups * size


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


def test_an_episode_that_something_else_cancels_ends_the_step_with_its_name_instead_of_a_wait_for_ever():
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
