"""What a demonstration weighs: it is made more likely, or only read."""

import pytest

from rome.data.batch import IMITATION
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.anchors import imitated
from rome.stages.imitation import worth_imitating

GAMMA = 0.5


def solution(*events, **changes):
    chunks = [Chunk([1], [2], [-0.5], [(0, 0, 1)], events=list(kinds)) for kinds in events]
    return imitated(Trajectory("t", "f", chunks, 1.0, "success", **changes))


def weights(one, costs):
    """Return the weights of the turns that are imitated, in their order."""
    options = {"gamma": GAMMA, "failure_reward": -1.0, "safety_cost": costs}
    weighed = worth_imitating(one, **options)
    if weighed is None:
        return []
    batch = pack([weighed], row_length=16, chunks_per_row=8, **options)
    return batch.return_BC[batch.valid_BC & (batch.kind_BC == IMITATION)].tolist()


@pytest.mark.parametrize(
    "one, costs, expected",
    [
        (solution([], []), {}, [0.5, 1.0]),
        (solution(["tests"], []), {"tests": 0.2}, [0.3, 1.0]),
        # The harm of the second turn costs it, and the first one, more than they lead to.
        (solution([], ["tests"], []), {"tests": 2.0}, [1.0]),
        (solution([], ["tests"]), {"tests": 2.0}, []),
        (solution([], [], training_reward=0.3), {}, [0.15, 0.3]),
        (solution([], [], training_reward=-0.3), {}, []),
        (solution([], [], training_reward=0.0), {}, []),
    ],
)
def test_no_turn_of_a_demonstration_is_made_less_likely(one, costs, expected):
    assert weights(one, costs) == pytest.approx(expected)


def test_an_episode_of_the_policy_keeps_its_turns_whatever_they_earn():
    one = Trajectory("t", "f", [Chunk([1], [2], [-0.5], [(0, 0, 1)])], 0.0, "failure")
    assert worth_imitating(one, gamma=1.0, failure_reward=-1.0, safety_cost={}) is one


def test_a_turn_that_was_not_answered_has_no_return():
    one = solution([], [])
    one.chunks.insert(1, Chunk([3], [], [], kind="context"))
    assert weights(one, {}) == pytest.approx([0.5, 1.0])
