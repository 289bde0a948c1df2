"""What a training step takes survives an error between taking and training, and what a repeated
step shows is of its own tasks.
"""

import asyncio
import dataclasses
import json
import types

import numpy as np
import pytest

import rome.stages.collect
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.rollout.demonstrations import collect_demonstrations
from rome.rollout.player import RolloutError
from rome.stages.base import Run
from rome.stages.collect import Collector
from rome.stages.config import load_config
from rome.train.team import Team


class Player:
    """In place of a scheduler: every episode fails, at once."""

    attempts = 3

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


def make(workdir, **changes):
    config = load_config("experiments/ipa.py", "smoke")
    config.update(
        {
            "steps": 3,
            "groups": 2,
            "group_size": 2,
            "old": "rollout",
            "filter_groups": False,
            "alarm_kl": 10.0,
        }
        | changes
    )
    (workdir / "trajectories").mkdir(exist_ok=True)
    return Collector(
        types.SimpleNamespace(
            config=config,
            workdir=workdir,
            team=Team(),
            scheduler=Player(),
            model_config=None,
            publication={},
            require_same_rows=lambda *_: None,
            make_env=None,
            chat=None,
        )
    )


async def shows(tasks, *_, record, first_group, **__):
    shown = [
        Trajectory(
            task,
            "f",
            [Chunk([1], [2], [0.0], kind="imitation")] * 2,
            1.0,
            "success",
            first_group + n,
        )
        for n, task in enumerate(tasks)
    ]
    for number, trajectory in enumerate(shown):
        save_trajectory(trajectory, record(number))
    return shown


STATE = types.SimpleNamespace(step=0, params=None)


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_step_that_fails_after_it_took_its_groups_is_repeated_with_them(
    tmp_path, monkeypatch, alpha
):
    async def broken(*_, **__):
        raise RolloutError("the sandbox of an expert is broken")

    monkeypatch.setattr(rome.stages.collect, "collect_demonstrations", broken)
    first = make(tmp_path, async_ratio=alpha)
    first.advance(STATE)
    with pytest.raises(RolloutError, match="of an expert is broken"):
        first.collect(0, STATE)
    saved = json.loads(json.dumps(first.get_state()))  # as the run saves what it has on its way out
    first.close()

    monkeypatch.setattr(rome.stages.collect, "collect_demonstrations", shows)
    second, alone = make(tmp_path, async_ratio=alpha), make(tmp_path, async_ratio=alpha)
    second.set_state(saved)
    alone.advance(STATE)
    second.advance(STATE)
    for collector in (second, alone):
        data = collector.collect(0, STATE)
        assert data.figures["demonstrations"] == 2 and collector.accounting.trained == 4
        collector.close()
    assert (
        second.curriculum.rates == alone.curriculum.rates
    )  # what the failed step had seen counts once
    assert second.accounting.to_json() == alone.accounting.to_json()


def test_the_deadline_of_a_step_has_room_for_every_replacement_and_every_replay(tmp_path):
    plain = make(tmp_path, concurrency=4, episode_seconds=10.0)
    assert plain._take_seconds() == 60 + 1 * 3 * 10
    assert (
        make(
            tmp_path,
            concurrency=4,
            episode_seconds=10.0,
            redundant_groups=1,
            redundancy=1,
            async_ratio=1,
        )._take_seconds()
        == 60 + 5 * 3 * 10
    )
    assert (
        make(tmp_path, concurrency=4, episode_seconds=10.0, replace_equal=True)._take_seconds()
        == 60 + 5 * 3 * 10
    )
    assert (
        make(tmp_path, concurrency=4, episode_seconds=10.0, resampling="parallel")._take_seconds()
        == 60 + 3 * 10 + 600
    )


def test_an_expert_of_another_task_that_a_step_showed_before_it_was_repeated_is_not_taken_for_this_one(
    tmp_path, monkeypatch
):
    async def play(env, *_):
        return Trajectory(env, "f", [], 1.0, "success")

    monkeypatch.setattr("rome.rollout.demonstrations.demonstrate", play)
    show = lambda *tasks: asyncio.run(
        collect_demonstrations(
            tasks,
            lambda task: task,
            None,
            error_rate=0.0,
            concurrency=2,
            record=lambda number: tmp_path / f"{number}.json",
        )
    )
    first = show("a/1", "b/1")
    save_trajectory(dataclasses.replace(first[1], seconds=7.0), tmp_path / "1.json")
    assert [(t.task, t.seconds) for t in show("c/1", "b/1")] == [("c/1", 0.0), ("b/1", 7.0)]


def test_a_step_whose_episodes_hang_ends_in_time_with_what_to_look_at(tmp_path, monkeypatch):
    collector = make(tmp_path)

    async def hangs(episode, **_):
        await asyncio.sleep(60)

    collector.run.scheduler.play_one = hangs
    monkeypatch.setattr(collector, "_take_seconds", lambda: 0.2)
    collector.advance(STATE)
    with pytest.raises(RolloutError, match="step 0 had no 2 complete groups within 0 s"):
        collector.collect(0, STATE)
    collector.close()


def test_a_step_that_was_trained_is_not_repeated_because_its_weights_were_not_published(tmp_path):
    class Unreachable:
        def score_one(self, *_):
            raise OSError("no space left on device")

    run = Run(
        make(tmp_path).config,
        tmp_path,
        None,
        types.SimpleNamespace(open=lambda text: [1]),
        Unreachable(),
        Team(),
        "none",
        None,
        [],
    )
    run.collector.before = {"of": "the step"}
    with pytest.raises(OSError):
        run.publish(STATE)
    assert run.collector.before is None


def test_whatever_cannot_be_closed_the_servers_are_stopped(tmp_path):
    class Server:
        stopped = False

        def stop(self):
            self.stopped = True

    class Pool:
        async def close(self):
            raise OSError("a socket")

    run = Run(
        make(tmp_path).config,
        tmp_path,
        None,
        None,
        None,
        Team(),
        "none",
        None,
        [],
        pool=Pool(),
        servers=[Server(), Server()],
    )
    run.collector.close = lambda: (_ for _ in ()).throw(TimeoutError("a sandbox"))
    with pytest.raises((TimeoutError, OSError)):
        run.close()
    assert all(server.stopped for server in run.servers)


def test_tokens_whose_weights_are_lost_take_the_engines_word_and_are_named(tmp_path):
    collector = make(tmp_path, old="trainer", async_ratio=1, late="keep")
    collector.run.weights = tmp_path / "weights"
    collector.run.learner = types.SimpleNamespace(
        score=lambda params, batches: [
            np.full(batch.tokens_BT.shape, float(params), np.float32) for batch in batches
        ],
        recall=lambda kept: kept,
        keep=lambda params: params,
    )
    collector.past = {2: -2.0, 3: -3.0}
    chunk = Chunk(
        [1], [2, 3, 4], [-0.5, -0.6, -0.7], [(0, 0, 1), (2, 1, 2), (3, 2, 3)]
    )  # three versions within one turn
    batch = pack(
        [Trajectory("f/1", "f", [chunk], 1.0, "success")],
        row_length=8,
        chunks_per_row=2,
        gamma=1.0,
        failure_reward=0.0,
    )
    (scored,), unscored = collector._with_old([batch], types.SimpleNamespace(step=3, params=-3.0))
    assert np.allclose(
        scored.logp_old_BT[batch.action_mask_BT], [-0.5, -2.0, -3.0]
    ) and unscored == {0}
