"""Engines of a stage: whatever cannot be closed, the servers are stopped."""

import asyncio
import dataclasses
import types

import jax
import numpy as np
import pytest

from envs.rock.sync import loop
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError
from rome.model.config import PRESETS
from rome.model.hf.checkpoint import load_hf
from rome.model.sharding import make_mesh
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.serve.request import Request, SamplingParams
from rome.stages import engines as stage_engines
from rome.stages.config import load_config
from rome.stages.engines import PROBE_TOKENS, Engines
from rome.stages.rl import RLStage
from rome.train.team import Team
from rome.train.workdir import ConfigError
from tests.rome.engine.fake_sglang import FakeSGLang, make_weights, trainer_logprobs_of
from tests.rome.engine.pools import PROMPT, assert_by_one_version_each, until
from tests.rome.serve.tiny import Oracle, make_config, make_params


class Server:
    is_stopped = False

    def stop(self):
        self.is_stopped = True


class Pool:
    async def close(self):
        raise OSError("a socket")


def on_loop(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop()).result(30)


def make(workdir, learner=None, chat=None, **keys):
    config = load_config("experiments/ipa.py", "smoke")
    config.update_from_flattened_dict(keys)
    return Engines(config, workdir, None, learner, chat, Team(), None)


def test_whatever_cannot_be_closed_the_servers_are_stopped(tmp_path):
    def close():
        raise TimeoutError("a sandbox")

    engines = make(tmp_path)
    engines._pool = Pool()
    engines.servers = [Server(), Server()]
    stage = types.SimpleNamespace(engines=engines, collector=types.SimpleNamespace(close=close))
    with pytest.raises((TimeoutError, OSError)):
        RLStage.close(stage)
    assert all(server.is_stopped for server in engines.servers)


def test_a_version_that_could_not_be_published_is_not_taken_for_published(tmp_path):
    class Unreachable:
        def score_one(self, *_):
            raise OSError("no space left on device")

    engines = make(tmp_path, Unreachable(), types.SimpleNamespace(open=lambda text: [1]))
    with pytest.raises(OSError):
        engines.publish(types.SimpleNamespace(step=1, params=None))
    assert engines.published is None


def test_engines_are_not_used_before_they_are_started(tmp_path):
    with pytest.raises(RuntimeError, match="before they are started"):
        make(tmp_path).lend(1)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_publication_pauses_as_the_config_says_and_proves_by_a_long_probe(
    tmp_path, monkeypatch, mode
):
    """Amid a request, on a server that speaks SGLang's protocol."""

    def write(params, config, directory, version, needed, delta, adapters):
        return make_weights(tmp_path / f"step_{version}", version)

    server = on_loop(FakeSGLang().start())
    monkeypatch.setattr(stage_engines, "write_checkpoint", write)
    scored = types.SimpleNamespace(
        score_one=lambda params, ids: np.array(trainer_logprobs_of(params, ids)),
        to_publish=lambda params: (params, None),
    )
    engines = make(tmp_path, scored, Chat(Tokenizer.load(TINY)))
    engines._model_config = dataclasses.replace(PRESETS["tiny"], dtype="bfloat16")
    engines.config.engine.urls = server.url
    engines.config.engine.pause = mode
    engines.config.max_context = 400
    try:
        engines.start(None)
        engines.publish(types.SimpleNamespace(step=1, params=1))
        task = asyncio.run_coroutine_threadsafe(
            engines.pool.generate(PROMPT, Sampling(60), 30), loop()
        )
        on_loop(until(lambda: any(request["ids"] for request in server.running.values())))
        metrics = engines.publish(types.SimpleNamespace(step=2, params=2))
        completion = task.result(30)
    finally:
        engines.close()
        on_loop(server.crash())
    assert metrics["engines"] == 1
    assert [version for version, _, _ in completion.versions] == [1, 2]
    assert_by_one_version_each(completion, PROMPT)
    modes = [body["mode"] for route, body in server.bodies if route == "/pause_generation"]
    assert modes == [mode, mode]
    sizes = {
        len(body["input_ids"])
        for route, body in server.bodies
        if route == "/generate" and body["logprob_start_len"] == 0
    }
    assert sizes == {PROBE_TOKENS}


@pytest.mark.parametrize(
    "dtype, trainer, engine, tolerance",
    [
        ("float32", "cpu", "cpu", 1e-4),
        ("float32", "tpu", "cpu", 1e-3),  # one TPU chip: the engine runs on the CPU
        ("float32", "cpu", None, 1e-3),  # a server elsewhere
        ("bfloat16", "cpu", "cpu", 0.1),
        ("bfloat16", "gpu", "cpu", 0.1),
    ],
)
def test_the_tolerance_of_a_proof_fits_the_two_platforms(
    tmp_path, monkeypatch, dtype, trainer, engine, tolerance
):
    monkeypatch.setattr(stage_engines.jax, "default_backend", lambda: trainer)
    engines = make(tmp_path)
    engines._model_config = dataclasses.replace(PRESETS["tiny"], dtype=dtype)
    engines.servers = [Server()] if engine else []
    assert engines._tolerance() == tolerance


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"engine.count": 2}, "engine.count=2. Set it to 1"),
        ({"engine.pause": "in_place"}, "engine.keep_memory=False frees these"),
        ({"rollout.lend_engines": 1}, "rollout.lend_engines=1 lends devices of other processes"),
    ],
)
def test_what_contradicts_an_engine_inside_the_trainer_is_refused_before_anything_starts(
    tmp_path, keys, match
):
    with pytest.raises(ConfigError, match=match):
        make(tmp_path, **{"engine.device": "inside"}, **keys)


def test_engines_with_urls_are_never_inside(tmp_path):
    keys = {"engine.device": "inside", "engine.count": 2, "engine.urls": "http://a:1"}
    assert not make(tmp_path, **keys)._division.is_inside


class Tiny:
    """A learner of the engine tests' model, as far as engines need it."""

    mesh = make_mesh(
        {"replica": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1},
        make_config(),
        jax.devices()[:1],
    )

    def merged(self, params):
        return params

    def to_publish(self, params):
        return params, None

    def score_one(self, params, ids):
        return np.array([0.0, *Oracle(make_config(), params).logprobs(ids)])


@pytest.fixture
def inside(tmp_path):
    """The engines of a stage, with one inside the trainer, started with weights of seed 0."""
    keys = {"engine.device": "inside", "engine.slots": 4, "max_context": 120}
    engines = make(
        tmp_path, Tiny(), types.SimpleNamespace(open=lambda text: [*range(20, 60)]), **keys
    )
    engines._model_config = make_config()
    engines._display = types.SimpleNamespace(note=lambda text: None)
    engines.start(state_of(0))
    yield engines
    engines.close()


def state_of(step):
    return types.SimpleNamespace(step=step, params=make_params(step % 2))


@pytest.mark.long
def test_an_engine_inside_gives_the_device_to_each_update_and_writes_no_file(inside, tmp_path):
    engine = inside._inside
    for step in range(3):
        metrics = inside.publish(state_of(step))
        assert metrics["engines"] == 1 and metrics["probe_error"] < 1e-4
        assert inside.publish(state_of(step)) is metrics  # nothing is sent twice
        done = on_loop(inside.pool.generate(PROMPT, Sampling(4), 60))
        assert done.versions == [(step, 0, 4)]
        assert engine._scheduler.device.allocated_bytes() > 0
        inside.make_room()
        inside.make_room()
        assert engine._scheduler.device.allocated_bytes() == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    # The same version once more: its engine has nothing to sample with.
    inside.publish(state_of(2))
    assert on_loop(inside.pool.generate(PROMPT, Sampling(4), 60)).versions == [(2, 0, 4)]


@pytest.mark.long
def test_versions_that_a_resumed_run_needs_are_written_too(inside, tmp_path):
    inside.publish(state_of(0), keep={0})
    inside.publish(state_of(1), keep={0, 1})
    written, _ = load_hf(tmp_path / "weights" / "step_000001")
    jax.tree.map(np.testing.assert_array_equal, written, make_params(1))


@pytest.mark.long
def test_an_engine_inside_that_failed_is_an_error_at_the_next_update_and_closes(inside):
    inside.publish(state_of(0))
    poison = Request("poison", [1], SamplingParams(max_new_tokens=1))
    poison.notify = lambda request: 1 / 0
    inside._inside._scheduler.submit(poison)
    on_loop(until(lambda: inside._inside._scheduler.failure is not None))
    with pytest.raises(EngineError, match="scheduler ended: ZeroDivisionError"):
        inside.make_room()
    with pytest.raises(EngineError, match="scheduler ended: ZeroDivisionError"):
        inside.publish(state_of(1))
