"""Routing replay end to end: a real engine process, episodes of several turns, the trainer's own
forward pass.
"""

import dataclasses

import numpy as np
import pytest

from rome.data.packing import microbatches, pack
from rome.data.trajectory import load_trajectory, save_trajectory
from rome.losses import count_denominators
from rome.train.replay import count_replayed
from tests.rome.model.small import random_params
from tests.rome.train.episodes import PACKING, make_config, make_learner, mismatch, play, serve

pytestmark = pytest.mark.long

CONFIG = make_config()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, scale=0.15)


@pytest.fixture(scope="module")
def trajectories(params, tmp_path_factory):
    with serve(params, CONFIG, tmp_path_factory.mktemp("model")) as server:
        made = play(server, CONFIG, 8)
        assert all(
            chunk.routes is None for chunk in play(server, CONFIG, 1, routes=False)[0].chunks
        )
    assert min(len(trajectory.chunks) for trajectory in made) >= 3
    path = tmp_path_factory.mktemp("trajectories") / "made.json"
    read = []
    for trajectory in made:  # as a run has them: from their files
        save_trajectory(trajectory, path)
        read.append(load_trajectory(path))
    return read


@pytest.fixture(scope="module")
def learner():
    return make_learner(CONFIG)


def packed(trajectories, routes_for=CONFIG):
    (batch,) = microbatches(pack(trajectories, **PACKING, routes_for=routes_for), 8)
    return batch


def updated(learner, params, batch, rows=8):
    """The metrics of one update, in micro-batches of so many rows."""
    # A little off the rollout's logprobs, so that no ratio lies on the edge of a clip, where
    # rounding would decide.
    shift_BT = 0.05 * np.sin(1.0 + 7.0 * batch.tokens_BT + batch.positions_BT).astype(np.float32)
    batches = microbatches(
        batch._replace(
            logp_old_BT=np.where(batch.action_mask_BT, batch.logp_rollout_BT + shift_BT, 0.0)
        ),
        rows,
    )
    _, metrics = learner.update(learner.start(params), batches, count_denominators(batches))
    return {name: float(value) for name, value in metrics.items()}


def test_every_token_but_the_last_of_an_episode_has_its_route(trajectories):
    batch = packed(trajectories)
    chunks = [chunk for trajectory in trajectories for chunk in trajectory.chunks]
    tokens = sum(len(chunk.prompt_ids) + len(chunk.action_ids) for chunk in chunks)
    assert count_replayed(batch, CONFIG) == CONFIG.num_layers * (tokens - len(trajectories))


@pytest.mark.slow
def test_in_float32_replay_changes_nothing_and_routers_agree_with_the_engine(
    trajectories, params, learner
):
    free, replayed = (
        learner.score(params, [packed(trajectories, routes_for)])[0]
        for routes_for in (None, CONFIG)
    )
    np.testing.assert_allclose(replayed, free, atol=1e-4)
    assert mismatch(packed(trajectories), replayed)["max"] < 1e-4
    metrics = updated(learner, params, packed(trajectories))
    assert metrics["route_agreement"] == metrics["route_overlap"] == 1.0
    assert "route_agreement" not in updated(learner, params, packed(trajectories, None))


def test_an_altered_route_changes_the_logprobs_after_it_and_is_seen_by_the_agreement(
    trajectories, params, learner
):
    batch = packed(trajectories)
    row, place, layer = (
        0,
        12,
        CONFIG.num_layers - 1,
    )  # in the last layer nothing but this token's own output depends on it
    routes_BTLk = batch.routes_BTLk.copy()
    used = set(routes_BTLk[row, place, layer])
    routes_BTLk[row, place, layer] = sorted(set(range(1, CONFIG.num_experts + 1)) - used)[
        : CONFIG.experts_per_token
    ]
    free, altered = (
        learner.score(params, [batch._replace(routes_BTLk=routes)])[0]
        for routes in (batch.routes_BTLk, routes_BTLk)
    )
    changed = np.argwhere(np.abs(altered - free) > 1e-4)
    assert changed.tolist() == [[row, place + 1]]
    metrics = updated(learner, params, batch._replace(routes_BTLk=routes_BTLk))
    pairs = count_replayed(batch, CONFIG)
    np.testing.assert_allclose(
        [metrics["route_agreement"], metrics["route_overlap"]], 1 - 1 / pairs, rtol=1e-6
    )


def test_recorded_routes_replayed_at_the_same_weights_give_the_same_logprobs(
    trajectories, params, learner
):
    batch = packed(trajectories, None)
    ((logp_BT, _, routes_BTLk),) = learner.score_and_record(params, [batch])
    np.testing.assert_allclose(logp_BT, learner.score(params, [batch])[0], atol=1e-5)
    real_BT = batch.segments_BT > 0
    assert (routes_BTLk[real_BT] > 0).all() and not routes_BTLk[~real_BT].any()
    recorded = batch._replace(routes_BTLk=routes_BTLk)
    np.testing.assert_allclose(learner.score(params, [recorded])[0], logp_BT, atol=1e-5)
    assert updated(learner, params, recorded)["route_agreement"] == 1.0
    # The engine's routes are the trainer's own at these weights: only its last tokens have none.
    engine_BTLk = packed(trajectories).routes_BTLk
    np.testing.assert_array_equal(
        np.sort(np.where(engine_BTLk > 0, routes_BTLk, 0)), np.sort(engine_BTLk)
    )


def test_replay_follows_a_router_that_has_moved_and_removes_the_mismatch_it_makes(
    trajectories, params, learner
):
    """The engine's router and the trainer's differ as two precisions do, only more: without replay
    logprobs jump, with it they drift.
    """
    noise = (
        np.random.default_rng(0)
        .standard_normal(params["layers"]["moe"]["router"].shape)
        .astype(np.float32)
    )
    moe = params["layers"]["moe"]
    moved = params | {
        "layers": params["layers"] | {"moe": moe | {"router": moe["router"] + 0.01 * noise}}
    }
    off, replay = (
        mismatch(
            packed(trajectories, routes_for),
            learner.score(moved, [packed(trajectories, routes_for)])[0],
        )
        for routes_for in (None, CONFIG)
    )
    assert 0.5 < updated(learner, moved, packed(trajectories))["route_agreement"] < 0.99
    assert replay["kl"] < 0.2 * off["kl"] and replay["mean"] < 0.5 * off["mean"], (off, replay)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "expert": 2}])
def test_replay_does_not_depend_on_the_mesh_or_the_micro_batches(
    trajectories, params, learner, mesh
):
    moved, batch = (
        params | {"head": {"kernel": params["head"]["kernel"] * 1.01}},
        packed(trajectories),
    )
    whole = updated(learner, moved, batch)
    split, sharded = (
        updated(learner, moved, batch, rows=4),
        updated(make_learner(CONFIG, mesh=mesh), moved, batch),
    )
    for name in whole:
        np.testing.assert_allclose(
            [split[name], sharded[name]], whole[name], rtol=1e-3, atol=1e-5, err_msg=name
        )
    assert whole["route_agreement"] == 1.0


@pytest.mark.slow
def test_layers_without_experts_are_replayed_around(trajectories):
    config = dataclasses.replace(CONFIG, dense_layers=(1,), intermediate_size=32)
    own, partly, batch = (
        random_params(config, scale=0.15),
        make_learner(config),
        packed(trajectories, None),
    )
    ((logp_BT, _, routes_BTLk),) = partly.score_and_record(own, [batch])
    assert not routes_BTLk[:, :, 1].any() and (routes_BTLk[batch.segments_BT > 0][:, 0] > 0).all()
    recorded = batch._replace(routes_BTLk=routes_BTLk)
    np.testing.assert_allclose(partly.score(own, [recorded])[0], logp_BT, atol=1e-5)
    assert updated(partly, own, recorded)["route_agreement"] == 1.0


@pytest.mark.slow
def test_in_bfloat16_engine_and_trainer_choose_differently_and_replay_brings_them_together(
    tmp_path,
):
    config = make_config(dtype="bfloat16", num_layers=4)
    own, half = random_params(config, scale=0.15), make_learner(config)
    with serve(own, config, tmp_path) as server:
        made = play(server, config, 24)
    batches = {
        replays: pack(made, **PACKING, routes_for=config if replays else None)
        for replays in (False, True)
    }
    off, replay = (mismatch(batch, half.score(own, [batch])[0]) for batch in batches.values())
    assert replay["kl"] < 0.3 * off["kl"] and replay["max"] < 0.5 * off["max"], (off, replay)
    ((_, _, routes_BTLk),) = half.score_and_record(own, [batches[True]])
    agreement = (
        (np.sort(routes_BTLk) == np.sort(batches[True].routes_BTLk))
        .all(-1)[batches[True].routes_BTLk[..., 0] > 0]
        .mean()
    )
    assert 0.9 < agreement < 0.99, agreement
