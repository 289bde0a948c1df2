"""Adapters alone reach an engine by name, beside the weights that it was started with."""

import asyncio
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights, write_adapter
from rome.model.hf.peft import HostAdapters
from rome.model.lora import Lora, adapter_shapes, find_targets, merge
from tests.rome.serve.tiny import Oracle, make_checkpoint, make_config, make_params, serve

PROBE = list(range(20, 50))
LORA = Lora(4, 8.0, find_targets("all", make_config()))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("start") / "model", endless=True)


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with serve(start, log, "--max_loaded_loras", "3", "--max_lora_rank", "4") as running:
        yield running


def draw(seed):
    random = np.random.RandomState(seed)

    def fill(shape):
        return (0.1 * random.standard_normal(shape.shape)).astype(np.float32)

    return jax.tree.map(fill, adapter_shapes(make_config(), LORA))


def merged(seed):
    return Oracle(make_config(), merge(make_params(0), draw(seed), LORA, jnp.float32))


def write(seed, directory, version):
    host = HostAdapters.of(draw(seed), make_config(), LORA)
    return write_adapter(host, directory, version)


async def publish(pool, source, version, base, mode="abort"):
    logprobs = [0.0, *merged(version).logprobs(PROBE)]
    return await publish_weights(
        source, version, pool, PROBE, logprobs, 1e-5, mode=mode, adapter=True, base=base
    )


@pytest.mark.long
def test_adapters_are_proven_sampled_from_and_replaced_while_requests_run(server, start, tmp_path):
    async def conversation():
        completions = []
        async with EnginePool([Engine(server.url)]) as pool:
            for version in range(1, 6):  # more than there are slots
                mode = "abort" if version == 5 else "in_place"
                source = write(version, tmp_path, version)
                published = await publish(pool, source, version, start, mode)
                assert published.engines == 1 and published.probe_error < 1e-5
                short = await pool.generate(PROBE, Sampling(10, seed=version), 60)
                assert short.versions == [(version, 0, 10)]
                theirs = merged(version).logprobs(PROBE + short.output_ids)[len(PROBE) - 1 :]
                np.testing.assert_allclose(short.logprobs, theirs, atol=1e-5)
                long = pool.generate(PROBE, Sampling(440, seed=9), 120)
                completions.append(asyncio.ensure_future(long))
                await asyncio.sleep(0.02)
            return await asyncio.gather(*completions)

    completions = asyncio.run(conversation())
    for begun, completion in enumerate(completions, 1):
        assert len(completion.output_ids) == 440
        versions = [version for version, _, _ in completion.versions]
        assert versions[0] == begun and versions == sorted(versions)
        for version, first, end in completion.versions:  # each token from what its span names
            ids = (PROBE + completion.output_ids)[: len(PROBE) + min(end, 90)]
            theirs = merged(version).logprobs(ids)[len(PROBE) - 1 :]
            np.testing.assert_allclose(
                completion.logprobs[first : min(end, 90)], theirs[first:], atol=1e-4
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000005"]
    weights = (start / "model.safetensors").stat().st_size
    adapter = sum(path.stat().st_size for path in (tmp_path / "step_000005/adapter").iterdir())
    assert adapter < weights


@pytest.mark.slow
def test_neither_other_adapters_nor_another_base_pass_the_proof(server, tmp_path):
    async def publish_to(base, seed, version):
        async with EnginePool([Engine(server.url)]) as pool:
            await publish(pool, write(seed, tmp_path, version), version, base)

    other = make_checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(EngineError, match="holds other bytes than the base of adapters 7"):
        asyncio.run(publish_to(other, 7, 7))
    with pytest.raises(EngineError, match="says that it has weights 8, but its probe logprobs"):
        asyncio.run(publish_to(None, 6, 8))


@pytest.mark.slow
def test_an_engine_without_room_refuses_adapters(start, tmp_path):
    async def conversation(url):
        async with EnginePool([Engine(url)]) as pool:
            await publish(pool, write(1, pathlib.Path(tmp_path), 1), 1, start)

    with (
        serve(start, tmp_path / "serve.log") as running,
        pytest.raises(EngineError, match="start it with --max_loaded_loras"),
    ):
        asyncio.run(conversation(running.url))
