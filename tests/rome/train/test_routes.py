"""Agreement of routers with what is replayed, against plain Python sets."""

import dataclasses

import numpy as np
import pytest

from rome.data.batch import Batch
from rome.model.config import PRESETS
from rome.train.replay import count_replayed, recorded_routes, replayed_ids, route_agreement

L, B, T, K, E = 3, 2, 5, 2, 4


def random_routes(seed):
    """[B, T, L, k]; the second row's last three tokens have none."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(E), (B, T, L, 1)), axis=-1)
    routes_BTLk = (order[..., :K] + 1).astype(np.uint8)
    routes_BTLk[1, 2:] = 0
    return routes_BTLk


def batch_with(routes_BTLk):
    return Batch(**dict.fromkeys(Batch._fields) | {"routes_BTLk": routes_BTLk})


@pytest.mark.parametrize("seed", range(4))
def test_agreement_is_the_share_of_equal_sets_and_of_common_experts(seed):
    replayed, own = random_routes(seed), random_routes(seed + 100)
    own[1, 2:] = random_routes(seed + 200)[
        0, 2:
    ]  # those tokens choose for themselves, and do not count
    pairs = [
        (set(replayed[b, t, layer]), set(own[b, t, layer]))
        for b in range(B)
        for t in range(T)
        for layer in range(L)
        if replayed[b, t, layer, 0]
    ]
    config = dataclasses.replace(PRESETS["tiny"], num_layers=L, num_experts=E, experts_per_token=K)
    count = count_replayed(batch_with(replayed), config)
    assert count == len(pairs) == 7 * L
    metrics = route_agreement(replayed, np.asarray(replayed_ids(own)), float(count))
    np.testing.assert_allclose(
        metrics["route_agreement"], np.mean([a == b for a, b in pairs]), rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics["route_overlap"], np.mean([len(a & b) / K for a, b in pairs]), rtol=1e-6
    )


def test_the_order_of_the_experts_does_not_matter():
    replayed = random_routes(0)
    metrics = route_agreement(replayed, np.asarray(replayed_ids(replayed[..., ::-1])), 7.0 * L)
    assert metrics == {"route_agreement": 1, "route_overlap": 1}


def test_layers_without_experts_do_not_count():
    config = dataclasses.replace(
        PRESETS["tiny"],
        num_layers=L,
        num_experts=E,
        experts_per_token=K,
        dense_layers=(0,),
        intermediate_size=8,
        scan_layers=False,
    )
    replayed = random_routes(0)
    replayed[:, :, 0] = 0
    own_LBTk = np.asarray(replayed_ids(replayed))
    assert (own_LBTk[0] == -1).all()  # as the model returns them
    assert count_replayed(batch_with(replayed), config) == 7 * 2
    assert route_agreement(replayed, own_LBTk, 14.0) == {"route_agreement": 1, "route_overlap": 1}
    assert count_replayed(batch_with(None), config) == 0


def test_a_pass_records_what_it_would_be_given_to_replay_and_nothing_on_padding():
    routes_BTLk = random_routes(0)
    own_LBTk = np.array(replayed_ids(routes_BTLk))
    own_LBTk[:, 1, 2:] = 3
    recorded = recorded_routes(own_LBTk, routes_BTLk[:, :, 0, 0] > 0, np.uint8)
    assert recorded.dtype == np.uint8
    np.testing.assert_array_equal(recorded, routes_BTLk)
