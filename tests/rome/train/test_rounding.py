"""The trainer scores with the numbers that engines have: all weights rounded to the published type.

B rows, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.model.hf.checkpoint import save_hf
from rome.model.ops.logprobs import chunked_logprobs
from rome.model.ops.paged import Pages, make_pages
from rome.model.ops.rounding import round_straight_through
from rome.model.qwen3 import Qwen3, head_kernel
from rome.serve.weights import load_weights
from rome.stages.old_logprobs import OldLogprobs
from rome.stages.weights import load_published
from rome.train.state import TrainState
from tests.rome.model.small import random_params
from tests.rome.train.episodes import make_config, make_learner

pytestmark = pytest.mark.long

T = 64
CONFIG = make_config(dtype="bfloat16", attention_bias=True, scan_layers=True)


@pytest.fixture(scope="module")
def learner():
    return make_learner(CONFIG)


@pytest.fixture(scope="module")
def params():
    """Master weights between the numbers of bfloat16; experts near a tie."""
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1, scale=0.1))


def make_batches(version: int = 0):
    rng = np.random.default_rng(0)
    trajectories = []
    for number in range(4):
        ids = [int(i) for i in rng.integers(1, CONFIG.vocab_size, T)]
        action_ids = ids[1:]
        chunk = Chunk(ids[:1], action_ids, [-1.0] * (T - 1), [(version, 0, T - 1)])
        trajectories.append(Trajectory("f/1", "f", [chunk], float(number % 2), "success"))
    rows = pack(trajectories, row_length=T, chunks_per_row=1, gamma=1.0, failure_reward=-1.0)
    return microbatches(rows, 4)


def engine_logprobs(params, config, tokens_BT) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs [B, T] and routes [L, B, T, k] of the embedded engine's forward pass."""

    @jax.jit
    def run(params):
        positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
        segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        rows = len(tokens_BT)
        pages = Pages(
            kv=make_pages(config, rows, T),
            table_RM=jnp.arange(rows)[:, None],
            row_T=jnp.repeat(jnp.arange(rows), T),
            lengths_R=jnp.full(rows, T),
            starts_R=T * jnp.arange(rows + 1),
        )
        model = Qwen3(config, scan=False, experts="tiled", attention_form="gather")
        inputs = (array_BT.reshape(1, -1) for array_BT in (tokens_BT, positions_BT, segments_BT))
        out = model.apply({"params": params}, *inputs, pages)
        hidden_BTD = out.hidden_BTD.reshape(rows, T, -1)
        routes_LBTk = out.routes_LBTK.reshape(config.num_layers, rows, T, -1)
        kernel_DV = head_kernel(params, config)
        return chunked_logprobs(hidden_BTD, kernel_DV, tokens_BT, segments_BT), routes_LBTk

    return jax.device_get(run(params))


@pytest.fixture(scope="module")
def published(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "step_000003"
    save_hf(params, CONFIG, directory, dtype=jnp.bfloat16)
    return directory


def test_kept_and_published_weights_score_bitwise_as_the_master_copy(learner, params, published):
    batches = make_batches()
    expected = learner.score_and_record(params, batches)[0]
    versions = {
        "kept": learner.recall(learner.keep(params)),
        "published": load_published(published, CONFIG, learner.mesh),
    }
    for name, weights in versions.items():
        found = learner.score_and_record(weights, batches)[0]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_stale_samples_have_the_pi_old_that_they_had_when_they_were_fresh(
    learner, params, published
):
    options = {"async_ratio": 1, "from_trainer": True, "records_routes": True}
    old_logprobs = OldLogprobs(learner, CONFIG, published.parent, **options)
    sampled = TrainState(np.int32(3), params, ())
    other = jax.tree.map(lambda weight: weight * 1.1, params)
    later = TrainState(np.int32(4), other, ())
    batches = make_batches(version=3)
    (fresh,), _ = old_logprobs.fill(batches, sampled)
    old_logprobs.remember(sampled)
    (stale,), _ = old_logprobs.fill(batches, later)
    np.testing.assert_array_equal(stale.logp_old_BT, fresh.logp_old_BT)
    old_logprobs.past.clear()  # as after a restart: from the published files
    (resumed,), lost = old_logprobs.fill(batches, later)
    np.testing.assert_array_equal(resumed.logp_old_BT, fresh.logp_old_BT)
    assert not lost


def test_the_trainer_scores_what_the_engine_computes_from_the_published_weights(
    learner, params, published
):
    weights, config = load_weights(published, "bfloat16")
    batches = make_batches()
    engine_BT, engine_LBTk = engine_logprobs(weights, config, batches[0].tokens_BT)
    routes_BTLk = (engine_LBTk.transpose(1, 2, 0, 3) + 1).astype(np.uint8)
    replaying = [batches[0]._replace(routes_BTLk=routes_BTLk)]
    difference = (learner.score(params, replaying)[0] - engine_BT)[:, 1:]
    kl = float(np.mean(np.exp(difference) - difference - 1.0))
    # What is left is the rounding of activations. With router and norms unrounded it was 2.4e-5.
    assert kl < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_a_cast_and_gradients_do_not_see_it(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
    weight = x[::-1]

    @jax.jit
    def run(x):
        return jnp.sum(weight * round_straight_through(x, dtype) ** 2)

    rounded = jax.jit(lambda x: round_straight_through(x, dtype))(x)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, np.asarray(x.astype(dtype)).astype(np.float32))
    np.testing.assert_array_equal(jax.grad(run)(x), weight * 2 * rounded)
    assert round_straight_through(x, "float32") is x
