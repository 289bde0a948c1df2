"""What an engine reads for a call, by formula, on a mesh of devices that need not be TPUs."""

import dataclasses
import math

import numpy as np
import pytest

from rome.cost.serving import _experts_chosen, _local_bytes, _weights_read, abstract_params
from rome.model.config import PRESETS
from rome.model.sharding import make_engine_mesh

CONFIG = dataclasses.replace(PRESETS["qwen3_30b_a3b"], num_layers=1)


@pytest.fixture(scope="module")
def mesh():
    return make_engine_mesh(4, 2, CONFIG)


def test_a_device_has_its_share_of_experts_heads_and_vocabulary_and_the_rest_whole(mesh):
    own = _local_bytes(abstract_params(CONFIG, mesh))
    D, F, E, V = 2048, 768, 128, 151936
    attention = 2 * D * 32 * 128 + 2 * D * 4 * 128
    shared = E * D + 2 * D + D + 2 * 128  # router and norms
    wanted = E * 3 * D * F / 8 + attention / 2 + 2 * V * D / 8 + shared
    assert own == 2 * wanted


def test_experts_that_no_token_chose_are_not_read(mesh):
    params = abstract_params(CONFIG, mesh)
    one, few, many = (_weights_read(CONFIG, mesh, params, size) for size in (1, 64, 4096))
    embedding = 2 * 151936 * 2048 / 8
    assert many == pytest.approx(_local_bytes(params) - embedding, rel=1e-6)
    experts = 2 * 128 * 3 * 2048 * 768 / 8
    assert many - one == pytest.approx(experts * (1 - 8 / 128), rel=1e-6)
    assert one < few < many


def test_the_experts_of_even_choices_are_those_of_a_draw():
    random = np.random.default_rng(0)
    drawn = [
        len({int(e) for _ in range(20) for e in random.choice(128, 8, replace=False)})
        for _ in range(200)
    ]
    assert np.mean(drawn) == pytest.approx(_experts_chosen(CONFIG, 20), rel=0.02)
    assert math.isclose(_experts_chosen(CONFIG, 1), 8)
