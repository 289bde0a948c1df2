"""Penalties and biases: SGLang's arithmetic, row by row, and no bit of other rows."""

import functools

import jax
import numpy as np
import pytest

from rome.serve.adjusting import adjust, empty_adjustments, make_adjustments
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from tests.rome.serve.test_invariance import run, scheduler_of
from tests.rome.serve.tiny import Oracle, make_config, make_params

B, V, LONGEST = 6, 40, 24
PROMPT = [5, 6, 7]
SHAPES = Shapes(slots=8, max_context=64, call_tokens=4, decode_steps=4)  # one program


def expected(logits_V, params, drawn):
    """The changed logits of one row, one token at a time, in float64."""
    changed = logits_V.astype(np.float64)
    for token in set(drawn):
        changed[token] -= params.frequency_penalty * drawn.count(token) + params.presence_penalty
        factor = params.repetition_penalty
        changed[token] *= factor if changed[token] < 0 else 1 / factor
    for token, bias in params.logit_bias:
        changed[token] += bias
    if len(drawn) < params.min_new_tokens:
        changed[[token for token in params.stop_ids if token < len(changed)]] = -np.inf
    return changed


ASKED = [
    {},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -1.5, "repetition_penalty": 0.7},
    {"repetition_penalty": 1.8, "logit_bias": ((0, 7.5), (39, -100.0))},
    {"min_new_tokens": 5, "stop_ids": frozenset([2, 9, 2**40])},
    {"min_new_tokens": 6, "stop_ids": frozenset([2, 9]), "frequency_penalty": 2.0},
]


@functools.cache
def adjusted(asks_for_nothing):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(size=(B, V)).astype(np.float32) * 3
    requests = []
    lately_BN = np.full((B, 3), -1, np.int32)
    for row, fields in enumerate(ASKED):
        request = Request(str(row), PROMPT, SamplingParams(20, **fields))
        request.output_ids = rng.integers(0, 8, 3).tolist()
        lately_BN[row, :2] = rng.integers(0, 8, 2)
        requests.append(request)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    empty = empty_adjustments(B, LONGEST, V)
    rows = empty if asks_for_nothing else make_adjustments(requests, empty, everywhere)
    position_B = np.full(B, len(PROMPT) + 5, np.int32)
    changed_BV = np.asarray(jax.jit(adjust)(logits_BV, position_B, rows, lately_BN))
    drawn = [one.output_ids + lately_BN[row, :2].tolist() for row, one in enumerate(requests)]
    return logits_BV, requests, drawn, changed_BV


def test_each_row_gets_what_it_asks_for():
    logits_BV, requests, drawn, changed_BV = adjusted(asks_for_nothing=False)
    for row, request in enumerate(requests):
        wanted_V = expected(logits_BV[row], request.sampling, drawn[row])
        held_back = np.isneginf(wanted_V)
        assert (changed_BV[row][held_back] < -1e29).all()
        np.testing.assert_allclose(changed_BV[row][~held_back], wanted_V[~held_back], atol=1e-5)
    assert not np.isneginf(expected(logits_BV[4], requests[4].sampling, drawn[4])).any()
    assert np.isneginf(expected(logits_BV[5], requests[5].sampling, drawn[5])).sum() == 2


def test_rows_that_ask_for_nothing_keep_every_bit():
    logits_BV, _, _, changed_BV = adjusted(asks_for_nothing=False)
    assert changed_BV[0].tobytes() == logits_BV[0].tobytes()
    logits_BV, _, _, changed_BV = adjusted(asks_for_nothing=True)
    assert changed_BV.tobytes() == logits_BV.tobytes()


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1.9, "presence_penalty": 1.0},
        {"repetition_penalty": 1.9},
        {"logit_bias": ((11, 100.0),)},
        {"logit_bias": ((11, 100.0),), "min_new_tokens": 3, "stop_ids": frozenset([11])},
    ],
    ids=["additive", "repetition", "bias", "least"],
)
def test_a_greedy_answer_and_its_logprobs_are_those_of_the_changed_logits(fields):
    """Of several steps a dispatch, against the plain forward pass; beside requests without."""
    config = make_config()
    oracle = Oracle(config, make_params(0))
    requests = [
        Request("a", PROMPT, SamplingParams(11, temperature=0.0, **fields)),
        Request("b", PROMPT, SamplingParams(11, temperature=0.0)),
    ]
    run(SHAPES, requests)
    free, changed = requests[1], requests[0]
    assert free.output_ids != changed.output_ids
    if "stop_ids" in fields:
        assert len(changed.output_ids) == 4 and changed.output_ids[-1] == 11
    else:
        assert len(changed.output_ids) == 11
    logits_TV = oracle.logits_and_routes(PROMPT + changed.output_ids)[0]
    for place, token in enumerate(changed.output_ids):
        logits_V = logits_TV[len(PROMPT) - 1 + place]
        wanted_V = expected(logits_V, changed.sampling, changed.output_ids[:place])
        assert token == wanted_V.argmax()
        logprob = -np.log(np.exp(wanted_V - wanted_V[token]).sum())
        assert changed.logprobs[place] == pytest.approx(logprob, abs=1e-4)
    scheduler_of(SHAPES).flush()
