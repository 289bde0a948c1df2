"""Against gem-llm itself: its make, wrappers and vectors over worlds and problems."""

import copy

import pytest

import envs.gem as ours
from envs.problems import PROBLEM_IDS
from envs.worlds import WORLD_IDS

pytestmark = [pytest.mark.slow, pytest.mark.live]
gem = pytest.importorskip(
    "gem", reason="gem-llm is not installed; pip install -r tests/requirements-live.txt"
)


@pytest.mark.parametrize(
    "name", [*WORLD_IDS, *(one for one in PROBLEM_IDS if one.startswith("rome:math/"))]
)
def test_gem_makes_and_wraps_them(name):
    from gem.wrappers.episode_tracking_wrapper import EpisodeTrackingWrapper

    theirs, ours_alone = EpisodeTrackingWrapper(gem.make(name, seed=3)), ours.make(name, seed=3)
    assert isinstance(ours_alone, gem.Env) and theirs.reset(seed=5)[0] == ours_alone.reset(5)[0]
    for _ in range(4):
        action = ours_alone.sample_random_action()
        result, expected = theirs.step(action), ours_alone.step(action)
        assert copy.deepcopy(result)[:4] == expected[:4]
        if expected[2] or expected[3]:
            break


@pytest.mark.parametrize("async_mode", [False, True])
def test_gems_vectors_run_them(async_mode):
    vector = gem.make_vec(["rome:travel/easy", "rome:gui/easy"], seed=1, async_mode=async_mode)
    assert vector.reset()[0][1] == ours.make("rome:gui/easy", seed=2).reset()[0]
    assert list(vector.step(["Hello?", "Hello?"])[1]) == [0.0, 0.0]
