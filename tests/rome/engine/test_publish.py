"""Weights reach the engine, and only proven ones are sampled from."""

import asyncio

import jax
import numpy as np
import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights, write_checkpoint
from rome.model.hf.checkpoint import load_hf
from tests.rome.engine.probe import PROBE, expected
from tests.rome.serve.tiny import (
    SLOTS,
    Oracle,
    make_checkpoint,
    make_config,
    make_params,
    serve,
    until_running,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    start = make_checkpoint(tmp_path_factory.mktemp("start") / "model", endless=True)
    with serve(start, tmp_path_factory.mktemp("log") / "serve.log") as running:
        yield running


def talk(server, conversation):
    async def run():
        async with EnginePool([Engine(server.url)]) as pool:
            return await conversation(pool, pool.engines[0])

    return asyncio.run(run())


def test_published_weights_are_proven_and_sampled_from_with_their_version(server, tmp_path):
    params = make_params(4)

    async def conversation(pool, engine):
        logprobs = expected(params)
        tasks = [
            asyncio.ensure_future(pool.generate(PROBE, Sampling(400), 120))
            for _ in range(6 * SLOTS)
        ]
        await until_running(engine, *tasks)
        published = await publish_weights(
            write_checkpoint(params, make_config(), tmp_path, 12), 12, pool, PROBE, logprobs
        )
        return (
            published,
            await asyncio.gather(*tasks),
            await pool.generate(PROBE, Sampling(10, seed=2), 60),
        )

    published, amid, after = talk(server, conversation)
    assert published.probe_error < 1e-4
    assert {len(completion.output_ids) for completion in amid} == {400}
    spans = [[version for version, _, _ in completion.versions] for completion in amid]
    assert [0, 12] in spans and all(one in ([0], [0, 12], [12]) for one in spans)
    assert after.versions == [(12, 0, 10)]
    np.testing.assert_allclose(
        after.logprobs,
        Oracle(make_config(), params).logprobs(PROBE + after.output_ids)[len(PROBE) - 1 :],
        atol=1e-4,
    )


def test_two_directories_are_kept_and_a_version_can_be_published_again(server, tmp_path):
    params = make_params(5)

    async def conversation(pool, engine):
        for version in (1, 2, 3, 3):
            await publish_weights(
                write_checkpoint(params, make_config(), tmp_path, version),
                version,
                pool,
                PROBE,
                expected(params),
            )

    talk(server, conversation)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_weights_that_do_not_give_the_trainers_logprobs_are_not_sampled_from(server, tmp_path):
    async def conversation(pool, engine):
        with pytest.raises(
            EngineError,
            match=(
                f"{engine.url} says that it has weights 20, but its probe logprobs differ from the"
                " trainer's by .* start it again"
            ),
        ):
            await publish_weights(
                write_checkpoint(make_params(6), make_config(), tmp_path, 20),
                20,
                pool,
                PROBE,
                expected(make_params(7)),
            )
        assert pool.states[engine.url] == "suspect"
        assert (await engine.server_info())["internal_states"][0]["paused"] is True
        with pytest.raises(EngineError, match=r"no engine is left: .* it has weights 20"):
            await pool.generate(PROBE, Sampling(1), 600)
        await engine.resume()

    talk(server, conversation)


def test_an_engine_that_holds_other_bytes_than_were_written_is_found_out(
    server, tmp_path, monkeypatch
):
    """A probe can miss a change in an expert that it does not route to; the hash of every tensor
    cannot.
    """
    params = make_params(8)
    update = Engine.update_weights

    async def update_from_elsewhere(self, path, version, **options):
        changed = jax.tree.map(np.copy, params)
        changed["embed"]["embedding"][600] += 1.0  # a token that the probe does not hold
        await update(
            self,
            str(write_checkpoint(changed, make_config(), tmp_path / "elsewhere", version)),
            version,
        )

    monkeypatch.setattr(Engine, "update_weights", update_from_elsewhere)

    async def conversation(pool, engine):
        with pytest.raises(
            EngineError, match=r"holds other bytes than .* in 1 tensors \(model.embed_tokens.weight"
        ):
            await publish_weights(
                write_checkpoint(params, make_config(), tmp_path, 30),
                30,
                pool,
                PROBE,
                expected(params),
            )
        await engine.resume()

    talk(server, conversation)


def test_a_probe_that_is_too_short_or_unscored_is_refused_before_anything_happens(tmp_path):
    with pytest.raises(ValueError, match="one logprob for each"):
        asyncio.run(publish_weights(tmp_path, 1, None, [1, 2], [0.0]))
    assert not list(tmp_path.iterdir())


def test_a_half_written_directory_of_a_killed_run_is_replaced(tmp_path):
    (tmp_path / "step_000001.tmp").mkdir()
    (tmp_path / "step_000001.tmp" / "junk").write_text("x")
    path = write_checkpoint(make_params(0), make_config(), tmp_path, 1)
    assert (
        sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000001"]
        and not (path / "junk").exists()
    )
    loaded, _ = load_hf(path)
    assert np.array_equal(loaded["embed"]["embedding"], make_params(0)["embed"]["embedding"])
