"""Metrics of a step's episodes mean what they are called, and groups that teach are found."""

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.outcomes import mixed_groups, rollout_metrics


def trajectory(group=0, reward=0.0, chunks=()):
    chunks = list(chunks) or [chunk()]
    return Trajectory(
        "copy/1", "copy", chunks, reward, "success" if reward else "failure", group, 0, 0
    )


def chunk(prompt=3, action=2, cached=0, status="ok"):
    return Chunk(
        prompt_ids=[1] * prompt,
        action_ids=[2] * action,
        logprobs=[-0.5] * action,
        versions=[(4, 0, action)],
        text="",
        cached_tokens=cached,
        status=status,
    )


def test_a_cached_share_of_one_is_everything_that_was_sent():
    # 3 tokens are sent, 2 come back; then 3 + 2 + 4 are sent, of which 5 were there.
    played = [trajectory(chunks=[chunk(cached=0), chunk(prompt=4, cached=5)])]
    assert rollout_metrics(played, 4, 1.0)["cached_token_share"] == 5 / 12


def test_metrics_of_a_step():
    played = [
        trajectory(reward=1.0),
        trajectory(
            chunks=[chunk(action=6, status="malformed"), chunk(action=4, status="tool_error")]
        ),
    ]
    metrics = rollout_metrics(played, 6, 2.0)
    expected = {
        "reward": 0.5,
        "success": 0.5,
        "turns": 1.5,
        "tokens": 6.0,
        "staleness": 2.0,
        "tokens_per_s": 6.0,
        "malformed_share": 1 / 3,
        "tool_error_share": 1 / 3,
        "tokens_success": 2.0,
        "tokens_failure": 10.0,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert "tokens_success" not in rollout_metrics([trajectory()], 4, 1.0)


def test_groups_that_ended_alike_are_left_out_also_where_there_is_no_other():
    won, lost, mixed = (
        [trajectory(0, 1.0)] * 2,
        [trajectory(1)] * 2,
        [trajectory(2, 1.0), trajectory(2)],
    )
    assert mixed_groups(won + lost + mixed) == mixed
    assert mixed_groups(won + lost) == []
