"""Adapters by name: each request gets the numbers of its own, whatever others have.

The scheduler and the device are the real ones; the HTTP tests talk to the real server.
"""

import asyncio
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from aiohttp.test_utils import TestClient, TestServer

from rome.model.hf.peft import TENSORS, HostAdapters, save_peft
from rome.model.lora import Lora, adapter_shapes, find_targets, merge
from rome.model.ops import native
from rome.model.qwen3 import Qwen3, head_kernel
from rome.model.stacking import unstack_layers
from rome.serve.adapters import AdapterRoom, AdapterTable, with_adapters
from rome.serve.programs import Shapes
from rome.serve.protocol import Bounds
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler
from rome.serve.server import Server
from tests.rome.model.ops.test_paged import SWITCHES
from tests.rome.model.small import random_params
from tests.rome.serve.tiny import make_config, make_params

pytestmark = pytest.mark.long

ROOM = AdapterRoom(count=3, rank=8)
SHAPES = Shapes(slots=16, max_context=64, call_tokens=16)
PROMPT = [(7 * i) % 200 + 3 for i in range(21)]


def draw(config, seed, rank=4, targets="all"):
    """Adapters that change logprobs by whole nats."""
    lora = Lora(rank, 2.0 * rank, find_targets(targets, config))
    random = np.random.RandomState(seed)

    def fill(shape):
        return (0.08 * random.standard_normal(shape.shape)).astype(np.float32)

    return jax.tree.map(fill, adapter_shapes(config, lora)), lora


def host(config, seed, **options):
    adapters, lora = draw(config, seed, **options)
    return HostAdapters.of(adapters, config, lora)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def forward(config, params, scan, experts):
    """Logprobs of PROMPT[1:]."""
    tokens_BT = jnp.asarray([PROMPT])
    places_BT = jnp.arange(len(PROMPT))[None]
    model = Qwen3(config, scan=scan, experts=experts)
    out = model.apply({"params": params}, tokens_BT, places_BT, jnp.ones_like(tokens_BT))
    logp_TV = jax.nn.log_softmax(jnp.matmul(out.hidden_BTD[0], head_kernel(params, config)))
    return jnp.take_along_axis(logp_TV[:-1], tokens_BT[0, 1:, None], 1)[:, 0]


def merged(config, params, seed, **options):
    adapters, lora = draw(config, seed, **options)
    return merge(params, adapters, lora, jnp.float32)


FORMS = [
    "tiled",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(native.reason_missing() is not None, reason="no compiler"),
    ),
]


@pytest.mark.parametrize("config", [SWITCHES], ids=["switches"])
@pytest.mark.parametrize("experts", FORMS)
def test_tokens_with_an_adapter_get_the_merged_model_and_others_the_base(config, experts):
    params = random_params(config, seed=3, scale=0.2)
    base = forward(config, params, config.scan_layers, "auto")
    few = {"rank": 8, "targets": "attention,experts"}
    wanted = {"a": merged(config, params, 1), "b": merged(config, params, 2, **few)}
    table = AdapterTable(ROOM)
    table.prepare(config)
    table.load("gone", "-", host(config, 4))  # nothing of it may be left in its slot
    table.unload("gone")
    table.load("b", "-", host(config, 2, **few))
    table.load("a", "-", host(config, 1))
    unstacked = unstack_layers(params, config)

    def ours(slot_T):
        return forward(config, with_adapters(unstacked, table.arrays, slot_T), False, experts)

    for name, whole in wanted.items():
        slot_T = jnp.full(len(PROMPT), table.take(name).slot)
        theirs = forward(config, whole, config.scan_layers, "auto")
        np.testing.assert_allclose(ours(slot_T), theirs, atol=1e-5)
        assert np.abs(theirs - base).max() > 0.3  # or nothing was tested
    np.testing.assert_allclose(ours(jnp.full(len(PROMPT), -1)), base, atol=1e-5)


# -- the engine: several in one batch
# -------------------------------------------------------------------------------------------------


def load():
    config = make_config()
    return jax.device_put(unstack_layers(make_params(0), config)), config


@functools.cache
def scheduler():
    scheduler = Scheduler(load, SHAPES, None, "0", ROOM)
    scheduler.device.prepare()
    for number in (1, 2):
        scheduler.device.adapters.load(f"a{number}", "-", host(make_config(), number))
    return scheduler


def run(requests):
    for request in requests:
        scheduler()._queue(request)
    while scheduler().busy():
        scheduler()._step()
    return requests


def make_requests(names):
    """Two for each name, one of which is scored; all have one prompt, so pages must not mix."""
    return [
        Request(
            f"{name} {number}",
            list(PROMPT),
            SamplingParams(max_new_tokens=9, seed=number),
            score_from=0 if number else None,
            return_routes=bool(number),
            adapter_name=name,
        )
        for number in range(2)
        for name in names
    ]


def bits_of(request):
    return request.output_ids, request.logprobs, request.prompt_logprobs, str(request.routes)


def test_requests_with_several_adapters_run_in_one_batch_as_each_runs_alone():
    together = run(make_requests(["", "a1", "a2"]))
    alone = [run([request])[0] for request in make_requests(["", "a1", "a2"])]
    assert [bits_of(one) for one in together] == [bits_of(one) for one in alone]
    config = make_config()
    for request, seed in zip(together[3:], (None, 1, 2), strict=True):
        params = make_params(0) if seed is None else merged(config, make_params(0), seed)
        expected = forward(config, params, config.scan_layers, "auto")
        np.testing.assert_allclose(request.prompt_logprobs, expected, atol=2e-5)
    assert len({str(one.prompt_logprobs) for one in together[3:]}) == 3


def test_an_unloaded_adapter_serves_its_requests_to_the_end_and_keeps_its_slot_until_then():
    table = scheduler().device.adapters
    (expected,) = run(make_requests(["a1"])[:1])
    (request,) = make_requests(["a1"])[:1]
    scheduler()._queue(request)
    scheduler()._step()
    table.unload("a1")
    table.load("a3", "-", host(make_config(), 3))
    with pytest.raises(ValueError, match="all 3 slots for adapters are used; unload one, wait"):
        table.load("a4", "-", host(make_config(), 4))
    run([])
    assert bits_of(request) == bits_of(expected)
    table.load("a1", "-", host(make_config(), 5))  # into the slot of the old one, with its name
    (other,) = run(make_requests(["a1"])[:1])
    assert other.logprobs != request.logprobs  # nor do they share pages
    table.unload("a1")
    table.unload("a3")
    table.load("a1", "-", host(make_config(), 1))


@pytest.mark.parametrize(
    "name, adapters, message",
    [
        ("a1", {"rank": 4}, "an adapter 'a1' is loaded; unload it first"),
        ("new", {"rank": 9}, "rank 9 exceeds 8; start the engine with --max_lora_rank 9"),
    ],
)
def test_adapters_without_room_are_refused(name, adapters, message):
    with pytest.raises(ValueError, match=message):
        scheduler().device.adapters.load(name, "-", host(make_config(), 1, **adapters))


def test_an_engine_keeps_room_only_for_what_it_was_started_for():
    table = AdapterTable(AdapterRoom())
    table.prepare(make_config())
    assert table.arrays is None
    with pytest.raises(ValueError, match="no room for adapters; start it with --max_loaded_loras"):
        table.load("a", "-", host(make_config(), 1))
    table = AdapterTable(AdapterRoom(1, 8, "q_proj"))
    table.prepare(make_config())
    with pytest.raises(ValueError, match="it adapts k_proj, v_proj, o_proj too"):
        table.load("a", "-", host(make_config(), 1, targets="attention"))
    with pytest.raises(ValueError, match="--max_lora_rank must be at least 1, got 0"):
        AdapterRoom(1, 0)


# -- over HTTP
# -------------------------------------------------------------------------------------------------


def converse(conversation):
    """Run a conversation with the server around a scheduler of its own thread."""

    async def talk():
        shapes = Shapes(slots=4, max_context=64, call_tokens=4)  # one program
        served = Scheduler(load, shapes, None, "0", ROOM)
        bounds = Bounds(make_config().vocab_size, 64, frozenset([make_config().eos_token_id]))
        app = Server(served, bounds, None, {"model_path": "base"}).app()
        served.start()
        try:
            async with TestClient(TestServer(app)) as client:
                await asyncio.to_thread(served.ready.wait, 60)
                await conversation(client)
        finally:
            served.stop()

    asyncio.run(talk())


def test_adapters_are_loaded_named_and_unloaded_over_http(tmp_path):
    save_peft(host(make_config(), 1), "base", tmp_path / "one")
    damaged = host(make_config(), 1)
    next(iter(damaged.pairs.values()))[0][0, 0] = np.nan
    save_peft(damaged, "base", tmp_path / "nan")
    body = {
        "input_ids": PROMPT,
        "return_logprob": True,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 6},
    }

    async def conversation(client):
        async def post(route, **fields):
            async with client.post(route, json=fields) as answer:
                return answer.status, await answer.json()

        one = {"lora_name": "one", "lora_path": str(tmp_path / "one")}
        status, answer = await post("/load_lora_adapter", **one)
        assert status == 200 and answer["success"]
        assert answer["loaded_adapters"] == {"one": str(tmp_path / "one")}
        status, answer = await post("/load_lora_adapter", **one)
        assert status == 400 and "is loaded; unload it first" in answer["error_message"]
        for name, cause in (("nan", "is not finite"), ("absent", "adapter_config.json is missing")):
            path = str(tmp_path / name)
            status, answer = await post("/load_lora_adapter", lora_name=name, lora_path=path)
            assert status == 400 and cause in answer["error_message"], answer
            assert answer["success"] is False and list(answer["loaded_adapters"]) == ["one"]
        status, answer = await post("/load_lora_adapter", lora_name="x")
        assert status == 400 and "lora_path must be a string" in answer["error"]["message"]

        status, answer = await post("/weights_checker", action="checksum", lora_name="one")
        stored = safetensors.numpy.load_file(tmp_path / "one" / TENSORS)
        sums = {name: hashlib.sha256(one.tobytes()).hexdigest() for name, one in stored.items()}
        assert answer["ranks"][0]["checksums"] == sums
        models = await (await client.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["base", "one"]

        fields = body | {"input_ids": [PROMPT, PROMPT], "lora_path": ["one", None]}
        status, both = await post("/generate", **fields)
        assert status == 200
        status, base = await post("/generate", **body)
        assert base["output_ids"] == both[1]["output_ids"] != both[0]["output_ids"]
        status, answer = await post("/generate", **body, lora_path="two")
        assert status == 400 and "no adapter 'two' is loaded ('one')" in answer["error"]["message"]
        status, answer = await post("/unload_lora_adapter", lora_name="one")
        assert status == 200 and answer["loaded_adapters"] == {}
        status, answer = await post("/unload_lora_adapter", lora_name="one")
        assert status == 400 and "no adapter 'one' is loaded (none)" in answer["error_message"]

    converse(conversation)
