"""An engine on a mesh gives one device's answers, with adapters, after updates, amid pauses.

Scheduler and device are the real ones; the server at the end is a real process.
"""

import asyncio
import dataclasses
import functools
import pathlib
import random
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.engine.completion import Sampling
from rome.engine.handover import checksums, hand_over
from rome.engine.inside import InsideEngine
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights
from rome.model.hf.leaves import LeafReader
from rome.model.params import engine_mesh_of, engine_sharding, param_shardings
from rome.model.sharding import engine_part, make_engine_mesh, make_mesh
from rome.model.stacking import stack_layers
from rome.serve.adapters import AdapterRoom
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler
from rome.serve.weights import load_weights
from tests.rome.serve.talk import PROMPT, logprobs_of, talk
from tests.rome.serve.test_adapters import host
from tests.rome.serve.tiny import Oracle, make_checkpoint, make_config, make_params, serve

pytestmark = pytest.mark.long

SHAPES = Shapes(slots=4, max_context=32, page_tokens=4, call_tokens=4)
MESHES = [(2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((4, 1), (1, 2)))]
ADAPTERS = {"a": 1, "b": 2}  # name -> seed


@functools.cache
def checkpoint_of(seed):
    return make_checkpoint(pathlib.Path(tempfile.mkdtemp()) / "model", seed)


@functools.cache
def scheduler_of(expert, tensor):
    mesh = make_engine_mesh(expert, tensor, make_config())
    scheduler = Scheduler(
        lambda: load_weights(checkpoint_of(0), "float32", mesh),
        SHAPES,
        None,
        "0",
        AdapterRoom(count=2, rank=4),
    )
    scheduler.device.prepare()
    for name, seed in ADAPTERS.items():
        scheduler.device.adapters.load(name, "-", host(make_config(), seed))
    return scheduler


def make_requests(adapters=("", "a", "b")):
    rng = random.Random(0)
    requests = []
    for number in range(6):
        prompt = [rng.randrange(700) for _ in range(3 + 2 * number)]
        sampling = SamplingParams(
            max_new_tokens=8, temperature=number % 3 / 2, top_k=[-1, 20][number % 2], seed=number
        )
        request = Request(str(number), prompt, sampling, score_from=0)
        request.return_routes = True
        request.adapter_name = adapters[number % len(adapters)]
        requests.append(request)
    return requests


def answer(scheduler, requests):
    for request in requests:
        scheduler._queue(request)
    while scheduler.busy():
        scheduler._step()
    return requests


def assert_equal_answers(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.output_ids == other.output_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.prompt_logprobs, other.prompt_logprobs, atol=1e-5)
        np.testing.assert_array_equal(one.routes[: one.computed], other.routes[: other.computed])


@functools.cache
def alone():
    """The answers of one device, with weights of seeds 0 and 1."""
    scheduler = scheduler_of(1, 1)
    first = answer(scheduler, make_requests())
    with LeafReader(checkpoint_of(1), "float32") as reader:
        scheduler.swap(reader.read_all(scheduler.device.place), "1", True)
    return first, answer(scheduler, make_requests())


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_answers_as_one_device_with_adapters_and_after_an_update(mesh):
    scheduler = scheduler_of(*mesh)
    first, second = alone()
    assert_equal_answers(answer(scheduler, make_requests()), first)
    with LeafReader(checkpoint_of(1), "float32") as reader:
        old = scheduler.take_weights("they are replaced")
        scheduler.swap(reader.read_all(scheduler.device.place, old), "1", True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_equal_answers(answer(scheduler, make_requests()), second)
    assert first[0].output_ids != second[0].output_ids  # or nothing was tested
    # Weights, pages and adapters have kept their places: nothing was compiled again.
    assert scheduler.device._program._cache_size() == len(SHAPES.call_sizes)
    by_heads = jax.sharding.PartitionSpec(None, None, "tensor", None)
    assert {page.sharding.spec for page in scheduler.device._pages} == {by_heads}


def test_each_device_has_its_part_of_weights_and_cache():
    whole = scheduler_of(1, 1).device
    split = scheduler_of(2, 2).device
    pages = 2 * make_config().num_layers * SHAPES.pages * SHAPES.page_tokens * 4 * 2 * 16
    assert sum(page.nbytes for page in whole._pages) == pages
    shard = split._pages[0].sharding.shard_shape(split._pages[0].shape)
    assert shard == (SHAPES.pages, SHAPES.page_tokens, 2, 16)  # one of two heads
    assert split.allocated_bytes() < whole.allocated_bytes() / 2


# -- weights of a trainer
# -------------------------------------------------------------------------------------------------


def trainer_params(seed, **sizes):
    config = make_config()
    mesh = make_mesh(sizes, config)
    return jax.device_put(make_params(seed), param_shardings(mesh, config)), mesh


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "trainers",
    [
        {"fsdp": 2, "expert": 2, "tensor": 2},
        pytest.param({"fsdp": 2}, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "sequence": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_trainers_weights_arrive_on_its_own_part_of_the_mesh_and_on_another(trainers, dtype):
    config = dataclasses.replace(make_config(), dtype=dtype)
    params, mesh = trainer_params(3, **trainers)
    before = jax.tree.map(np.array, params)
    expected = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), before)
    own = engine_part(mesh, config)
    assert (1 if own is None else own.size) == trainers.get("expert", 1) * trainers.get("tensor", 1)
    another = make_engine_mesh(2, 2, config, jax.devices()[4:])
    for place in (own or mesh.devices.flat[0], another):
        handed = hand_over(params, config, place)
        jax.tree.map(np.testing.assert_array_equal, stack_layers(handed.params), expected)
        assert checksums(handed.params) == handed.checksums
        assert engine_mesh_of(handed.params) is (
            place if place is not mesh.devices.flat[0] else None
        )
        gate = handed.params["layers"][1]["moe"]["gate"]
        assert gate.sharding == engine_sharding(place, "layers/moe/gate")
        for leaf in jax.tree.leaves(handed.params):
            leaf.delete()  # shared with nothing
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.slow
def test_an_engine_inside_a_trainer_on_a_mesh_is_published_to_while_both_compute():
    config = dataclasses.replace(make_config(), eos_token_id=make_config().vocab_size)
    probe = list(range(20, 45))
    params, mesh = trainer_params(0, fsdp=2, expert=2, tensor=2)
    engine = InsideEngine(hand_over(params, config, engine_part(mesh, config)), SHAPES)
    ended = threading.Event()

    @jax.jit
    def collectives(params):
        return jax.tree.map(lambda leaf: jnp.sum(leaf * leaf), params)

    def compute():
        while not ended.wait(0.01):
            jax.block_until_ready(collectives(params))

    async def conversation(pool):
        waiting = asyncio.ensure_future(pool.generate([5, 6, 7], Sampling(24), 120))
        for version in (1, 2):
            seed = version % 2
            fresh, _ = trainer_params(seed, fsdp=2, expert=2, tensor=2)
            expected = [0.0, *Oracle(make_config(), make_params(seed)).logprobs(probe)]
            handed = hand_over(fresh, config, engine_part(mesh, config))
            mode = ("abort", "retract")[version - 1]
            done = await publish_weights(handed, version, pool, probe, expected, mode=mode)
            assert done.engines == 1 and done.probe_error < 1e-5
        completion = await waiting
        assert len(completion.output_ids) == 24
        return await pool.generate([5, 6, 7], Sampling(4), 120)

    trainer = threading.Thread(target=compute)
    trainer.start()
    try:
        engine.start()
        last = asyncio.run(asyncio.wait_for(conversation(EnginePool([engine])), 300))
    finally:
        ended.set()
        trainer.join()
        engine.stop()
    assert last.versions == [(2, 0, 4)]


# -- the server
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((3, 1), "expert_parallel = 3 does not divide the 4 experts"),
        ((1, 4), "tensor_parallel = 4 does not divide the 2 key heads"),
        ((4, 4), "they need 16 devices, 8 are there"),
        ((0, 1), "both must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_engine_mesh(*sizes, make_config())


@pytest.mark.slow
def test_a_server_on_four_devices_serves_is_updated_paused_and_hashes_as_one(tmp_path):
    new = Oracle.load(checkpoint_of(1))
    flags = ("--expert_parallel", "2", "--tensor_parallel", "2", "--call_tokens", "16")

    async def conversation(http):
        first = await http.generate(PROMPT, max_new_tokens=8, sampling_seed=9)
        sums = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
        await http.post("/pause_generation", {"mode": "retract"})
        waiting = asyncio.ensure_future(http.generate(PROMPT, max_new_tokens=8, sampling_seed=9))
        update = {"model_path": str(checkpoint_of(1)), "weight_version": "1"}
        status, said = await http.post("/update_weights_from_disk", update)
        assert status == 200 and said["success"] is True
        await http.post("/continue_generation")
        second = await waiting
        back = update | {"model_path": str(checkpoint_of(0)), "weight_version": "0"}
        await http.post("/update_weights_from_disk", back)
        again = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
        return (
            first,
            second,
            sums,
            again,
            await http.generate(PROMPT, max_new_tokens=8, sampling_seed=9),
        )

    log = tmp_path / "log"
    with serve(checkpoint_of(0), log, *flags) as server:  # which makes its devices itself
        first, second, sums, again, third = talk(server, conversation)
    assert sums == again
    assert first["output_ids"] == third["output_ids"] != second["output_ids"]
    expected = new.logprobs(PROMPT + second["output_ids"])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(logprobs_of(second), expected, atol=1e-4)
