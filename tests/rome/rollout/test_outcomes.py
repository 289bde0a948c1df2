"""Metrics of a step's episodes mean what they are called, and groups that teach are found."""

import dataclasses

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.outcomes import mixed_groups, rollout_metrics, staleness


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


def test_a_branch_sends_the_context_that_it_goes_on_from():
    # 3 tokens; 3 + 2 + 4; a rewind to the first: 3 + 2 + 1; a context of its own: 5.
    branch = dataclasses.replace(chunk(prompt=1), parent=0, edge="rewind")
    other = dataclasses.replace(chunk(prompt=5, cached=3), parent=-2, edge="subagent")
    played = [trajectory(chunks=[chunk(), chunk(prompt=4), branch, other])]
    assert rollout_metrics(played, 4, 1.0)["cached_token_share"] == 3 / (3 + 9 + 6 + 5)


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


def test_a_command_that_failed_is_counted_and_is_no_failed_call():
    ran = [dataclasses.replace(chunk(), exit_code=code) for code in (0, 1, 127, None)]
    metrics = rollout_metrics([trajectory(chunks=ran)], 4, 1.0)
    assert metrics["nonzero_exit_share"] == 0.5 and metrics["tool_error_share"] == 0.0


def test_groups_that_ended_alike_are_left_out_also_where_there_is_no_other():
    won, lost, mixed = (
        [trajectory(0, 1.0)] * 2,
        [trajectory(1)] * 2,
        [trajectory(2, 1.0), trajectory(2)],
    )
    assert mixed_groups(won + lost + mixed) == mixed
    assert mixed_groups(won + lost) == []


def test_groups_whose_episodes_cost_differently_teach_also_where_all_succeeded():
    harmful = dataclasses.replace(chunk(), events=["tests"])
    edited, honest = trajectory(0, 1.0, [harmful]), trajectory(0, 1.0)
    assert mixed_groups([edited, honest]) == []
    assert mixed_groups([edited, honest], {"tests": 2.0}) == [edited, honest]
    assert mixed_groups([edited, edited], {"tests": 2.0}) == []


def test_groups_differ_by_reward_and_not_by_its_sign():
    partly = [trajectory(0, 0.2), trajectory(0, 0.9)]
    alike = [trajectory(1, 0.3), trajectory(1, 0.1 + 0.2)]  # but for rounding
    assert mixed_groups(partly + alike) == partly


def test_what_is_partly_solved_is_no_success():
    metrics = rollout_metrics([trajectory(0, 0.5), trajectory(0, 1.0 - 1e-9)], 4, 1.0)
    assert metrics["success"] == 0.5 and metrics["reward"] > 0.7


def test_a_replayed_prefix_is_in_no_figure():
    led = chunk(prompt=3, action=50, status="tool_error")
    led = dataclasses.replace(led, kind="context", versions=[], network_denials=2)
    resampled = trajectory(chunks=[led, chunk(prompt=4, action=2, cached=53)])
    metrics = rollout_metrics([resampled, trajectory()], 6, 1.0)
    assert (metrics["tokens"], metrics["turns"], metrics["tokens_failure"]) == (2.0, 1.0, 2.0)
    assert metrics["tool_error_share"] == metrics["network_denial_share"] == 0.0
    assert metrics["cached_token_share"] == 53 / (3 + 50 + 4 + 3)


def test_an_episode_without_a_token_of_its_own_has_no_age():
    led = dataclasses.replace(chunk(), kind="context", versions=[])
    without_own = trajectory(chunks=[led])
    assert without_own.oldest_version is None
    assert staleness([without_own, trajectory()], 6) == [2]
    assert rollout_metrics([without_own, trajectory()], 6, 1.0)["staleness"] == 2.0
    assert rollout_metrics([without_own], 6, 1.0)["tool_error_share"] == 0.0


def test_groups_that_were_replaced_are_in_the_figures_of_the_policy_and_not_of_the_training():
    mixed = [trajectory(0, 1.0), trajectory(0, 0.0)]
    older = dataclasses.replace(chunk(), versions=[(3, 0, 2)])
    solved = [trajectory(1, 1.0, [older]) for _ in range(6)]
    alone = rollout_metrics(mixed, 6, 2.0)
    metrics = rollout_metrics(mixed, 6, 2.0, replaced=solved)
    assert (alone["success"], metrics["success"]) == (0.5, 7 / 8)
    assert metrics["tokens_per_s"] == 4 * alone["tokens_per_s"]
    assert metrics["staleness"] == alone["staleness"] == 2.0
