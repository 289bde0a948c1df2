"""What a training step takes survives an error between taking and training, and what a repeated
step shows is of its own tasks.
"""

import asyncio
import dataclasses
import json
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.loop import Limits
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.rollout.demonstrations import collect_demonstrations
from rome.rollout.episode import SpoiledTaskError
from rome.rollout.player import RolloutError
from rome.rollout.spoiled import SpoiledTasks
from rome.stages.collect import Collector, split_groups
from rome.stages.config import load_config
from rome.stages.old_logprobs import OldLogprobs
from rome.train.feed import OwnRows
from rome.train.team import Team


class Players:
    """In place of sandboxes: every episode fails and every demonstration succeeds, at once."""

    worst_seconds = 60.0
    make_env = None

    def __init__(self):
        self.spoiled = SpoiledTasks()

    def can_show(self, task):
        return True

    async def play_one(self, episode, *, path, **_):
        if path.exists():
            return load_trajectory(path)
        chunk = Chunk([1, 2], [3, 4], [-0.5, -0.5], [(0, 0, 2)])
        trajectory = Trajectory(
            episode.task,
            episode.task.split("/")[0],
            [chunk],
            0.0,
            "failure",
            episode.group,
            episode.episode,
            episode.seed,
        )
        save_trajectory(trajectory, path)
        return trajectory

    def demonstrate(self, tasks, *, error_rate, record, first_group=0, of=0):
        shown = []
        for number, task in enumerate(tasks):
            chunks = [Chunk([1], [2], [0.0], kind="imitation")] * 2
            shown.append(Trajectory(task, "f", chunks, 1.0, "success", first_group + number))
            save_trajectory(shown[-1], record(number))
        return shown


class BrokenTasks(Players):
    """The first task that is drawn cannot be played."""

    def __init__(self, workdir):
        self.spoiled = SpoiledTasks(workdir / "spoiled.jsonl")
        self.broken = set(self.spoiled.causes)
        self.tried = []

    async def play_one(self, episode, *, accounting, **options):
        self.tried.append(episode.task)
        self.broken = self.broken or {episode.task}
        if episode.task in self.broken:
            accounting.drop("spoiled_task")
            raise SpoiledTaskError(episode.task, "infra_sandbox", "task.toml:3: no image", 3)
        return await super().play_one(episode, **options)


class BrokenDemonstrators(Players):
    def demonstrate(self, *_, **__):
        raise RolloutError("the sandbox of a demonstrator is broken")


def make_old_logprobs(workdir, learner=None, **changes):
    options = {"async_ratio": 0, "from_trainer": False, "records_routes": False}
    return OldLogprobs(learner, None, workdir / "weights", **(options | changes))


def make(workdir, players=None, **changes):
    config = load_config("experiments/ipa.py", "smoke")
    config.update({"steps": 3, "groups": 2, "group_size": 2, "alarm_kl": 10.0})
    config.rollout.filter_groups = False  # all episodes fail
    for key, value in changes.items():
        block = config.rollout if key in config.rollout else config
        block[key] = value
    (workdir / "trajectories").mkdir(exist_ok=True)
    return Collector(
        config,
        workdir,
        players=players or Players(),
        old_logprobs=make_old_logprobs(workdir),
        model_config=None,
        own_rows=OwnRows(fed=list(range(config.rows_per_microbatch)), counted=[]),
        team=Team(),
    )


STATE = types.SimpleNamespace(step=0, params=None)


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_step_that_fails_after_it_took_its_groups_is_repeated_with_them(tmp_path, alpha):
    first = make(tmp_path, BrokenDemonstrators(), async_ratio=alpha)
    first.begin(STATE)
    with pytest.raises(RolloutError, match="of a demonstrator is broken"):
        first.collect(0, STATE)
    saved = json.loads(json.dumps(first.get_state(0)))  # as the run saves it on its way out
    first.close()

    second = make(tmp_path, async_ratio=alpha)
    second.set_state(saved)
    alone = make(tmp_path, async_ratio=alpha)
    alone.begin(STATE)
    second.begin(STATE)
    for collector in (second, alone):
        data = collector.collect(0, STATE)
        assert data.metrics["demonstrations"] == 2 and collector.accounting.trained == 4
        collector.close()
    rates = [collector.planner.curriculum.rates for collector in (second, alone)]
    assert rates[0] == rates[1]  # what the failed step had seen counts once
    assert second.accounting.to_json() == alone.accounting.to_json()


def test_a_task_that_cannot_be_played_is_not_drawn_again_by_a_resumed_run(tmp_path):
    first = make(tmp_path, BrokenTasks(tmp_path))
    before = first.get_state(0)
    first.begin(STATE)
    metrics = first.collect(0, STATE).metrics
    first.close()
    [broken] = first._players.broken
    assert metrics["spoiled_tasks"] == 1 and first.accounting.dropped["spoiled_task"]
    assert first.accounting.trained == 4

    resumed = make(tmp_path, BrokenTasks(tmp_path))
    resumed.set_state(before)
    resumed.begin(STATE)
    again = resumed.collect(0, STATE)
    resumed.close()
    assert broken in first._players.tried and broken not in resumed._players.tried
    assert set(resumed._players.tried) == set(first._players.tried) - {broken}
    assert again.metrics["reward"] == metrics["reward"]
    assert (tmp_path / "steps.jsonl").read_text().count("\n") == 1  # the same groups


def test_a_step_that_was_trained_is_not_repeated_because_its_weights_were_not_published(tmp_path):
    collector = make(tmp_path)
    collector.begin(STATE)
    collector.collect(0, STATE)
    counts = {step: collector.get_state(step)["accounting"] for step in (0, 1)}
    collector.close()
    assert counts[0]["trained"] == 0 and counts[0]["in_flight"] == 4  # collected, not trained
    assert counts[1]["trained"] == 4 and counts[1]["in_flight"] == 0  # whatever was published


@pytest.mark.parametrize("turns, fits", [(16, True), (17, False)])
def test_a_demonstration_that_no_row_holds_is_left_out_and_counted(tmp_path, turns, fits):
    class Wordy(Players):
        def demonstrate(self, tasks, *, error_rate, record, first_group=0, of=0):
            shown = []
            for number, task in enumerate(tasks):
                chunks = [Chunk([1], [2], [0.0], kind="imitation")] * (turns if number == 0 else 2)
                shown.append(Trajectory(task, "f", chunks, 1.0, "success", first_group + number))
                save_trajectory(shown[-1], record(number))
            return shown

    collector = make(tmp_path, Wordy(), chunks_per_row=16)
    collector.begin(STATE)
    metrics = collector.collect(0, STATE).metrics
    collector.close()
    assert metrics["demonstrations"] == (2 if fits else 1)
    assert metrics["demonstrations_too_long"] == (0 if fits else 1)


def test_a_step_waits_quietly_for_as_long_as_one_episode_may_take(tmp_path):
    assert make(tmp_path)._quiet_seconds() == 60 + 60
    assert make(tmp_path, resampling="parallel")._quiet_seconds() == 60 + 60 + 600
    limits = Limits(160, 48, episode_seconds=10.0, start_seconds=5.0, completion_seconds=3.0)
    # start and replay, six turns, two gradings with their margins, the end
    assert limits.worst_seconds(6, 4.0) == (5 + 10) + (6 * 3 + 10) + 2 * (4 + 30) + 30


def test_the_speed_of_a_step_counts_no_episode_that_an_evaluation_ran_beside(tmp_path):
    collector = make(tmp_path, async_ratio=1, stale_samples="keep", steps=4)
    collector.begin(STATE)  # plays steps 0 and 1
    assert "tokens_per_s" in collector.collect(0, STATE).metrics

    def after(step):
        state = types.SimpleNamespace(step=step, params=None)
        collector.begin(state)
        return collector.collect(step, state).metrics

    assert "tokens_per_s" in after(1)
    with collector.beside_evaluation():
        collector.begin(types.SimpleNamespace(step=2, params=None))  # plays step 3
        time.sleep(0.2)
    metrics = after(2)  # its episodes ran before the evaluation, but the time since then holds it
    assert "tokens_per_s" not in metrics and metrics["tokens"] == 2.0
    assert "tokens_per_s" not in after(3)
    collector.close()


def test_the_speed_of_a_step_counts_no_episode_that_was_on_disk_already(tmp_path):
    first = make(tmp_path)
    first.begin(STATE)
    assert "tokens_per_s" in first.collect(0, STATE).metrics
    first.close()
    resumed = make(tmp_path)
    resumed.begin(STATE)
    assert "tokens_per_s" not in resumed.collect(0, STATE).metrics
    resumed.close()


def test_a_demonstration_of_another_task_that_a_repeated_step_showed_is_not_taken_for_this_one(
    tmp_path, monkeypatch
):
    async def play(env, *_, **__):
        return Trajectory(env, "f", [], 1.0, "success")

    monkeypatch.setattr("rome.rollout.demonstrations.demonstrate", play)

    def show(*tasks):
        playing = collect_demonstrations(
            dict(enumerate(tasks)),
            lambda task: task,
            None,
            error_rate=0.0,
            concurrency=2,
            record=lambda number: tmp_path / f"{number}.json",
        )
        return list(asyncio.run(playing).values())

    first = show("a/1", "b/1")
    save_trajectory(dataclasses.replace(first[1], seconds=7.0), tmp_path / "1.json")
    assert [(t.task, t.seconds) for t in show("c/1", "b/1")] == [("c/1", 0.0), ("b/1", 7.0)]


def test_a_step_whose_episodes_hang_ends_in_time_with_what_to_look_at(tmp_path, monkeypatch):
    class Hanging(Players):
        async def play_one(self, episode, **_):
            await asyncio.sleep(60)

    collector = make(tmp_path, Hanging())
    monkeypatch.setattr(collector, "_quiet_seconds", lambda: 0.2)
    collector.begin(STATE)
    with pytest.raises(RolloutError, match=r"none of 4 episodes has ended .*; see its log"):
        collector.collect(0, STATE)
    collector.close()


def three_versions():
    """A batch of one turn whose three tokens were sampled by versions 0, 2 and 3."""
    chunk = Chunk([1], [2, 3, 4], [-0.5, -0.6, -0.7], [(0, 0, 1), (2, 1, 2), (3, 2, 3)])
    return pack(
        [Trajectory("f/1", "f", [chunk], 1.0, "success")],
        row_length=8,
        chunks_per_row=2,
        gamma=1.0,
        failure_reward=0.0,
    )


class RecordingLearner:
    """Scores every token with the number that stands for the parameters, and notes each pass."""

    def __init__(self):
        self.passes = []  # (parameters, first token of the micro-batch)

    def score_and_count(self, params, batches):
        self.passes += [(params, int(batch.tokens_BT[0, 0])) for batch in batches]
        counts_LE = np.full((1, 2), -params, np.float32)
        return [
            (np.full(batch.tokens_BT.shape, params, np.float32), counts_LE) for batch in batches
        ]

    def keep(self, params):
        return params

    recall = keep


def test_tokens_whose_weights_are_lost_take_the_engines_word_and_are_named(tmp_path):
    learner = RecordingLearner()
    old_logprobs = make_old_logprobs(tmp_path, learner, async_ratio=1, from_trainer=True)
    old_logprobs.past = {2: -2.0, 3: -3.0}
    state = types.SimpleNamespace(step=3, params=-3.0)
    (scored,), lost = old_logprobs.fill([three_versions()], state)
    assert np.allclose(scored.logp_old_BT[scored.action_mask_BT], [-0.5, -2.0, -3.0])
    assert lost == {0}
    assert sorted(learner.passes) == [(-3.0, 1), (-2.0, 1)]


def one_turn(prompt, *versions, kind="rl"):
    """A batch of one turn whose tokens were sampled by these versions."""
    ids = list(range(2, 2 + len(versions)))
    spans = [(version, place, place + 1) for place, version in enumerate(versions)]
    chunk = Chunk([prompt], ids, [-0.5] * len(ids), spans, kind=kind)
    trajectory = Trajectory(f"f/{prompt}", "f", [chunk], 1.0, "success")
    layout = {"row_length": 8, "chunks_per_row": 2}
    return pack([trajectory], **layout, gamma=1.0, failure_reward=0.0)


def test_every_token_is_scored_once_at_the_weights_that_sampled_it(tmp_path):
    learner = RecordingLearner()
    old_logprobs = make_old_logprobs(tmp_path, learner, async_ratio=2, from_trainer=True)
    old_logprobs.past = {2: -2.0, 3: -3.0, 4: -4.0}
    state = types.SimpleNamespace(step=4, params=-4.0)
    batches = [
        one_turn(10, 3, 3),  # stale alone: no pass at the current weights
        one_turn(20, 4, 4),
        one_turn(30, 2, 4),
        one_turn(40, 3, 2),
        one_turn(50, 0, 0, kind="imitation"),  # demonstrations have no version
        one_turn(60, 1, 1),  # lost alone
    ]
    scored, lost = old_logprobs.fill(batches, state)
    found = [batch.logp_old_BT[batch.action_mask_BT].tolist() for batch in scored]
    assert found == [[-3, -3], [-4, -4], [-2, -4], [-3, -2], [-4, -4], [-0.5, -0.5]]
    assert lost == {1}
    # of the first pass over each: at the newest weights that sampled in it
    assert [batch.expert_counts_LE[0, 0] for batch in scored] == [3, 4, 4, 3, 4, 4]
    once = {10: [-3], 20: [-4], 30: [-4, -2], 40: [-3, -2], 50: [-4], 60: [-4]}
    assert sorted(learner.passes) == sorted((p, row) for row, ps in once.items() for p in ps)


def test_weights_are_kept_as_long_as_a_sample_may_be_scored_with_them(tmp_path):
    learner = types.SimpleNamespace(keep=lambda params: params)

    def kept(**changes):
        old_logprobs = make_old_logprobs(tmp_path, learner, **changes)
        for version in range(4):
            old_logprobs.remember(types.SimpleNamespace(step=version, params=-version))
        return old_logprobs.past

    assert kept(async_ratio=1, from_trainer=True) == {2: -2, 3: -3}
    assert kept(async_ratio=1, from_trainer=False) == {}
    assert kept(async_ratio=0, from_trainer=True) == {}


def collected(workdir, **changes):
    collector = make(workdir, **changes)
    collector.begin(STATE)
    data = collector.collect(0, STATE)
    collector.close()
    return data, collector.accounting


def test_a_step_of_equal_groups_learns_from_its_demonstrations_alone(tmp_path):
    data, accounting = collected(tmp_path, filter_groups=True)
    ((_, denominators, _),) = data.minibatches
    assert denominators.rl_tokens == 0 and denominators.trained_trajectories == 2
    assert (accounting.trained, accounting.dropped["equal_group"]) == (0, 4)


def test_a_step_of_equal_groups_has_no_rows_where_nothing_is_imitated(tmp_path):
    players = BrokenDemonstrators()  # they are not asked
    data, accounting = collected(tmp_path, players=players, filter_groups=True, loss="grpo")
    assert data.minibatches == [] and data.metrics["demonstrations"] == 0
    assert (accounting.trained, accounting.dropped["equal_group"]) == (0, 4)
    assert data.metrics["reward"] == 0.0  # what was played is shown all the same


def test_a_baseline_imitates_where_the_config_says_so(tmp_path):
    data, _ = collected(tmp_path, loss="grpo", lambda_il=0.5)
    assert data.metrics["demonstrations"] == 2


def test_minibatches_have_whole_groups_and_denominators_of_their_own(tmp_path):
    whole, _ = collected(tmp_path, minibatches=1, groups=3)
    parts, accounting = collected(tmp_path, minibatches=2, groups=3)
    assert accounting.trained == 6
    counts = np.array([minibatch.denominators for minibatch in parts.minibatches])
    (total,) = (minibatch.denominators for minibatch in whole.minibatches)
    np.testing.assert_array_equal(counts.sum(axis=0), total)
    trained = [minibatch.denominators.trained_trajectories for minibatch in parts.minibatches]
    assert trained == [5, 4]  # groups 0 and 2 and a demonstration; group 1 and two of them


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_groups_are_dealt_whole_evenly_and_in_order(groups, parts):
    step = [types.SimpleNamespace(group=group, place=n) for n, group in enumerate(groups)]
    dealt = split_groups(step, parts)
    assert all(dealt) and len(dealt) == min(parts, len(set(groups)))
    assert sorted(one.place for part in dealt for one in part) == list(range(len(groups)))
    kinds = [{one.group for one in part} for part in dealt]
    assert sum(map(len, kinds)) == len(set(groups))  # no group is in two parts
    sizes = [len(kind) for kind in kinds]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert all([one.place for one in part] == sorted(one.place for one in part) for part in dealt)


class WithoutDemonstrator(Players):
    """Episodes succeed at first and then no more; nothing can show a solution."""

    def __init__(self):
        super().__init__()
        self.reward = 1.0

    def can_show(self, task):
        return False

    def demonstrate(self, tasks, **_):
        return [None] * len(tasks)

    async def play_one(self, episode, *, path, **options):
        trajectory = await super().play_one(episode, path=path, **options)
        solved = dataclasses.replace(trajectory, reward=self.reward, ending="success")
        save_trajectory(solved, path)
        return solved


def test_the_own_earlier_success_is_shown_where_no_demonstrator_is(tmp_path):
    players = WithoutDemonstrator()
    collector = make(
        tmp_path, players, groups=1, task="terminal:count:1", stale_samples="keep"
    )  # one task alone
    collector.begin(STATE)
    assert collector.collect(0, STATE).metrics["demonstrations"] == 0
    saved = json.loads(json.dumps(collector.get_state(1)))
    assert list(saved["solutions"]) == ["count/0"]
    collector.close()

    players.reward = 0.0
    resumed = make(tmp_path, players, groups=1, task="terminal:count:1", stale_samples="keep")
    resumed.set_state(saved)
    later = types.SimpleNamespace(step=1, params=None)
    resumed.begin(later)
    assert resumed.collect(1, later).metrics["demonstrations"] == 1
    resumed.close()
    shown = load_trajectory(tmp_path / "trajectories" / "ipa_000001_earlier_000.json")
    assert (shown.task, shown.reward) == ("count/0", 1.0)
    assert [chunk.kind for chunk in shown.chunks] == ["imitation"]
