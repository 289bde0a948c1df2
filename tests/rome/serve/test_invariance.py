"""A request's bits do not depend on its company, its order, the pages, or what was evicted.

The scheduler and the device are the real ones, in this thread.
"""

import functools
import random

import jax
import numpy as np
import pytest

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
SMALL_PAGES = Shapes(slots=12, max_context=CONTEXT, cache_tokens=384, page_tokens=8, decode_steps=5)


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
    """Groups with one prompt, prompts with a common beginning, later turns, filters, routes."""
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
        scheduler_of(PLENTY).flush()
        run(PLENTY, [request])
        assert request.cached_tokens == 0
    return [bits_of(request) for request in requests]


@pytest.mark.parametrize("shapes", [PLENTY, SMALL_PAGES, SCARCE], ids=["plenty", "small", "scarce"])
def test_no_bit_of_an_answer_depends_on_order_company_pages_or_evictions(shapes):
    expected = alone()
    for seed in range(4):
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
