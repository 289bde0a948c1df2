"""Alarms go off for a mismatch that would ruin the run, before its update, and not for what is
harmless.
"""

import numpy as np
import pytest

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.train.alarms import TrainingAlarm, check_metrics, check_mismatch


def batches(difference, kind="rl"):
    """Two micro-batches whose pi_old is `difference` above what the engine says."""
    trajectories = [
        Trajectory(
            "t/1",
            "t",
            [Chunk([5, 6], [7, 8, 9], [-1.0, -2.0, -3.0], [(1, 0, 3)], kind=kind)],
            1.0,
            "success",
            group=number,
        )
        for number in range(4)
    ]
    packed = microbatches(
        pack(trajectories, row_length=8, chunks_per_row=2, gamma=1.0, failure_reward=0.0), 2
    )
    return [
        batch._replace(
            logp_old_BT=np.where(batch.action_mask_BT, batch.logp_rollout_BT + difference, 0.0)
        )
        for batch in packed
    ]


@pytest.mark.parametrize("difference", [0.0, 0.1, -0.1])
def test_small_differences_pass(difference):
    check_mismatch(batches(difference), 0.1)


@pytest.mark.parametrize("difference", [1.0, -1.0, 200.0, np.nan])
def test_another_distribution_stops_the_run_and_names_the_figure(difference):
    with pytest.raises(
        TrainingAlarm, match=r"mismatch_kl is .* over 12 tokens, above alarm_kl=0.1"
    ):
        check_mismatch(batches(difference), 0.1)


def test_the_figure_is_k3_of_rollout_against_old():
    expected = np.exp(0.3) - 0.3 - 1
    check_mismatch(batches(0.3), expected + 1e-6)
    with pytest.raises(TrainingAlarm):
        check_mismatch(batches(0.3), expected - 1e-6)


def test_what_nobody_can_score_does_not_hide_what_the_rest_shows():
    apart, lost = batches(
        0.6
    )  # of one version; in the other half the engine's own logprobs stand for pi_old
    lost = lost._replace(
        logp_old_BT=np.where(lost.action_mask_BT, lost.logp_rollout_BT, 0.0),
        version_BT=np.where(lost.action_mask_BT, 0, lost.version_BT),
    )
    check_mismatch([apart, lost], 0.15)
    with pytest.raises(TrainingAlarm, match="over 6 tokens"):
        check_mismatch([apart, lost], 0.15, {0})


def test_what_was_shown_or_replayed_is_no_sample_of_the_engine():
    check_mismatch(batches(5.0, kind="imitation"), 0.1)
    check_mismatch([], 0.1)


def test_a_fresh_sample_must_look_to_the_trainer_as_it_was_scored():
    check_metrics(3, {"max_staleness": 0, "first_kl": 0.05}, 0.1)
    check_metrics(3, {"max_staleness": 1, "first_kl": 5.0}, 0.1)  # older weights do differ
    check_metrics(3, {"loss": 1.0}, 0.1)
    with pytest.raises(TrainingAlarm, match=r"first_kl is 0\.5 at step 3"):
        check_metrics(3, {"max_staleness": 0, "first_kl": 0.5}, 0.1)
