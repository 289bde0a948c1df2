"""The client against small servers that behave as real ones were seen to."""

import asyncio
import base64
import contextlib

import numpy as np
import pytest
from aiohttp import web

from rome.engine.client import Engine
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineDead, EngineError
from rome.engine.pool import EnginePool
from tests.rome.serve.tiny import LAYERS, make_config


def answer(ids, finish="length", version="default", **meta):
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-0.5, one, None] for one in ids],
            "weight_version": version,
            **meta,
        },
    }


@contextlib.asynccontextmanager
async def small_server(model=None, **routes):
    """Routes by name; GET and POST alike.

    `model` is what the client believes the server to have.
    """
    app = web.Application()
    for name, handler in routes.items():
        app.router.add_route("*", "/" + name, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with Engine(
            f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", model=model
        ) as engine:
            yield engine
    finally:
        await runner.cleanup()


def test_back_pressure_is_waited_out():
    calls = []

    async def generate(request):
        calls.append(await request.json())
        return (
            web.json_response({"error": "queue full"}, status=[503, 429, 200][len(calls) - 1])
            if len(calls) < 3
            else web.json_response(answer([4, 5]))
        )

    async def run():
        async with small_server(generate=generate) as engine:
            return await engine.generate([1], Sampling(2), 30)

    assert asyncio.run(run()) == Completion([4, 5], [-0.5, -0.5], "length", [(0, 0, 2)])
    assert calls[0] == calls[1] | {"rid": calls[0]["rid"]} and len(calls) == 3


def test_a_request_that_is_sent_again_has_a_new_id():
    """A server may still hold the first one: it refuses the same id twice, as SGLang does."""
    held, asked = set(), []

    async def generate(request):
        rid = (await request.json())["rid"]
        asked.append(rid)
        if rid in held:
            return web.json_response({"error": f"Duplicate request ID: {rid}"}, status=400)
        held.add(rid)
        if len(asked) == 1:
            request.transport.abort()  # the connection breaks, and the server has not noticed yet
            await asyncio.sleep(0)
        if len(asked) == 2:
            return web.json_response({"error": "queue full"}, status=503)
        return web.json_response(answer([4]))

    async def run():
        async with small_server(generate=generate) as engine:
            return await engine.generate([1], Sampling(1), 30)

    assert asyncio.run(run()).output_ids == [4]
    assert len(set(asked)) == 3


@pytest.mark.parametrize("cause", ["empty aborts", "failing engines"])
def test_what_fails_again_and_again_is_tried_ever_less_often(monkeypatch, cause):
    waits, sleep = [], asyncio.sleep

    async def generate(request):
        if cause == "failing engines":
            return web.json_response({"error": "CUDA error"}, status=500)
        is_last = len(waits) == 6
        return web.json_response(answer([4]) if is_last else answer([], "abort"))

    async def remember(seconds, *rest):
        waits.append(seconds)
        await sleep(0)

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            count = 1 if cause == "empty aborts" else 7
            servers = [
                await stack.enter_async_context(small_server(generate=generate))
                for _ in range(count)
            ]
            pool = EnginePool(servers)
            monkeypatch.setattr(asyncio, "sleep", remember)
            with contextlib.suppress(EngineError):
                await pool.generate([1], Sampling(1), 30)
            monkeypatch.setattr(asyncio, "sleep", sleep)

    asyncio.run(run())
    lower = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert len(waits) == len(lower)
    for wait, least in zip(waits, lower, strict=True):
        assert least <= wait <= 1.5 * least


@pytest.mark.parametrize(
    "header, least, most",
    [
        ("7", 7, 10.5),
        ("1e9", 30, 45),
        ("Wed, 21 Oct 2037 07:28:00 GMT", 0.1, 0.15),
        ("-3", 0.1, 0.15),
        (None, 0.1, 0.15),
    ],
)
def test_a_server_is_asked_again_when_it_said_to_and_not_all_clients_at_once(
    monkeypatch, header, least, most
):
    calls, waits, sleep = [], [], asyncio.sleep

    async def generate(request):
        calls.append(1)
        refused = web.json_response(
            {"error": "queue full"}, status=429, headers={"Retry-After": header} if header else {}
        )
        return refused if len(calls) % 2 else web.json_response(answer([4]))

    async def remember(seconds, *rest):
        waits.append(seconds)
        await sleep(0)

    async def run():
        async with small_server(generate=generate) as engine:
            monkeypatch.setattr(asyncio, "sleep", remember)
            for _ in range(4):
                await engine.generate([1], Sampling(1), 30)
            monkeypatch.setattr(asyncio, "sleep", sleep)

    asyncio.run(run())
    assert (
        len(calls) == 8
        and len(waits) == 4 == len(set(waits))
        and all(least <= wait <= most for wait in waits)
    )


def test_all_sampling_fields_are_sent_so_that_no_default_of_the_server_slips_in():
    bodies = []

    async def generate(request):
        bodies.append(await request.json())
        return web.json_response(answer([4]))

    async def run():
        async with small_server(generate=generate) as engine:
            await engine.generate([1], Sampling(1), 30)

    asyncio.run(run())
    params = bodies[0]["sampling_params"]
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    assert (
        params | neutral == params
        and "sampling_seed" not in params
        and bodies[0]["logprob_start_len"] == -1
    )


def test_partial_answers_are_joined_and_the_rest_is_asked_for():
    bodies = []
    parts = [
        answer([], "abort", "1"),
        answer([4, 5], "abort", "1", cached_tokens=3),
        answer([6], "stop", "2"),
    ]

    async def generate(request):
        bodies.append(await request.json())
        return web.json_response(parts[len(bodies) - 1])

    async def run():
        async with small_server(generate=generate) as engine:
            return await engine.generate([1, 2], Sampling(9, seed=7), 30)

    completion = asyncio.run(run())
    assert completion == Completion(
        [4, 5, 6], [-0.5] * 3, "stop", [(1, 0, 2), (2, 2, 3)], cached_tokens=3
    )
    assert [body["input_ids"] for body in bodies] == [[1, 2], [1, 2], [1, 2, 4, 5]]
    assert [body["sampling_params"]["max_new_tokens"] for body in bodies] == [9, 9, 7]
    assert {body["sampling_params"]["sampling_seed"] for body in bodies} == {7}


IDS = np.array(
    [[[token % 4, (token + 1) % 4]] * LAYERS for token in range(9)], np.int32
)  # of the tokens at places 0 to 8


def routed(first, end, ids=IDS, **meta):
    return {"routed_experts": base64.b64encode(ids[first:end].tobytes()).decode(), **meta}


def generate_with_routes(parts, prompt=(1, 2, 3), routes_from=0):
    """The completion of a server that answers so, and what it was asked."""
    bodies = []

    async def generate(request):
        bodies.append(await request.json())
        return web.json_response(parts[len(bodies) - 1])

    async def run():
        async with small_server(make_config(), generate=generate) as engine:
            return await engine.generate(list(prompt), Sampling(9, routes_from=routes_from), 30)

    return asyncio.run(run()), bodies


@pytest.mark.parametrize(
    "meta",
    [
        routed(2, 4),
        routed(0, 4),  # newer servers send what was asked for, older ones the whole sequence
        routed(2, 4, IDS.astype(np.uint8), routed_experts_dtype="uint8"),
    ],
    ids=["from", "whole", "bytes"],
)
def test_routes_of_every_kind_of_server_are_understood(meta):
    completion, bodies = generate_with_routes([answer([4, 5], "stop", **meta)], routes_from=2)
    assert np.array_equal(completion.routes, IDS[2:4] + 1) and completion.routes.dtype == np.uint8
    assert bodies[0]["return_routed_experts"] is True and bodies[0]["routed_experts_start_len"] == 2


def test_a_token_that_is_run_again_after_an_abort_keeps_the_route_that_it_was_sampled_by():
    again = IDS[:, :, ::-1] ^ 1  # other experts for the same tokens
    parts = [
        answer([], "abort"),
        answer([4, 5], "abort", **routed(0, 4)),
        answer([6, 7], "stop", **routed(4, 6)),
    ]
    late = [parts[0], parts[1], answer([6, 7], "stop", **routed(0, 6, again))]
    completion, bodies = generate_with_routes(parts)
    assert np.array_equal(completion.routes, IDS[:6] + 1)
    assert [body["routed_experts_start_len"] for body in bodies] == [0, 0, 4]
    completion, _ = generate_with_routes(late)
    assert np.array_equal(completion.routes, np.concatenate([IDS[:4], again[4:6]]) + 1)


def test_routes_are_asked_for_only_where_they_are_wanted():
    completion, bodies = generate_with_routes([answer([4], "stop")], routes_from=None)
    assert (
        completion.routes is None
        and "return_routed_experts" not in bodies[0]
        and "routed_experts_start_len" not in bodies[0]
    )


@pytest.mark.parametrize(
    "meta, message",
    [
        ({}, "returned no routes; start the SGLang server with --enable-return-routed-experts"),
        (
            routed(0, 3),
            (
                "12 expert ids; 4 tokens in 2 layers with 2 experts each have another number. Does"
                " it serve another model"
            ),
        ),
        (
            routed(0, 4, IDS + 1),
            "expert ids go from 1 to 4; this model has experts 0 to 3. Does it serve another model",
        ),
        (routed(0, 4, IDS * 0), "one expert twice in a layer: the engine did not record"),
    ],
)
def test_routes_that_cannot_be_replayed_are_an_error_with_the_remedy(meta, message):
    with pytest.raises(EngineError, match=message):
        generate_with_routes([answer([4, 5], "stop", **meta)])


def test_old_servers_are_asked_by_their_old_routes():
    async def info(request):
        return web.json_response({"weight_version": "3"})

    async def run():
        async with small_server(get_model_info=info) as engine:
            return [await engine.model_info() for _ in range(2)]

    assert asyncio.run(run()) == [{"weight_version": "3"}] * 2


@pytest.mark.parametrize(
    "body",
    [
        {"error": "no such path"},
        {"error": {"message": "no such path"}},
        {"success": False, "message": "no such path"},
    ],
)
def test_every_shape_of_error_is_understood(body):
    async def update(request):
        return web.json_response(body, status=400)

    async def run():
        async with small_server(update_weights_from_disk=update) as engine:
            await engine.update_weights("/nowhere", 1)

    with pytest.raises(EngineError, match=r"answered 400: no such path$"):
        asyncio.run(run())


def test_an_update_that_says_200_without_success_is_an_error():
    async def update(request):
        return web.json_response({"success": False, "message": "bad shape"})

    async def run():
        async with small_server(update_weights_from_disk=update) as engine:
            await engine.update_weights("/nowhere", 1)

    with pytest.raises(EngineError, match="did not take weights 1 from /nowhere: bad shape"):
        asyncio.run(run())


@pytest.mark.parametrize(
    "reply, words",
    [
        (answer([4], version="step-3"), "weight_version 'step-3', not a number"),
        (answer([4]) | {"output_ids": [5]}, "cannot be trained on"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_an_error(reply, words):
    async def generate(request):
        return web.json_response(reply)

    async def run():
        async with small_server(generate=generate) as engine:
            await engine.generate([1], Sampling(1), 30)

    with pytest.raises(EngineError, match=words):
        asyncio.run(run())


def test_nobody_at_the_url_is_an_error_in_bounded_time():
    async def run():
        async with Engine("http://127.0.0.1:9", dead_after_seconds=0.3) as engine:
            await engine.generate([1], Sampling(1), 600)

    with pytest.raises(EngineDead, match=r"engine http://127.0.0.1:9 is dead"):
        asyncio.run(asyncio.wait_for(run(), 60))
