"""A run deletes what nothing reads again, and nothing else: it resumes as if all were there."""

import json
import types

import numpy as np
import pytest

from rome.data.trajectory import load_trajectory, routes_path, save_trajectory
from rome.stages.prune import Pruner, sources_of
from tests.rome.stages.test_collect import Players, make


class RoutedPlayers(Players):
    """Every episode has routes; counts those that were not on disk."""

    def __init__(self):
        super().__init__()
        self.played = 0

    async def play_one(self, episode, *, path, **options):
        self.played += not path.exists()
        trajectory = await super().play_one(episode, path=path, **options)
        trajectory.chunks[0].routes = np.ones((4, 2, 2), np.uint8)
        save_trajectory(trajectory, path)
        return trajectory


def state_of(step):
    return types.SimpleNamespace(step=step, params=None)


def collect(collector, step):
    collector.begin(state_of(step))
    return collector.collect(step, state_of(step))


def tokens_of(data):
    return [batch.tokens_BT for part in data.minibatches for batch in part.microbatches]


def left(workdir, suffix):
    """The (wave, kind) of the files that are left, sampled (g) or shown (expert)."""
    return {
        (int(name[1]), "g" if name[2].startswith("g") else name[2])
        for name in (path.stem.split("_") for path in (workdir / "trajectories").glob(suffix))
    }


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_run_that_was_pruned_resumes_with_the_same_samples_and_plays_none_again(tmp_path, alpha):
    options = {"steps": 8, "async_ratio": alpha, "keep_trajectories": 1}
    options |= {"stale_samples": "keep", "lambda_il": 1.0}
    first = make(tmp_path, RoutedPlayers(), **options)
    saved, seen = {}, {}
    for step in range(6):
        saved[step] = json.loads(json.dumps(first.get_state(step)))
        if step >= 2:
            first.prune(step, oldest_checkpoint=step - 2)
        seen[step] = collect(first, step)
    first.close()
    # At step 5, the checkpoint of step 3 is the oldest one: no file before it is read again.
    assert min(wave for wave, _ in left(tmp_path, "*.npz")) == 3
    assert min(wave for wave, _ in left(tmp_path, "*.json")) == 3
    assert {(3, "expert"), (5, "expert"), (5, "g")} <= left(tmp_path, "*.json")

    played_before = {path.name for path in (tmp_path / "trajectories").glob("*.json")}
    for checkpoint in (3, 4):
        players = RoutedPlayers()
        again = make(tmp_path, players, **options)
        again.set_state(saved[checkpoint])
        for step in range(checkpoint, 6):
            data = collect(again, step)
            np.testing.assert_array_equal(tokens_of(data), tokens_of(seen[step]))
            assert data.metrics["reward"] == seen[step].metrics["reward"]
        again.close()
        assert not players.played
    assert played_before == {path.name for path in (tmp_path / "trajectories").glob("*.json")}


def test_only_routes_are_deleted_where_all_trajectories_are_kept(tmp_path):
    collector = make(tmp_path, RoutedPlayers(), steps=6, stale_samples="keep")
    for step in range(4):
        collect(collector, step)
    collector.prune(4, oldest_checkpoint=2)
    collector.close()
    assert {wave for wave, _ in left(tmp_path, "*.json")} == {0, 1, 2, 3}
    assert {wave for wave, _ in left(tmp_path, "*.npz")} == {2, 3}
    for path in (tmp_path / "trajectories").glob("*_000000_g*.json"):
        assert load_trajectory(path, routes=False).chunks
        with pytest.raises(ValueError, match="are gone"):
            load_trajectory(path)


def write(folder, *names):
    for name in names:
        (folder / name).touch()


def test_sources_and_files_of_others_stay(tmp_path):
    names = [
        "ipa_000001_g000_e00.json",
        "ipa_000001_g000_e00.npz",
        "ipa_000001_g001r2_e00.json.partial",
        "ipa_000001_expert_000.json",
        "ipa_000001_fork_001.json",
        "ipa_000004_g000_e00.json",
        "sft_000001_g000_e00.json",
        "notes.txt",
    ]
    write(tmp_path, *names)
    pruner = Pruner(tmp_path, "ipa", keep=1)

    def prune(step, oldest, sources):
        pruner.prune(step, oldest, sources, first_wave_left=lambda bound: bound)
        return {path.name for path in tmp_path.iterdir()}

    kept = {names[0], names[3], *names[5:]}
    assert prune(5, 3, {names[0], names[3]}) == kept
    # What was a source when the oldest checkpoint was written is one for a run that resumes there.
    again = Pruner(tmp_path, "ipa", keep=1)
    again.set_state(json.loads(json.dumps(pruner.get_state())))
    pruner = again
    assert prune(7, 5, {names[3]}) == kept - {names[5]}
    assert prune(9, 7, set()) == {names[3], *names[6:]}
    assert prune(11, 9, set()) == set(names[6:])


def test_the_sources_of_hard_tasks_and_of_groups_in_flight_are_known():
    state = {
        "anchors": {"count/1": {"source": "a.json", "earlier": ["b.json"]}},
        "rollouts": {"groups": [{"source": "c.json"}, {"source": ""}]},
        "solutions": {"own/1": "d.json"},
    }
    assert sources_of(state) == {"a.json", "b.json", "c.json", "d.json"}


def test_routes_lie_beside_their_trajectory(tmp_path):
    assert routes_path(tmp_path / "a_e01.json") == tmp_path / "a_e01.npz"
