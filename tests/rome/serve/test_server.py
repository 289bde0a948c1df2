"""The control plane of SGLang's protocol: aborts, pauses, bad requests, information and weight
updates, on a real `launch.serve` process.
"""

import asyncio

import numpy as np
import pytest

from rome.model.hf.checkpoint import save_hf
from tests.rome.serve.talk import PROMPT, Missed, compilations, logprobs_of, talk
from tests.rome.serve.tiny import CONTEXT, SLOTS, Oracle, make_checkpoint, make_config, make_params

V = make_config().vocab_size

# -- abort and pause
# -------------------------------------------------------------------------------------------------


async def aborted(task):
    """The answer of a request that was aborted; Missed if it had ended before."""
    answer = await task
    if answer["meta_info"]["finish_reason"]["type"] == "length":
        raise Missed
    return answer


def test_abort_ends_the_requests_whose_id_begins_so_with_what_they_have(server):
    async def conversation(http):
        tasks = {
            rid: asyncio.ensure_future(http.generate([5, 6], rid=rid, max_new_tokens=400))
            for rid in ("aa1", "aa2", "ab1")
        }
        await http.until(lambda figures: figures["running"] == 3)
        await http.post("/abort_request", {"rid": "aa"})
        return {rid: await (task if rid == "ab1" else aborted(task)) for rid, task in tasks.items()}

    answers = talk(server, conversation)
    for rid in ("aa1", "aa2"):
        assert (
            answers[rid]["meta_info"]["finish_reason"]["type"] == "abort"
            and 0 < len(answers[rid]["output_ids"]) < 400
        )
    assert len(answers["ab1"]["output_ids"]) == 400


def test_abort_all_also_ends_requests_in_line(server):
    async def conversation(http):
        tasks = [
            asyncio.ensure_future(http.generate([5, 6], max_new_tokens=400))
            for _ in range(SLOTS + 3)
        ]
        await http.until(lambda figures: figures["running"] == SLOTS and figures["waiting"] == 3)
        await http.post("/abort_request", {"abort_all": True})
        return await asyncio.gather(*map(aborted, tasks))

    assert {
        answer["meta_info"]["finish_reason"]["type"] for answer in talk(server, conversation)
    } == {"abort"}


def test_a_client_that_goes_away_frees_its_slot(server):
    async def conversation(http):
        task = asyncio.ensure_future(http.generate([5, 6], max_new_tokens=500))
        await http.until(lambda figures: figures["running"] == 1)
        task.cancel()
        before = await http.until(lambda figures: figures["running"] == 0)
        return before["generated_tokens"], (await http.figures())["generated_tokens"]

    before, after = talk(server, conversation)
    assert before == after


def test_a_request_with_the_id_of_one_that_runs_is_refused(server):
    """As in SGLang; an abort by that id would otherwise end both."""

    async def conversation(http):
        task = asyncio.ensure_future(http.generate([5, 6], rid="twice", max_new_tokens=400))
        await http.until(lambda figures: figures["running"] == 1)
        refused = await http.post("/generate", {"input_ids": [1], "rid": "twice"})
        await http.post("/abort_request", {"rid": "twice"})
        await aborted(task)
        return refused, await http.generate([5, 6], rid="twice", max_new_tokens=2)

    (status, answer), again = talk(server, conversation)
    assert (status, answer["error"]["message"]) == (400, "Duplicate request ID detected: twice")
    assert len(again["output_ids"]) == 2


async def pause_amid_a_request(http, mode, **sampling):
    task = asyncio.ensure_future(http.generate(**sampling))
    await http.until(lambda figures: figures["running"] == 1)
    status, answer = await http.post("/pause_generation", {"mode": mode})
    assert status == 200 and answer["status"] == "ok"
    await asyncio.sleep(0.05)
    if task.done():  # it ended before the pause took hold
        await http.post("/continue_generation")
        raise Missed
    return task


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_request_goes_on_to_the_same_tokens(server, mode):
    async def conversation(http):
        undisturbed = await http.generate(sampling_seed=6, max_new_tokens=300, temperature=0.8)
        task = await pause_amid_a_request(
            http, mode, sampling_seed=6, max_new_tokens=300, temperature=0.8
        )
        stopped = (await http.figures())["generated_tokens"]
        late = asyncio.ensure_future(http.generate([1, 2, 3]))
        await asyncio.sleep(0.1)
        assert (await http.figures())["generated_tokens"] == stopped and not late.done()
        await http.post("/continue_generation")
        await late
        return undisturbed, await task

    undisturbed, paused = talk(server, conversation)
    assert paused["output_ids"] == undisturbed["output_ids"]
    np.testing.assert_allclose(logprobs_of(paused), logprobs_of(undisturbed), atol=1e-4)


def test_pause_by_abort_returns_partial_output_and_holds_new_requests(server):
    async def conversation(http):
        task = asyncio.ensure_future(http.generate([5, 6], max_new_tokens=400))
        await http.until(lambda figures: figures["running"] == 1)
        await http.post("/pause_generation")
        await task
        late = asyncio.ensure_future(http.generate([1, 2, 3]))
        done, _ = await asyncio.wait([late], timeout=0.1)
        assert not done
        await http.post("/continue_generation")
        return await aborted(task), await late

    partial, late = talk(server, conversation)
    assert (
        partial["meta_info"]["finish_reason"]["type"] == "abort"
        and 0 < len(partial["output_ids"]) < 400
    )
    assert len(late["output_ids"]) == 12


def test_the_cache_is_not_flushed_under_a_running_request(server):
    async def conversation(http):
        task = asyncio.ensure_future(http.generate([5, 6], max_new_tokens=400))
        await http.until(lambda figures: figures["running"] == 1)
        status, answer = await http.post("/flush_cache")
        await task
        return status, answer, (await http.post("/flush_cache"))[0]

    status, answer, idle_status = talk(server, conversation)
    assert status == 400 and "in flight" in answer["error"]["message"] and idle_status == 200


# -- bad input
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, words",
    [
        (
            {"input_ids": [1] * (CONTEXT + 1)},
            f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}",
        ),
        ({"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 20}}, "ask for at most 12"),
        ({"input_ids": [V]}, f"token id {V} is outside the vocabulary of {V}"),
        ({"input_ids": []}, "must not be empty"),
        ({"input_ids": [[1], []]}, "the prompt is empty"),
        ({"input_ids": [1.5]}, "integers only"),
        ({"input_ids": [1], "text": "a"}, "not both"),
        ({}, "either input_ids or text"),
        (
            {"input_ids": [1], "sampling_params": {"temprature": 1.0}},
            "'temprature' = 1.0 is not supported",
        ),
        (
            {"input_ids": [1], "sampling_params": {"stop_regex": "a"}},
            "'stop_regex' = 'a' is not supported",
        ),
        ({"input_ids": [1], "sampling_params": {"n": 0}}, "n must be from 1 to 128, got 0"),
        (
            {"input_ids": [1], "routed_experts_start_len": 2},
            "routed_experts_start_len must be from 0 to the 1 tokens of the prompt, got 2",
        ),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature must be 0"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p must be in (0, 1]"),
        (
            {"input_ids": [1], "sampling_params": {"stop_token_ids": ["a"]}},
            "stop_token_ids must be an integer",
        ),
        ({"input_ids": [1], "lora_path": "x"}, "no adapter 'x' is loaded"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "Duplicate request ID detected: a"),
        ({"input_ids": [1], "sampling_params": {"stop": 5}}, "stop must be a string or a list"),
        ({"input_ids": [1], "top_logprobs_num": 3}, "'top_logprobs_num' = 3 is not supported"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(server, body, words):
    status, answer = talk(server, lambda http: http.post("/generate", body))
    assert status == 400 and words in answer["error"]["message"]


def test_what_is_not_json_or_no_route_gets_an_error_in_the_same_shape(server):
    async def conversation(http):
        answers = []
        for data in (b"{", b"[" * 100_000, b"\xff\xfe", b"[]"):
            async with http.session.post(http.url + "/generate", data=data) as response:
                answers.append((response.status, await response.json()))
        return answers, await http.post("/nothing")

    answers, (missing_status, missing) = talk(server, conversation)
    for status, answer in answers:
        assert status == 400 and "JSON" in answer["error"]["message"]
    assert missing_status == 404 and missing["error"]["message"]


@pytest.mark.parametrize(
    "route, field",
    [
        ("/generate", "input_ids"),
        ("/abort_request", "rid"),
        ("/abort_request", "abort_all"),
        ("/pause_generation", "mode"),
        ("/update_weights_from_disk", "model_path"),
        ("/update_weights_from_disk", "flush_cache"),
        ("/weights_checker", "action"),
        ("/get_weights_by_name", "name"),
        ("/get_weights_by_name", "truncate_size"),
        ("/release_memory_occupation", "tags"),
    ],
)
def test_a_field_of_another_type_is_a_bad_request_on_every_route(server, route, field):
    needed = {"model_path": "/nowhere", "name": "lm_head.weight", "rid": "nobody"}

    async def conversation(http):
        return [
            await http.post(route, needed | {field: value})
            for value in (5.5, "\0", ["x"], [["x"]], {"x": 1}, "\ud800", 10**30)
        ]

    for status, answer in talk(server, conversation):
        # A text may name an id that nobody has, and a large number of rows is all of them.
        may_be_done = field in ("rid", "truncate_size")
        assert status == 400 or (status == 200 and may_be_done)
        assert status == 200 or answer.get("error", answer)["message"]


# -- information and weights
# -------------------------------------------------------------------------------------------------


def test_information_under_its_new_and_old_names(server, checkpoint):
    async def conversation(http):
        return {
            route: await http.ask("GET", route)
            for route in (
                "/health",
                "/health_generate",
                "/model_info",
                "/get_model_info",
                "/server_info",
                "/get_server_info",
                "/v1/models",
            )
        }

    answers = talk(server, conversation)
    assert {status for status, _ in answers.values()} == {200}
    assert answers["/model_info"] == answers["/get_model_info"]
    assert (
        answers["/model_info"][1]["model_path"] == str(checkpoint)
        and answers["/model_info"][1]["is_generation"] is True
    )
    assert (
        answers["/server_info"][1]["version"]
        and answers["/v1/models"][1]["data"][0]["max_model_len"] == CONTEXT
    )


def test_a_weight_is_given_by_its_checkpoint_name(server):
    async def conversation(http):
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        return (await http.post("/get_weights_by_name", {"name": name, "truncate_size": 3}))[
            1
        ], await http.post("/get_weights_by_name", {"name": "x"})

    rows, (status, _) = talk(server, conversation)
    np.testing.assert_allclose(rows, make_params(0)["layers"]["moe"]["down"][1, 2].T[:3], rtol=1e-6)
    assert status == 400


def broken_checkpoints(directory):
    """Directories that are refused before they are read, each with words of the reason."""
    config, params = make_config(), make_params(1)
    save_hf(params, config, directory / "truncated")
    file = directory / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    make_checkpoint(directory / "theta", seed=1)
    (directory / "theta" / "config.json").write_text(
        (directory / "theta" / "config.json").read_text().replace("10000.0", "20000.0")
    )
    return {
        "absent": "missing",
        "truncated": "",
        "theta": "rope_theta 20000.0 (was 10000.0)",
    }


def test_a_failed_update_keeps_the_old_weights(server, tmp_path):
    reasons = broken_checkpoints(tmp_path)

    async def conversation(http):
        before = await http.generate(sampling_seed=9)
        for name, words in reasons.items():
            status, answer = await http.post(
                "/update_weights_from_disk",
                {"model_path": str(tmp_path / name), "weight_version": "99"},
            )
            said = answer["message"]
            assert status == 400 and answer["success"] is False, (name, answer)
            assert said.startswith("kept the old weights") and words in said, (name, answer)
        return (
            before,
            await http.generate(sampling_seed=9),
            (await http.ask("GET", "/model_info"))[1],
        )

    before, after, info = talk(server, conversation)
    assert before["output_ids"] == after["output_ids"] and logprobs_of(before) == logprobs_of(after)
    assert info["weight_version"] == after["meta_info"]["weight_version"] == "0"


def test_an_update_that_fails_midway_leaves_no_weights_and_the_next_one_serves_again(
    server, checkpoint, tmp_path
):
    params = make_params(1)
    params["norm"]["scale"] = params["norm"]["scale"] * np.nan
    save_hf(params, make_config(), tmp_path)

    async def conversation(http):
        before = await http.generate(sampling_seed=9)
        running = asyncio.ensure_future(
            http.post(
                "/generate",
                {
                    "input_ids": PROMPT,
                    "sampling_params": {"max_new_tokens": 460, "ignore_eos": True},
                },
            )
        )
        await http.until(lambda figures: figures["running"] == 1)
        await http.post("/pause_generation", {"mode": "in_place"})
        bad = {"model_path": str(tmp_path), "weight_version": "99"}
        said = await http.post("/update_weights_from_disk", bad)
        later = await http.post("/generate", {"input_ids": PROMPT})
        resumed = await http.post("/continue_generation")
        hashed = await http.post("/weights_checker", {"action": "checksum"})
        state = (await http.ask("GET", "/server_info"))[1]["internal_states"][0]
        good = {"model_path": str(checkpoint), "weight_version": "0"}
        assert (await http.post("/update_weights_from_disk", good))[0] == 200
        assert (await http.post("/continue_generation"))[0] == 200
        after = await http.generate(sampling_seed=9)
        return before, after, state, [said, await running, later, resumed, hashed]

    before, after, state, answers = talk(server, conversation)
    assert [status for status, _ in answers] == [400, 503, 503, 400, 400]
    assert all("failed midway (ValueError: " in str(answer) for _, answer in answers)
    assert "norm/scale is not finite" in state["refuses"] and state["released"] == ["weights"]
    assert before["output_ids"] == after["output_ids"] and logprobs_of(before) == logprobs_of(after)
    assert after["meta_info"]["weight_version"] == "0"


def test_an_update_changes_version_checksum_and_outputs_and_forgets_the_cached_prefix(
    server, checkpoint, other_checkpoint
):
    new = Oracle.load(other_checkpoint)

    async def update(http, path, version):
        status, answer = await http.post(
            "/update_weights_from_disk", {"model_path": str(path), "weight_version": version}
        )
        assert status == 200 and answer["success"] is True
        return (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]

    async def conversation(http):
        old_sums = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
        before = await http.generate(sampling_seed=9)
        new_sums = await update(http, other_checkpoint, "7")
        after, version = (
            await http.generate(sampling_seed=9),
            (await http.ask("GET", "/model_info"))[1]["weight_version"],
        )
        return (
            old_sums,
            before,
            new_sums,
            after,
            version,
            await update(http, checkpoint, "0"),
            await http.generate(sampling_seed=9),
        )

    old_sums, before, new_sums, after, version, restored_sums, restored = talk(server, conversation)
    assert (
        version == after["meta_info"]["weight_version"] == "7"
        and after["meta_info"]["cached_tokens"] == 0
    )
    np.testing.assert_allclose(
        logprobs_of(after), new.logprobs(PROMPT + after["output_ids"])[len(PROMPT) - 1 :], atol=1e-4
    )
    assert old_sums == restored_sums != new_sums
    assert before["output_ids"] == restored["output_ids"] != after["output_ids"]


@pytest.mark.parametrize(
    "mode, flush", [("in_place", False), ("in_place", True), ("retract", True), (None, True)]
)
def test_an_update_amid_a_request_is_told_by_spans_and_fresh_caches_give_the_new_weights_logprobs(
    server, checkpoint, other_checkpoint, oracle, mode, flush
):
    new = Oracle.load(other_checkpoint)

    async def conversation(http):
        task = asyncio.ensure_future(http.generate(PROMPT[:8], sampling_seed=4, max_new_tokens=480))
        await http.until(lambda figures: figures["running"] == 1)
        if mode:
            await http.post("/pause_generation", {"mode": mode})
        await http.post(
            "/update_weights_from_disk",
            {"model_path": str(other_checkpoint), "weight_version": "1", "flush_cache": flush},
        )
        if mode:
            await http.post("/continue_generation")
        answer = await task
        await http.post(
            "/update_weights_from_disk", {"model_path": str(checkpoint), "weight_version": "0"}
        )
        return answer

    meta = (answer := talk(server, conversation))["meta_info"]
    first, second = meta["weight_versions"]
    assert (first["version"], second["version"]) == ("0", "1") and meta["weight_version"] == "1"
    assert first["start"] == 0 and 0 < first["end"] == second["start"] and second["end"] == 480
    ids = (PROMPT[:8] + answer["output_ids"])[:128]
    border = min(first["end"], 100)
    np.testing.assert_allclose(
        logprobs_of(answer)[:border], oracle.logprobs(ids)[7 : 7 + border], atol=1e-4
    )
    if flush and first["end"] < 100:
        np.testing.assert_allclose(
            logprobs_of(answer)[first["end"] : 100],
            new.logprobs(ids)[7 + first["end"] : 107],
            atol=1e-4,
        )


def test_nothing_was_compiled_after_the_start(server):
    """Runs last in this module: everything above used the programs that the start compiled."""
    assert server.compilations > 0  # the log does tell
    assert compilations(server) == server.compilations
