"""Routes: what an engine says is checked, kept compactly, and each token keeps the route of the
pass that made its logprobs.
"""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.routes import (
    check_routes,
    encode_routes,
    extend_routes,
    join_routes,
    route_dtype,
    routes_from_npz,
    routes_to_npz,
)
from rome.model.config import PRESETS

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=3, num_experts=5, experts_per_token=2)
PARTLY_DENSE = dataclasses.replace(
    CONFIG, dense_layers=(1,), intermediate_size=8, scan_layers=False
)


def random_ids(tokens, config=CONFIG, seed=0):
    """Different experts for each token and layer, as a router chooses."""
    order = np.random.default_rng(seed).permuted(
        np.tile(np.arange(config.num_experts), (tokens, config.num_layers, 1)), axis=-1
    )
    return order[..., : config.experts_per_token].astype(np.int32)


def test_routes_are_ids_plus_one_in_the_smallest_type_that_has_a_zero_left():
    ids_PLk = random_ids(7)
    routes_PLk = encode_routes(ids_PLk, CONFIG)
    assert routes_PLk.dtype == np.uint8
    np.testing.assert_array_equal(routes_PLk.astype(int) - 1, ids_PLk)
    check_routes(routes_PLk, CONFIG)
    assert [
        route_dtype(dataclasses.replace(CONFIG, num_experts=e)).name for e in (2, 255, 256, 512)
    ] == ["uint8", "uint8", "uint16", "uint16"]


def test_the_last_expert_survives_a_wire_of_bytes():
    many = dataclasses.replace(CONFIG, num_experts=256)
    ids_PLk = np.tile(np.array([255, 0], np.uint8), (4, 3, 1))
    np.testing.assert_array_equal(encode_routes(ids_PLk, many), np.tile([256, 1], (4, 3, 1)))


@pytest.mark.parametrize("filler", [0, -1, 255])
def test_layers_without_experts_have_no_routes_whatever_an_engine_leaves_there(filler):
    ids_PLk = random_ids(4)
    ids_PLk[:, 1] = filler
    routes_PLk = encode_routes(ids_PLk, PARTLY_DENSE)
    assert not routes_PLk[:, 1].any()
    np.testing.assert_array_equal(routes_PLk[:, [0, 2]].astype(int) - 1, ids_PLk[:, [0, 2]])
    check_routes(routes_PLk, PARTLY_DENSE)
    with pytest.raises(ValueError):
        encode_routes(ids_PLk, CONFIG)  # where all layers have experts the same ids are an error


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((2, 1), [0, 5], "from 0 to 5; this model has experts 0 to 4"),
        ((2, 1), [-1, 3], "from -1 to 4; this model"),
        ((3, 0), [0, 0], "one expert twice"),
    ],
)
def test_ids_that_no_router_of_this_model_chose_are_refused(place, value, message):
    ids_PLk = random_ids(6)
    ids_PLk[place] = value
    with pytest.raises(ValueError, match=message):
        encode_routes(ids_PLk, CONFIG)
    with pytest.raises(ValueError, match=r"\[tokens, layers, k\] = \(6, 3, 2\)"):
        encode_routes(ids_PLk[:, :2], CONFIG)


def test_an_engine_that_recorded_nothing_is_noticed():
    with pytest.raises(ValueError, match="did not record"):
        encode_routes(np.zeros((4, 3, 2), np.int32), CONFIG)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda routes: routes.astype(np.uint16), "routes are uint16"),
        (
            lambda routes: routes[:, :2],
            r"this model's are uint8 \[tokens, layers, k\] = \(6, 3, 2\)",
        ),
        (
            lambda routes: np.where(np.arange(6)[:, None, None] == 4, [[[6, 1]]], routes).astype(
                np.uint8
            ),
            "name expert 5; this model has experts 0 to 4",
        ),
        (
            lambda routes: routes * (np.arange(3) != 1)[:, None].astype(np.uint8),
            "whole or not at all",
        ),  # a layer is missing
        (
            lambda routes: routes * np.array([0, 1], np.uint8),
            "whole or not at all",
        ),  # one of the k is missing
        (lambda routes: np.maximum(routes, 1) // np.maximum(routes, 1), "one expert twice"),
    ],
)
def test_routes_that_would_be_replayed_wrongly_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        check_routes(spoil(encode_routes(random_ids(6), CONFIG)), CONFIG)


def test_a_route_in_a_layer_without_experts_is_refused():
    with pytest.raises(ValueError, match="whole or not at all"):
        check_routes(encode_routes(random_ids(6), CONFIG), PARTLY_DENSE)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_each_token_keeps_the_route_of_the_first_turn_that_ran_it(turns):
    """An engine that routes the same token differently in every turn: turn n runs all but the last
    token there is when it ends.
    """
    total = sum(read + acted for read, acted in turns)
    in_turn = [encode_routes(random_ids(total, seed=n), CONFIG) for n in range(len(turns))]
    chunks, expected, ran, length = [], [], 0, 0
    for n, (read, acted) in enumerate(turns):
        length += read + acted
        chunks.append(
            extend_routes(
                chunks[-1] if chunks else None, in_turn[n][ran : length - 1], read + acted
            )
        )
        expected.append(in_turn[n][ran : length - 1])
        ran = length - 1
    joined = join_routes([(routes, len(routes)) for routes in chunks], CONFIG)
    np.testing.assert_array_equal(joined[:-1], np.concatenate(expected))
    assert not joined[-1].any() and [len(routes) for routes in chunks] == [
        read + acted for read, acted in turns
    ]


def test_a_turn_that_brings_another_number_of_routes_than_it_has_tokens_is_refused():
    with pytest.raises(ValueError, match="3 routes came for a chunk of 3 tokens"):
        extend_routes(None, encode_routes(random_ids(3), CONFIG), 3)


def test_pieces_without_routes_choose_for_themselves():
    routes_PLk = encode_routes(random_ids(3), CONFIG)
    joined = join_routes([(None, 2), (routes_PLk, 3), (None, 1)], CONFIG)
    np.testing.assert_array_equal(joined[2:5], routes_PLk)
    assert not joined[:2].any() and not joined[5:].any()


@given(
    st.dictionaries(st.integers(0, 20), st.integers(0, 5), max_size=3),
    st.sampled_from(["uint8", "uint16"]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_routes_come_back_from_a_file_with_type_and_shape(chunks, dtype):
    largest = np.iinfo(dtype).max
    routes = {
        number: np.linspace(0, largest, tokens * 6).astype(dtype).reshape(tokens, 3, 2)
        for number, tokens in chunks.items()
    }
    again = routes_from_npz(routes_to_npz(routes))
    assert list(again) == list(routes)
    for number, routes_PLk in routes.items():
        assert again[number].dtype == routes_PLk.dtype and again[number].flags.writeable
        np.testing.assert_array_equal(again[number], routes_PLk)


def test_routes_in_a_file_take_little_more_than_their_bytes():
    routes = {0: np.zeros((200, 48, 8), np.uint8), 1: np.ones((9, 48, 8), np.uint8)}
    size = sum(array.nbytes for array in routes.values())
    assert len(routes_to_npz(routes)) < size + 1000


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


GOOD = npz(**{"0": np.ones((3, 3, 2), np.uint8)})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be"),
        (b"PK", "cannot be"),
        (GOOD[:-30], "cannot be"),
        (GOOD[:90] + b"?" + GOOD[91:], "cannot be"),
        (npz(**{"0": np.ones((3, 3, 2))}), "float64"),
        (npz(**{"0": np.ones((3, 6), np.uint8)}), "tokens, layers"),
        (npz(first=np.ones((3, 3, 2), np.uint8)), "cannot be read"),
        (npz(**{"0": np.array([{}], object)}), "cannot be read"),
    ],
    ids=["empty", "cut", "cut_late", "altered", "floats", "flat", "unnumbered", "pickle"],
)
def test_a_damaged_file_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        routes_from_npz(content)
