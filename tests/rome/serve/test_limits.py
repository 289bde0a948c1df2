"""What bounds the engine: its queue, its patience, and the memory that a request may cost it.

The HTTP server and the scheduler are the real ones; the device answers without computing.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import time

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from rome.serve.answer import make_answer
from rome.serve.decoding import Steps
from rome.serve.device import Dispatch, make_call, set_limits
from rome.serve.programs import Shapes
from rome.serve.protocol import Bounds
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler
from rome.serve.server import Server

SHAPES = Shapes(slots=2, max_context=4096, page_tokens=4, call_tokens=16, decode_steps=1)
LAYERS, TOP_K = 2, 1


class IdleDevice:
    """Draws token 5 for everybody, and gives the routes of a call where they are asked for."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.missing = {}
        self.stats = collections.Counter()
        self.seconds = 0.0  # of a dispatch of several steps

    def prepare(self):
        pass

    def allocated_bytes(self):
        return 0

    def begin(self, batch, size, steps=1):
        assert 0 < sum(piece.length for piece in batch) <= size
        assert steps == 1 or all(piece.request.is_decoding for piece in batch)
        self.stats["calls"] += 1
        call = make_call(batch, self.shapes, size, None, steps)
        return self._dispatch(batch, size, call, [piece.request.computed for piece in batch])

    def go_on(self, last):
        call = set_limits(last.call, [piece.request for piece in last.batch], self.shapes)
        return self._dispatch(last.batch, last.size, call, last.front)

    def _dispatch(self, batch, size, call, front):
        """Draw token 5 up to each row's limit; `front` holds the positions that come next."""
        steps = int(call.steps)
        self.stats["dispatches"] += steps > 1
        counts = [1] * len(batch)
        if steps > 1:
            counts = [
                min(steps, max(int(limit) - position, 0))
                for limit, position in zip(call.limit_R, front, strict=False)
            ]
        shape = (self.shapes.decode_steps, len(batch))
        routes = np.zeros((shape[0], LAYERS, size, TOP_K), np.int32)
        taken = Steps(np.full(shape, 5), np.zeros(shape), np.array(counts), np.zeros(size), routes)
        front = [position + count for position, count in zip(front, counts, strict=True)]
        return Dispatch(batch, size, call, front, taken, False, 0, 0.0)

    def read(self, dispatch):
        time.sleep(self.seconds if dispatch.call.steps > 1 else 0.0)
        return dispatch.steps


def make_scheduler(shapes=SHAPES):
    scheduler = Scheduler(None, shapes, None, "0")
    scheduler.device = IdleDevice(shapes)
    return scheduler


@contextlib.asynccontextmanager
async def running(shapes=SHAPES, seconds=0.0, **limits):
    """Give a function that posts to a server with these limits, whose device takes this long."""
    scheduler = make_scheduler(shapes)
    scheduler.device.seconds = seconds
    bounds = Bounds(100, shapes.max_context, frozenset({9}), **limits)
    runner = web.AppRunner(
        Server(scheduler, bounds, None, {"model_path": "nowhere"}).app(),
        handler_cancellation=True,
        shutdown_timeout=0.0,
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    scheduler.start()
    patience = aiohttp.ClientTimeout(200)
    connector = aiohttp.TCPConnector(limit=0)  # what queues shall queue in the server
    async with aiohttp.ClientSession(timeout=patience, connector=connector) as session:

        async def post(route, **body):
            async with session.post(url + route, json=body) as response:
                return response.status, response.headers, await response.text()

        post.scheduler = scheduler
        post.session = session
        post.url = url
        try:
            yield post
        finally:
            scheduler.stop()
            await runner.cleanup()


def generate(post, number=1, **body):
    params = {"max_new_tokens": 3}
    return post("/generate", input_ids=[number], sampling_params=params, **body)


async def until(claim):
    async with asyncio.timeout(100):
        while not claim():
            await asyncio.sleep(0.005)


def test_a_full_queue_is_told_with_503_and_drains_when_the_server_goes_on():
    async def conversation():
        async with running(max_queued_requests=3) as post:
            await post("/pause_generation", mode="in_place")
            tasks = [asyncio.ensure_future(generate(post, number)) for number in range(5)]
            await until(lambda: post.scheduler.load_metrics()["waiting"] == 5)
            status, headers, text = await generate(post)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "queue is full" in json.loads(text)["error"]["message"]
            too_many = await post("/generate", input_ids=[[1]] * 6)
            assert too_many[0] == 400 and "send at most 5" in too_many[2]
            await post("/continue_generation")
            assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}
            assert (await generate(post))[0] == 200

    asyncio.run(conversation())


def test_a_request_that_a_pause_holds_for_too_long_is_dropped_and_told_so():
    async def conversation():
        async with running(request_seconds=0.3) as post:
            await post("/pause_generation", mode="in_place")
            whole, stream = await asyncio.gather(
                generate(post, rid="same"), generate(post, stream=True)
            )
            assert whole[0] == 503 and "did not end within 0.3 s" in whole[2]
            assert stream[0] == 200 and "did not end within 0.3 s" in stream[2]
            assert stream[2].endswith("data: [DONE]\n\n")
            await until(lambda: not post.scheduler.busy())
            await post("/continue_generation")
            assert (await generate(post, rid="same"))[0] == 200  # its id is free again

    asyncio.run(conversation())


def run_alone(scheduler, *requests):
    """Take requests through the scheduler, in this thread."""
    for request in requests:
        scheduler.submit(request)
        scheduler._commands.popleft()()
    while scheduler.busy():
        scheduler._step()
    scheduler._finish_dispatch()


def prompt_of(pages):
    return [number % 97 for number in range(pages * SHAPES.page_tokens + 1)]


def nodes_of(scheduler):
    """The pages of the tree, in any order."""
    found = []
    nodes = list(scheduler._batcher._pages._roots.values())
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        found += [node] if node.parent is not None else []
    return found


def test_routes_are_kept_for_requests_that_want_them_and_for_no_others():
    def kept_after(request):
        scheduler = make_scheduler()
        run_alone(scheduler, request)
        return [node.routes for node in nodes_of(scheduler)]

    asked, silent = (
        Request("a", prompt_of(3), SamplingParams(9), return_routes=wanted)
        for wanted in (True, False)
    )
    assert sorted(len(routes) for routes in kept_after(asked)) == [1, 4, 4, 4, 4, 4]
    assert asked.computed == len(asked.prompt_ids) + 9 - 1
    assert kept_after(silent) == [None] * 6 and silent.routes is None


def test_requests_of_any_kind_end_with_fewer_pages_than_they_would_like():
    """Where pages run out, the youngest start over, and nothing waits for ever or leaks."""
    for seed in range(30):
        rng = random.Random(seed)
        shapes = dataclasses.replace(
            SHAPES, slots=6, max_context=32, cache_tokens=40, decode_steps=1 + seed % 4
        )
        scheduler = make_scheduler(shapes)
        requests = []
        for number in range(20):
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            params = SamplingParams(rng.randrange(1, 13))
            scored = 0 if rng.random() < 0.2 else None
            routed = rng.random() < 0.5
            requests.append(
                Request(str(number), prompt, params, score_from=scored, return_routes=routed)
            )
        run_alone(scheduler, *requests)
        for request in requests:
            assert request.output_ids == [5] * request.sampling.max_new_tokens
            if request.score_from is not None:
                assert len(request.prompt_logprobs) == len(request.prompt_ids) - 1
        metrics = scheduler.load_metrics()
        assert metrics["pages_available"] == metrics["pages"] == 10
        retracted = metrics["retractions"]
        assert retracted < 200
        scheduler.flush()
        assert not nodes_of(scheduler)


def test_a_cache_that_does_not_hold_one_request_is_refused():
    with pytest.raises(ValueError, match="--cache_tokens 30 does not hold one request"):
        Shapes(max_context=32, cache_tokens=30, page_tokens=4)


def test_a_request_that_wants_routes_takes_no_prefix_from_one_that_did_not():
    scheduler = make_scheduler()
    requests = [
        Request(rid, prompt_of(3), SamplingParams(1), return_routes=wanted)
        for rid, wanted in [("a", False), ("b", True), ("c", True), ("d", False)]
    ]
    for request in requests:
        run_alone(scheduler, request)
    assert [request.cached_tokens for request in requests] == [0, 0, 12, 12]


def test_an_answer_at_any_moment_has_a_logprob_and_a_version_for_every_token():
    """A stream is answered from another thread, between any two changes of the scheduler."""
    seen = []

    class Watched(list):
        """A list that is looked at whenever it has grown."""

        def __iadd__(self, more):
            super().__iadd__(more)
            look()
            return self

        def append(self, one):
            super().append(one)
            look()

    request = Request("a", prompt_of(1), SamplingParams(9), return_logprob=True, stream=True)
    request.output_ids, request.logprobs, request.versions = Watched(), Watched(), Watched()

    def look():
        answer = make_answer(request, "0", None)
        meta = answer["meta_info"]
        ids = [entry[1] for entry in meta["output_token_logprobs"]]
        covered = sum(span["end"] - span["start"] for span in meta["weight_versions"])
        assert ids == answer["output_ids"] and covered == len(ids)
        seen.append(len(ids))

    run_alone(make_scheduler(), request)
    assert seen[-1] == 9 and len(set(seen)) > 2


# -- dispatches of several steps
# -------------------------------------------------------------------------------------------------

STEPS = dataclasses.replace(SHAPES, slots=4, decode_steps=8)


class Fives:
    """A tokenizer whose every token is "five "."""

    vocab_size = 100

    def encode(self, text, allow_special=False):
        return [5]

    def decode(self, ids, skip_special=False):
        return "five " * len(ids)


def test_what_is_drawn_after_a_stop_string_is_dropped_and_its_pages_are_free_again():
    scheduler = Scheduler(None, STEPS, Fives(), "0")
    scheduler.device = IdleDevice(STEPS)
    stopped = Request("a", prompt_of(1), SamplingParams(40, stop=("five five five",)))
    whole = Request("b", prompt_of(2), SamplingParams(21), return_routes=True)
    run_alone(scheduler, stopped, whole)
    assert stopped.output_ids == [5] * 3 and stopped.finish["matched"] == "five five five"
    assert stopped.text_end == 0 and stopped.computed == len(stopped.ids) - 1
    assert whole.output_ids == [5] * 21 and whole.computed == len(whole.ids) - 1
    metrics = scheduler.load_metrics()
    assert metrics["pages_available"] == metrics["pages"]


def test_a_next_dispatch_begins_before_the_last_is_read_unless_something_waits():
    scheduler = make_scheduler(STEPS)
    request = Request("a", prompt_of(0), SamplingParams(100))
    scheduler._batcher.queue(request)
    for _ in range(3):  # the prompt, a dispatch, the next one and the reading of the first
        scheduler._step()
    assert scheduler.device.stats["dispatches"] == 2 and len(request.output_ids) == 1 + 8
    scheduler._batcher.queue(Request("b", prompt_of(0), SamplingParams(3)))
    scheduler._step()
    assert scheduler.device.stats["dispatches"] == 2 and len(request.output_ids) == 1 + 16
    assert scheduler._in_flight is None


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_and_new_weights_take_what_is_in_flight_first(mode):
    scheduler = make_scheduler(STEPS)
    request = Request("a", prompt_of(0), SamplingParams(100), return_logprob=True)
    scheduler._batcher.queue(request)
    for _ in range(3):
        scheduler._step()
    for command in (lambda: scheduler.pause(mode), lambda: scheduler.rename("1")):
        future = scheduler.call(command)
        scheduler._commands.popleft()()
        future.result(1)
    assert request.output_ids == [5] * 17  # nothing that was sampled is lost
    if mode == "abort":
        assert request.finish["type"] == "abort"
        return
    scheduler.resume()
    run_alone(scheduler)
    assert request.versions == [["0", 0, 17], ["1", 17, 100]]


def test_requests_of_a_higher_priority_run_before_others_that_wait():
    scheduler = make_scheduler(dataclasses.replace(STEPS, slots=1))
    ended = []
    requests = [
        Request(rid, prompt_of(1), SamplingParams(4), priority=priority, notify=ended.append)
        for rid, priority in [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    ]
    run_alone(scheduler, *requests)
    assert [request.rid for request in ended] == ["b", "d", "a", "c"]


# -- storms
# -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 8])
def test_a_thousand_requests_that_queue_and_a_storm_of_cancels_leave_nothing_behind(steps):
    async def conversation():
        shapes = dataclasses.replace(STEPS, decode_steps=steps)
        async with running(shapes, seconds=0.001) as post:
            rng = random.Random(0)

            async def ask(number):
                body = {
                    "input_ids": [number % 50 + 1, 2],
                    "rid": f"{number:04x}",
                    "sampling_params": {"max_new_tokens": rng.randrange(1, 60)},
                    "stream": number % 3 == 0,
                }
                async with post.session.post(post.url + "/generate", json=body) as response:
                    if number % 5 == 0:
                        return None  # amid the stream or the answer
                    return response.status, await response.text()

            tasks = [asyncio.ensure_future(ask(number)) for number in range(1000)]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.02)
                for task in rng.sample(tasks, 40):
                    task.cancel()
                await post("/abort_request", rid=f"{rng.randrange(256):02x}")
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            statuses = {answer[0] for answer in answers if isinstance(answer, tuple)}
            assert statuses == {200}
            await until(lambda: not post.scheduler.busy())
            metrics = post.scheduler.load_metrics()
            assert metrics["pages_available"] == metrics["pages"] and metrics["waiting"] == 0
            assert (await generate(post, rid="0000"))[0] == 200  # its id is free

    asyncio.run(conversation())
