"""Each trap of SGLang that is known, on a server that has it: what the client and the pool do
there.
"""

import asyncio

import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.dialect import dialect_of
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool
from tests.rome.engine.fake_sglang import FakeSGLang, fakes
from tests.rome.engine.pools import (
    PROMPT,
    assert_by_one_version_each,
    bring,
    run,
    supervised,
    until,
)


def updates(server):
    """How often the server was told to load weights."""
    return [route for route, _ in server.bodies].count("/update_weights_from_disk")


@pytest.mark.parametrize(
    "version, mode",
    [
        ("0.5.9", "abort"),
        ("0.5.15", "retract"),
        ("0.5.23", "retract"),
        ("0.5.23", "in_place"),
        ("0.5.9", "in_place"),
    ],
)
def test_an_update_amid_requests_labels_every_token_whatever_the_version_and_mode(
    tmp_path, version, mode
):
    """Traps 1, 2 and 3: an update that waits for running requests, the crash by retract, the
    refusal amid frozen requests; and versions that do not tell which token is by which weights.
    """
    server = FakeSGLang(
        version, ("retract_crashes",) if version == "0.5.15" else ("in_place_flush",)
    )

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(60), 30))
            await until(lambda: any(request["ids"] for request in server.running.values()))
            published = await bring(pool, tmp_path, 4, value=44, mode=mode)
            assert published.engines == 1 and published.failed == ()
            completion = await task
            assert [version for version, _, _ in completion.versions] == [0, 4] and len(
                completion.output_ids
            ) == 60
            assert_by_one_version_each(completion, PROMPT, {0: 1, 4: 44}.get)

    run(conversation())
    modes = [body["mode"] for route, body in server.bodies if route == "/pause_generation"]
    assert modes == [mode if version == "0.5.23" else "abort"]
    assert "/update_weight_version" not in dict(server.bodies)  # trap 7: it would abort everything


@pytest.mark.parametrize("mode", ["in_place", "retract"])
@pytest.mark.parametrize("proven", [True, False])
def test_what_frozen_requests_sample_before_the_proof_counts_only_if_the_proof_succeeds(
    tmp_path, mode, proven
):
    """They go on as soon as the server does, and the probe needs a running server: such a request
    may end before the proof.
    """
    server, other = FakeSGLang(traps=("slow_probe",)), FakeSGLang()

    async def conversation():
        async with fakes(server, other) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            if not proven:
                server.traps.add("update_says_yes")
            task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(40), 30))
            await until(lambda: any(request["ids"] for request in server.running.values()))
            published = await bring(pool, tmp_path, 2, mode=mode)
            completion = await task
            assert published.engines == 1 + proven and len(completion.output_ids) == 40
            assert_by_one_version_each(completion, PROMPT)
            assert pool.states[server.url] == ("ready" if proven else "suspect")
            assert proven or "it did not load them" in pool.causes[server.url]
            moved = any(
                body["sampling_params"]["max_new_tokens"] > 1
                for route, body in other.bodies
                if route == "/generate"
            )
            assert moved != proven

    run(conversation())


@pytest.mark.parametrize(
    "version, trap, cause",
    [
        ("0.5.23", "update_half", "answered 400: size mismatch"),
        ("0.5.23", "update_says_yes", "5 tensors are those of the weights before"),
        (
            "0.5.15",
            "update_says_yes_to_experts",
            "1 tensors are those of the weights before (model.layers.0.mlp.experts.w2_weight)",
        ),
        ("0.5.9", "update_says_yes", "to the last bit those that it gave with weights 6"),
    ],
    ids=["half", "kept", "kept experts", "kept, unable to hash"],
)
def test_an_engine_whose_update_is_not_proven_is_left_alone_while_another_one_goes_on(
    tmp_path, version, trap, cause
):
    """Traps 4 and 5: a failed update does not roll back, and one that says success may have kept
    the old weights, or those of some tensors.

    Two versions differ on the probe by less than bfloat16 rounds, so the logprobs alone say yes.
    """
    bad, good = FakeSGLang(version), FakeSGLang(version)

    async def conversation():
        async with fakes(bad, good) as engines:
            pool = EnginePool(engines)
            assert (await bring(pool, tmp_path, 6)).engines == 2
            bad.traps.add(trap)
            tasks = [
                asyncio.ensure_future(pool.generate(PROMPT, Sampling(40), 30)) for _ in range(6)
            ]
            await until(lambda: bad.running and good.running)
            published = await bring(pool, tmp_path, 7)
            assert (
                published.engines == 1
                and len(published.failed) == 1
                and cause in published.failed[0]
                and bad.url in published.failed[0]
            )
            assert pool.states == {bad.url: "suspect", good.url: "ready"}
            for completion in await asyncio.gather(*tasks):
                assert len(completion.output_ids) == 40
                assert_by_one_version_each(completion, PROMPT)
            async with supervised(pool):  # trying again makes it no truer
                tried = updates(bad)
                await until(lambda: updates(bad) > tried + 1)
                assert pool.states[bad.url] in ("suspect", "starting")
            sent = len(bad.bodies)
            await asyncio.gather(*(pool.generate(PROMPT, Sampling(2), 30) for _ in range(8)))
            assert len(bad.bodies) == sent
            bad.traps.clear()
            async with supervised(pool):
                await until(lambda: pool.states[bad.url] == "ready")
            assert (bad.value, bad.weight_version, pool.causes) == (7, "7", {})
            published = await bring(pool, tmp_path, 8)
            assert published.engines == 2

    run(conversation())


def test_with_no_proven_engine_left_a_publication_fails_with_every_cause(tmp_path):
    async def conversation():
        half, kept = FakeSGLang(), FakeSGLang()
        async with fakes(half, kept) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 6)
            half.traps.add("update_half")
            kept.traps.add("update_says_yes")
            with pytest.raises(
                EngineError, match=r"(?s)no engine is left: .*size mismatch.*did not load them"
            ):
                await bring(pool, tmp_path, 7)

    run(conversation())


def test_an_engine_whose_bytes_are_not_those_of_the_others_is_found_out(tmp_path):
    """Its tensors have changed, and its logprobs look right."""
    bad, *good = servers = [FakeSGLang() for _ in range(3)]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 6)
            bad.traps.add("other_bytes")
            async with supervised(pool):
                await bring(pool, tmp_path, 7)
                await until(lambda: {pool.states[one.url] for one in good} == {"ready"})
                await until(lambda: "different bytes of weights 7" in pool.causes.get(bad.url, ""))
                bad.traps.clear()
                await until(lambda: pool.states[bad.url] == "ready")

    run(conversation())


def test_two_engines_that_disagree_are_both_out_since_nobody_can_say_which_is_right(tmp_path):
    servers = [FakeSGLang(traps=("other_bytes",)), FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            with pytest.raises(EngineError, match=r"different bytes of weights 7 in .*w2_weight"):
                await bring(pool, tmp_path, 7)
            assert set(pool.states.values()) == {"suspect"}

    run(conversation())


def test_engines_that_are_brought_to_their_weights_once_more_or_to_equal_ones_are_no_suspects(
    tmp_path,
):
    """Nothing changes then, and nothing must."""
    server = FakeSGLang()

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            for version, value in ((1, 5), (2, 6), (2, 6), (3, 6), (4, 7)):
                published = await bring(pool, tmp_path, version, value)
                assert published.engines == 1 and 0 < published.probe_error < 0.03
            pool.quarantine(pool.engines[0], "it failed requests")
            await pool.bring(pool.engines[0])
            await server.crash()
            await server.start()
            pool.quarantine(pool.engines[0], "it was started anew")
            server.traps.add("update_says_yes")  # and so it has its first weights now
            with pytest.raises(EngineError, match="other bytes than when it proved them before"):
                await pool.bring(pool.engines[0])
            server.traps.clear()
            await pool.bring(pool.engines[0])
            assert pool.states[server.url] == "ready" and server.value == 7

    run(conversation())


@pytest.mark.parametrize("salted", [True, False])
def test_a_prefix_that_old_weights_computed_is_not_found_even_if_the_cache_was_not_flushed(
    tmp_path, monkeypatch, salted
):
    """Trap 8.

    The second half shows that the first one can fail: without the salt the stale prefix is hit.
    """
    server = FakeSGLang(traps=("flush_lies",))
    if not salted:
        monkeypatch.setattr(Engine, "_salt", lambda self: {})

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            completions = []
            for version in (1, 2, 3):
                await bring(pool, tmp_path, version)
                completions += [await pool.generate(PROMPT, Sampling(3), 30) for _ in range(2)]
            return completions

    completions = asyncio.run(asyncio.wait_for(conversation(), 60))
    assert (server.stale_hits == 0) == salted
    if salted:
        for completion in completions:
            assert_by_one_version_each(completion, PROMPT)


def test_several_tokenizer_workers_are_refused_by_name(tmp_path):
    """Trap 9: a pause and an update would meet different ones."""

    async def conversation():
        async with fakes(FakeSGLang(tokenizer_worker_num=4)) as engines:
            with pytest.raises(
                EngineError, match=r"runs 4 tokenizer workers.*--tokenizer-worker-num 1"
            ):
                await bring(EnginePool(engines), tmp_path, 1)

    run(conversation())


def test_back_pressure_and_slow_health_are_not_death(tmp_path):
    """Trap 10. The pool waits them out, also under supervision."""
    server = FakeSGLang(traps=("slow_health",))

    def probes():
        return [route for route, _ in server.bodies].count("/health_generate")

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            async with supervised(pool, probe_seconds=5.0):
                await bring(pool, tmp_path, 1)
                await until(lambda: probes() > 1)
                assert pool.states[server.url] == "ready"
            server.traps = {"busy_health"}
            async with supervised(pool, interval_seconds=3.0):
                completions = await asyncio.gather(
                    *(pool.generate(PROMPT, Sampling(2), 30) for _ in range(4))
                )
                assert {len(completion.output_ids) for completion in completions} == {
                    2
                } and pool.states[server.url] == "ready"
                assert probes() > 2

    run(conversation())


def test_an_engine_that_is_busy_for_ever_is_left_and_taken_back(tmp_path):
    server = FakeSGLang()

    async def conversation():
        async with fakes(server, FakeSGLang()) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            server.traps = {"busy_health", "update_half"}
            async with supervised(pool, interval_seconds=0.02):
                await until(lambda: pool.states[server.url] == "suspect")
                server.traps.clear()
                await until(lambda: pool.states[server.url] == "ready")
            assert server.value == 1

    run(conversation())


def test_rids_are_unique_hexadecimal_numbers_of_one_length_so_that_no_prefix_matches_another(
    tmp_path,
):
    server = FakeSGLang()

    async def conversation():
        async with fakes(server) as engines:
            await asyncio.gather(*(engines[0].generate(PROMPT, Sampling(1), 30) for _ in range(20)))

    run(conversation())
    rids = [body["rid"] for route, body in server.bodies if route == "/generate"]
    assert (
        len(set(rids)) == 20
        and {len(rid) for rid in rids} == {32}
        and all(int(rid, 16) >= 0 for rid in rids)
    )


@pytest.mark.parametrize("version", ["0.5.8", "0.4.10.post2", "", "main"])
def test_a_server_that_is_too_old_or_unknown_is_refused_by_name(tmp_path, version):
    server = FakeSGLang(version)

    async def conversation():
        async with fakes(server) as engines:
            with pytest.raises(
                EngineError,
                match=(
                    f"{server.url} runs SGLang {version or 'of unknown version'}; weight updates"
                    " need 0.5.9 or newer"
                ),
            ):
                await bring(EnginePool(engines), tmp_path, 1)

    run(conversation())
    assert {route for route, _ in server.bodies} == {"/server_info"}  # nothing was changed there


@pytest.mark.parametrize(
    "version, spans",
    [
        ("0.5.9", False),
        ("0.5.15", False),
        ("0.5.23", True),
        ("0.5.24.dev1+g12", True),
        ("0.6.0", True),
        ("1.0.0", True),
    ],
)
def test_dialects(version, spans):
    assert dialect_of("http://a", version).version_spans is spans
