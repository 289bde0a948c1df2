"""Each trap of SGLang that is known, on a server that has it: what the client and the pool do
there.
"""

import asyncio
import contextlib

import pytest

from rome.engine import publish
from rome.engine.client import Engine, EngineError, Sampling, dialect_of
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights
from rome.engine.supervise import supervise
from tests.rome.engine.fake_sglang import FakeSGLang, fakes, logprobs_of, make_weights

PROBE = list(range(20, 40))
PROMPT = [5, 6, 7]


def run(conversation, seconds=30):
    asyncio.run(asyncio.wait_for(conversation, seconds))


async def bring(pool, tmp_path, version, value=None, **options):
    value = version if value is None else value
    path = make_weights(tmp_path / f"step_{version}", value)
    return await publish_weights(path, version, pool, PROBE, logprobs_of(value, PROBE), **options)


@contextlib.asynccontextmanager
async def supervised(pool, interval_s=0.05, probe_s=3.0):
    task = asyncio.create_task(supervise(pool, interval_s=interval_s, probe_s=probe_s))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        assert not task.done()  # it never ends by itself
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(claim, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.01)


def assert_by_one_version_each(completion, prompt, value_of=lambda version: version or 1):
    """Every token and its logprob come from the weights that its span names: no stale cache, no
    stale weights, nothing lost.
    """
    places = [place for _, start, end in completion.versions for place in range(start, end)]
    assert places == list(range(len(completion.output_ids)))
    for version, start, end in completion.versions:
        for place in range(start, end):
            value, token = value_of(version), completion.output_ids[place]
            assert token == value % 1000 + len(prompt) + place
            assert (
                completion.logprobs[place]
                == logprobs_of(value, (prompt + completion.output_ids)[: len(prompt) + place + 1])[
                    -1
                ]
            )


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
            assert proven or "probe logprobs differ" in pool.causes[server.url]
            moved = any(
                body["sampling_params"]["max_new_tokens"] > 1
                for route, body in other.bodies
                if route == "/generate"
            )
            assert moved != proven

    run(conversation())


@pytest.mark.parametrize(
    "trap, cause",
    [("update_half", "answered 400: size mismatch"), ("update_says_yes", "probe logprobs differ")],
)
def test_an_engine_whose_update_is_not_proven_is_left_alone_while_another_one_goes_on(
    tmp_path, trap, cause
):
    """Traps 4 and 5: a failed update does not roll back, and one that says success may have kept
    the old weights.
    """
    bad, good = FakeSGLang(traps=(trap,)), FakeSGLang()

    async def conversation():
        async with fakes(bad, good) as engines:
            pool = EnginePool(engines)
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
        async with fakes(
            FakeSGLang(traps=("update_half",)), FakeSGLang(traps=("update_says_yes",))
        ) as engines:
            with pytest.raises(
                EngineError, match="(?s)no engine is left: .*size mismatch.*probe logprobs differ"
            ):
                await bring(EnginePool(engines), tmp_path, 7)

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

    completions = asyncio.run(asyncio.wait_for(conversation(), 30))
    assert (server.stale_hits == 0) == salted
    if salted:
        for completion in completions:
            assert_by_one_version_each(completion, PROMPT)


def test_several_tokenizer_workers_are_refused_by_name(tmp_path):
    """Trap 9: a pause and an update would meet different ones."""

    async def conversation():
        async with fakes(FakeSGLang(tokenizer_worker_num=4)) as engines:
            with pytest.raises(
                EngineError, match="runs 4 tokenizer workers.*--tokenizer-worker-num 1"
            ):
                await bring(EnginePool(engines), tmp_path, 1)

    run(conversation())


def test_back_pressure_and_slow_health_are_not_death(tmp_path):
    """Trap 10. The pool waits them out, also under supervision."""
    server = FakeSGLang(traps=("slow_health",))

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            async with supervised(pool, probe_s=5.0):
                await bring(pool, tmp_path, 1)
                probes = lambda: [route for route, _ in server.bodies].count("/health_generate")
                await until(lambda: probes() > 1)
                assert pool.states[server.url] == "ready"
            server.traps = {"busy_health"}
            async with supervised(pool, interval_s=3.0):
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
            async with supervised(pool, interval_s=0.02):
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
    assert dialect_of("http://a", version).spans is spans


# -- the pool's states
# -------------------------------------------------------------------------------------------------


def test_an_engine_that_hangs_is_noticed_and_its_requests_go_on_elsewhere_from_what_they_had(
    tmp_path,
):
    hanging, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(hanging, good) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 3)
            async with supervised(pool, probe_s=0.5):
                tasks = [
                    asyncio.ensure_future(pool.generate(PROMPT, Sampling(100), 30))
                    for _ in range(4)
                ]
                await until(lambda: hanging.running and good.running)
                for request in hanging.running.values():  # frozen, as by SIGSTOP
                    request["finish"] = None
                hanging.traps.add("hangs")
                hanging.paused = "in_place"
                for completion in await asyncio.gather(*tasks):
                    assert len(completion.output_ids) == 100
                    assert_by_one_version_each(completion, PROMPT)
                assert (
                    pool.states[hanging.url] in ("suspect", "starting")
                    and "did not answer its health probe within 0.5 s" in pool.causes[hanging.url]
                )
                hanging.traps.clear()
                await until(lambda: pool.states[hanging.url] == "ready")

    run(conversation())


def test_a_partial_answer_of_one_engine_is_gone_on_with_by_another_one(tmp_path):
    """The first part comes from the engine that then fails its update; its tokens stay, with their
    version.
    """
    bad, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(bad, good) as engines:
            pool = EnginePool(engines)
            task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(50), 30))
            await until(lambda: any(len(request["ids"]) > 5 for request in bad.running.values()))
            bad.traps.add("update_half")
            await bring(pool, tmp_path, 9)
            completion = await task
            assert [version for version, _, _ in completion.versions] == [
                0,
                9,
            ] and completion.versions[0][2] > 5
            assert_by_one_version_each(completion, PROMPT)
            second = [
                body
                for route, body in good.bodies
                if route == "/generate" and body["sampling_params"]["max_new_tokens"] > 1
            ][0]
            assert (
                second["input_ids"] == PROMPT + completion.output_ids[: completion.versions[0][2]]
            )

    run(conversation())


def test_an_engine_that_was_started_anew_unseen_is_found_out_by_its_versions_and_brought_back(
    tmp_path,
):
    """Between two health probes: its answers carry weights that were not proven there, and none of
    them is used.
    """
    server, other = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(server, other) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 5)
            await server.crash()
            await server.start()
            completions = await asyncio.gather(
                *(pool.generate(PROMPT, Sampling(3), 30) for _ in range(6))
            )
            assert {completion.versions[0][0] for completion in completions} == {5}
            assert (
                pool.states[server.url] == "suspect"
                and "answered with weights 'default'; proven there were 5"
                in pool.causes[server.url]
            )
            async with supervised(pool):
                await until(lambda: pool.states[server.url] == "ready")
            assert server.weight_version == "5"

    run(conversation())


def test_a_late_joiner_serves_only_when_it_has_the_current_weights(tmp_path):
    first, late = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(first, late) as (engine, joining):
            pool = EnginePool([engine])
            await bring(pool, tmp_path, 5)
            pool.join(joining)
            await asyncio.gather(*(pool.generate(PROMPT, Sampling(2), 30) for _ in range(4)))
            assert late.bodies == [] and pool.states[late.url] == "starting"
            with pytest.raises(ValueError, match="has an engine at"):
                pool.join(joining)
            async with supervised(pool):
                await until(lambda: pool.states[late.url] == "ready")
            assert late.weight_version == "5"
            completions = await asyncio.gather(
                *(pool.generate(PROMPT, Sampling(2), 30) for _ in range(4))
            )
            assert {completion.versions[0][0] for completion in completions} == {
                5
            } and "/generate" in dict(late.bodies)

    run(conversation())


def test_a_url_engine_that_died_is_taken_back_when_it_answers_again_and_requests_wait_for_it(
    tmp_path,
):
    server = FakeSGLang()

    async def conversation():
        async with fakes(server) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 5)
            async with supervised(pool):
                task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(50), 30))
                await until(lambda: server.running)
                await server.crash()
                await until(lambda: pool.states[server.url] == "dead")
                waiting = asyncio.ensure_future(pool.generate(PROMPT, Sampling(2), 30))
                with pytest.raises(
                    EngineError, match="no engine came back within 0 s: .*" + server.url
                ):
                    await pool.generate(PROMPT, Sampling(2), 0.1)
                await server.start()
                for completion in await asyncio.gather(task, waiting):
                    assert [version for version, _, _ in completion.versions] == [5]

    run(conversation())


def test_a_straggler_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "STRAGGLER_SECONDS", 0.3)
    hanging, good = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(hanging, good) as engines:
            pool = EnginePool(engines)
            hanging.traps.add("hangs")
            published = await bring(pool, tmp_path, 2)
            assert (
                published.engines == 1 and "did not take weights 2 in time" in published.failed[0]
            )
            assert (await pool.generate(PROMPT, Sampling(2), 30)).versions == [(2, 0, 2)]

    run(conversation())


def test_a_slow_engine_gets_fewer_requests(tmp_path):
    slow, fast = FakeSGLang(), FakeSGLang()

    async def conversation():
        async with fakes(slow, fast) as engines:
            pool = EnginePool(engines)
            slow.traps.add("hangs")
            stuck = [
                asyncio.ensure_future(pool.generate(PROMPT, Sampling(1), 30)) for _ in range(4)
            ]
            await until(
                lambda: sum(pool.in_flight.values()) == 2
            )  # the fast one has answered its two
            for _ in range(10):
                await pool.generate(PROMPT, Sampling(1), 30)
            assert len([1 for route, _ in slow.bodies if route == "/generate"]) == 2
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    run(conversation())


def test_memory_is_lent_to_the_learner_and_nothing_is_sampled_before_weights_are_proven_again(
    tmp_path,
):
    servers = [FakeSGLang(), FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            async with supervised(pool):
                task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(30), 30))
                await until(lambda: servers[0].running or servers[1].running)
                await pool.lend(2)
                assert all(server.released == {"weights", "kv_cache"} for server in servers)
                await asyncio.sleep(0.2)
                assert not task.done() and set(pool.states.values()) == {"lent"}
                await pool.take_back()
                assert all(server.released == set() for server in servers)
                await asyncio.sleep(0.1)
                assert not task.done()
                await bring(pool, tmp_path, 2)
                completion = await task
                assert [version for version, _, _ in completion.versions] in ([1, 2], [2])
                assert_by_one_version_each(completion, PROMPT)

    run(conversation())


def test_what_an_engine_was_sampling_when_it_is_lent_goes_on_on_another_one_from_its_tokens(
    tmp_path,
):
    servers = [FakeSGLang(), FakeSGLang()]

    async def conversation():
        async with fakes(*servers) as engines:
            pool = EnginePool(engines)
            await bring(pool, tmp_path, 1)
            async with supervised(pool):
                tasks = [
                    asyncio.ensure_future(
                        pool.generate(PROMPT, Sampling(30), 30, affinity=str(number))
                    )
                    for number in range(4)
                ]
                await until(lambda: servers[0].running and servers[1].running)
                await pool.lend(1)
                assert (pool.states[engines[0].url], pool.states[engines[1].url]) == (
                    "ready",
                    "lent",
                )
                assert servers[1].released == {"weights", "kv_cache"} and not servers[0].released
                for completion in await asyncio.gather(*tasks):
                    assert_by_one_version_each(completion, PROMPT)
                await pool.take_back()
                assert pool.states[engines[1].url] == "updating" and servers[1].released == set()
                await bring(pool, tmp_path, 2)
                assert set(pool.states.values()) == {"ready"}

    run(conversation())
