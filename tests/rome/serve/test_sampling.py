"""The sampler: exact distributions, filters, and noise that depends on seed and position only."""

import jax
import numpy as np
import pytest

from rome.serve.sampling import RowSampling, sample

V = 12


def draw(logits_V, count=4000, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seeds=None):
    """Tokens and logprobs of `count` rows with the same logits and different seeds."""
    seeds_B2 = np.stack(
        [np.zeros(count), np.arange(count) if seeds is None else seeds], axis=1
    ).astype(np.uint32)
    rows = RowSampling(
        seeds_B2,
        *(
            np.full(count, value, kind)
            for value, kind in (
                (temperature, np.float32),
                (top_p, np.float32),
                (top_k, np.int32),
                (min_p, np.float32),
            )
        ),
    )
    tokens, logprobs = jax.jit(sample)(
        np.tile(np.asarray(logits_V, np.float32), (count, 1)), np.full(count, 7, np.int32), rows
    )
    return np.asarray(tokens), np.asarray(logprobs)


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=V) * 1.5


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_from_the_softmax(logits, temperature):
    tokens, _ = draw(logits, temperature=temperature)
    expected = 4000 * softmax(logits, temperature)
    chi2 = np.sum((np.bincount(tokens, minlength=V) - expected) ** 2 / expected)
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001; the seeds are fixed


def test_logprobs_are_of_the_unfiltered_distribution(logits):
    tokens, logprobs = draw(logits, temperature=0.7, top_k=3)
    np.testing.assert_allclose(logprobs, np.log(softmax(logits, 0.7))[tokens], atol=1e-5)


def test_temperature_zero_is_greedy_and_scores_at_temperature_one(logits):
    tokens, logprobs = draw(logits, temperature=0.0)
    assert set(tokens) == {np.argmax(logits)}
    np.testing.assert_allclose(logprobs, np.log(softmax(logits)).max(), atol=1e-5)


def test_top_k_keeps_exactly_k_tokens(logits):
    tokens, _ = draw(logits, top_k=3)
    assert set(tokens) == set(np.argsort(-logits)[:3])


def test_top_k_keeps_k_tokens_where_all_are_alike():
    tokens, _ = draw(np.zeros(V), top_k=2)
    assert set(tokens) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits):
    probs = softmax(logits)
    order = np.argsort(-probs)
    kept = order[: np.searchsorted(np.cumsum(probs[order]), 0.6) + 1]
    tokens, _ = draw(logits, top_p=0.6)
    assert set(tokens) == set(kept)


def test_min_p_keeps_tokens_at_least_so_likely_as_a_share_of_the_best(logits):
    probs = softmax(logits)
    tokens, _ = draw(logits, min_p=0.2)
    assert set(tokens) == set(np.flatnonzero(probs >= 0.2 * probs.max()))


def test_a_filter_that_keeps_everything_changes_no_token(logits):
    assert np.array_equal(draw(logits)[0], draw(logits, top_k=V)[0])


@pytest.mark.long
def test_a_row_does_not_notice_the_filters_of_others(logits):
    B = 64
    seeds_B2 = np.stack([np.arange(B), np.arange(B)], axis=1).astype(np.uint32)
    rows = RowSampling(
        seeds_B2,
        np.ones(B, np.float32),
        np.ones(B, np.float32),
        np.zeros(B, np.int32),
        np.zeros(B, np.float32),
    )
    logits_BV, position_B = np.tile(logits, (B, 1)).astype(np.float32), np.arange(B, dtype=np.int32)
    alone = jax.jit(sample)(logits_BV, position_B, rows)
    crowd = jax.jit(sample)(
        logits_BV,
        position_B,
        rows._replace(top_k_B=np.where(np.arange(B) % 2, 2, 0).astype(np.int32)),
    )
    for before, after in zip(alone, crowd, strict=True):
        assert np.array_equal(np.asarray(before)[::2], np.asarray(after)[::2])


def test_both_words_of_a_seed_and_the_position_matter(logits):
    def one(high, low, position):
        rows = RowSampling(
            np.array([[high, low]], np.uint32),
            np.ones(1, np.float32),
            np.ones(1, np.float32),
            np.zeros(1, np.int32),
            np.zeros(1, np.float32),
        )
        return [
            int(
                jax.jit(sample)(
                    logits[None].astype(np.float32) * 0, np.array([position + k], np.int32), rows
                )[0][0]
            )
            for k in range(8)
        ]

    base = one(0, 1, 0)
    assert base == one(0, 1, 0)
    assert base != one(1, 1, 0) and base != one(0, 2, 0) and base != one(0, 1, 100)
