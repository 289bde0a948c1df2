"""A request's bits do not depend on its company, its order, the pages, or what was evicted.

The scheduler and the device are the real ones, in this thread.
"""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.qwen3 import init_params
from rome.model.stacking import unstack_layers
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler
from tests.rome.serve.tiny import make_config, make_params

CONTEXT = 64
PLENTY = Shapes(slots=16, max_context=CONTEXT, decode_steps=1)
# Room for two whole requests: prefixes are evicted and requests retracted.
SCARCE = Shapes(
    slots=5, max_context=CONTEXT, cache_tokens=128, page_tokens=4, call_tokens=16, decode_steps=3
)
SMALL_PAGES = Shapes(
    slots=12,
    max_context=CONTEXT,
    cache_tokens=384,
    page_tokens=8,
    call_tokens=64,
    decode_steps=5,
)


ADJUSTED = [
    {},
    {},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"presence_penalty": -1.1, "min_new_tokens": 1},
    {"logit_bias": ((3, 9.5), (4, -3.25))},
]


def load():
    config = make_config()
    return jax.device_put(unstack_layers(make_params(0), config)), config


@functools.cache
def scheduler_of(shapes):
    scheduler = Scheduler(load, shapes, None, "0")
    scheduler.device.prepare()
    return scheduler


def run(shapes, requests):
    """Answer requests, which come one after the other while earlier ones run."""
    scheduler = scheduler_of(shapes)
    pending = list(requests)
    while pending or scheduler.busy():
        for request in pending[:2]:
            scheduler._batcher.queue(request)
        del pending[:2]
        scheduler._step()
    scheduler._finish_dispatch()


def make_requests():
    """Groups with one prompt, common beginnings, filters, penalties, biases, routes."""
    rng = random.Random(0)
    shared = [rng.randrange(700) for _ in range(30)]
    requests = []
    for number in range(18):
        own = [rng.randrange(700) for _ in range(rng.randrange(0, 9))]
        prompt = shared[: rng.choice([30, 30, 17, 5, 1])] + own
        sampling = SamplingParams(
            max_new_tokens=rng.randrange(1, CONTEXT - len(prompt)),
            temperature=rng.choice([1.0, 0.7, 0.0]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([-1, 5]),
            seed=number,
            # The device knows the first few; of 90 tokens it does not.
            stop_ids=frozenset(rng.choice([[], [3, 700], range(0, 720, 8)])),
            **rng.choice(ADJUSTED),
        )
        scored = 0 if number % 6 == 5 else None
        request = Request(str(number), prompt, sampling, score_from=scored)
        request.return_routes = number % 3 == 0
        requests.append(request)
    return requests


def bits_of(request):
    routes = None if request.routes is None else request.routes[: request.computed]
    return request.output_ids, request.logprobs, request.prompt_logprobs, routes


@functools.cache
def alone():
    """Each request by itself, with nothing cached."""
    requests = make_requests()
    for request in requests:
        scheduler_of(SMALL_PAGES).flush()
        run(SMALL_PAGES, [request])
        assert request.cached_tokens == 0
    return [bits_of(request) for request in requests]


@pytest.mark.long
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param(PLENTY, id="plenty", marks=pytest.mark.slow),
        pytest.param(SMALL_PAGES, id="small"),
        pytest.param(SCARCE, id="scarce"),
    ],
)
def test_no_bit_of_an_answer_depends_on_order_company_pages_or_evictions(shapes):
    expected = alone()
    for seed in range(2):
        requests = make_requests()
        order = random.Random(seed).sample(requests, len(requests))
        run(shapes, order)
        for request, (ids, logprobs, scores, routes) in zip(requests, expected, strict=True):
            assert request.output_ids == ids
            assert request.logprobs == logprobs
            assert request.prompt_logprobs == scores
            if routes is not None:
                assert np.array_equal(request.routes[: request.computed], routes)
    metrics = scheduler_of(shapes).load_metrics()
    assert metrics["pages_available"] == metrics["pages"]
    if shapes is SCARCE:
        assert metrics["retractions"] > 0
    assert (metrics.get("dispatches", 0) > 0) == (shapes.decode_steps > 1)


# -- what `make train` trains, as wide as it is: tests compile it so that equal operations of two
# programs round differently
# -------------------------------------------------------------------------------------------------

ONE_STEP = Shapes(slots=16, max_context=CONTEXT, call_tokens=16, decode_steps=1)
EIGHT_STEPS = dataclasses.replace(ONE_STEP, decode_steps=8)


@functools.cache
def wide_scheduler(shapes):
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1)

    def load():
        params = jax.device_get(init_params(config, jax.random.key(0)))
        return jax.device_put(unstack_layers(params, config)), config

    scheduler = Scheduler(load, shapes, None, "0")
    scheduler.device.prepare()
    return scheduler


def answer(shapes, prompts, together, **more):
    """Answers of 10 tokens, sampled together or one after the other."""
    scheduler = wide_scheduler(shapes)
    scheduler.flush()
    requests = [
        Request(str(number), prompt, SamplingParams(10, seed=number), **more)
        for number, prompt in enumerate(prompts)
    ]
    for some in [requests] if together else [[request] for request in requests]:
        for request in some:
            scheduler._batcher.queue(request)
        while scheduler.busy():
            scheduler._step()
        scheduler._finish_dispatch()
    return requests


@pytest.mark.long
def test_a_token_has_the_same_bits_from_one_step_and_from_several_alone_and_in_company():
    rng = random.Random(0)
    prompts = [[rng.randrange(768) for _ in range(rng.randrange(1, 30))] for _ in range(16)]
    expected = answer(ONE_STEP, prompts, together=False)
    for shapes, together in ((ONE_STEP, True), (EIGHT_STEPS, True), (EIGHT_STEPS, False)):
        for alone, request in zip(expected, answer(shapes, prompts, together), strict=True):
            assert request.output_ids == alone.output_ids
            assert request.logprobs == alone.logprobs
    # and from a prompt: the answers are scored
    whole = [request.prompt_ids + request.output_ids for request in expected]
    for request, scored in zip(
        expected, answer(EIGHT_STEPS, whole, True, score_from=0), strict=True
    ):
        assert scored.prompt_logprobs[-10:] == request.logprobs
