"""SGLang's protocol, spoken by a real `launch.serve` process; numbers against the plain forward pass."""

import asyncio
import base64
import json
import random

import aiohttp
import numpy as np
import pytest

from rome.model.hf import save_hf
from rome.model.tokenizer import Tokenizer
from tests.rome.serve.tiny import CHUNK, CONTEXT, LAYERS, SLOTS, TOKENIZER, TOP_K, Oracle, make_checkpoint, make_config, make_params, serve

PROMPT = [(7 * i) % 200 + 3 for i in range(40)]  # two whole chunks and a half
V = make_config().vocab_size
EOS = make_config().eos_token_id


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "b", seed=1)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with serve(checkpoint, tmp_path_factory.mktemp("log") / "serve.log", environment={"JAX_LOG_COMPILES": "1"}) as running:
        running.compilations = compilations(running)
        yield running


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return Oracle.load(checkpoint)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TOKENIZER)


def compilations(server) -> int:
    return server.log_path.read_text().count("Finished XLA compilation")


class Http:
    """One client session; every call has a deadline."""

    def __init__(self, server):
        self.url = server.url

    async def __aenter__(self):
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    async def ask(self, method, route, body=None):
        async with self.session.request(method, self.url + route, json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def post(self, route, body=None):
        return await self.ask("POST", route, body or {})

    async def generate(self, ids=PROMPT, **sampling):
        fields = {name: sampling.pop(name) for name in ("rid", "logprob_start_len", "return_routed_experts") if name in sampling}
        status, answer = await self.post("/generate", {
            "input_ids": ids, "return_logprob": True, "sampling_params": {"max_new_tokens": 12, "ignore_eos": True} | sampling, **fields,
        })
        assert status == 200, answer
        return answer

    async def figures(self):
        return (await self.ask("GET", "/server_info"))[1]["internal_states"][0]

    async def until(self, condition):
        for _ in range(2000):
            figures = await self.figures()
            if condition(figures):
                return figures
            await asyncio.sleep(0.003)
        raise AssertionError(f"never came true: {figures}")


def talk(server, conversation):
    async def run():
        async with Http(server) as http:
            return await conversation(http)

    return asyncio.run(run())


def logprobs_of(answer):
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


# -- numbers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_sampled_tokens_equal_the_plain_forward_pass(server, oracle, temperature):
    answer = talk(server, lambda http: http.generate(max_new_tokens=40, temperature=temperature))
    ids = answer["output_ids"]
    assert len(ids) == 40 and [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == ids
    np.testing.assert_allclose(logprobs_of(answer), oracle.logprobs(PROMPT + ids, temperature)[len(PROMPT) - 1:], atol=1e-4)


def test_logprobs_of_a_prompt_equal_the_plain_forward_pass(server, oracle):
    answer = talk(server, lambda http: http.generate(max_new_tokens=0, logprob_start_len=0))
    entries = answer["meta_info"]["input_token_logprobs"]
    assert answer["output_ids"] == [] and [entry[1] for entry in entries] == PROMPT and entries[0][0] is None
    np.testing.assert_allclose([entry[0] for entry in entries[1:]], oracle.logprobs(PROMPT), atol=1e-4)
    tail = talk(server, lambda http: http.generate(max_new_tokens=1, logprob_start_len=30))["meta_info"]["input_token_logprobs"]
    assert tail == entries[30:]


def test_temperature_zero_takes_the_likeliest_token(server, oracle):
    ids = talk(server, lambda http: http.generate(temperature=0))["output_ids"]
    logits_TV, _ = oracle.logits_and_routes(PROMPT + ids)
    assert ids == logits_TV[len(PROMPT) - 1:-1].argmax(-1).tolist()


def test_routes_equal_the_plain_forward_pass_also_for_cached_tokens(server, oracle):
    async def twice(http):
        return [await http.generate(return_routed_experts=True, seed=None, sampling_seed=5) for _ in range(2)]

    for answer in talk(server, twice):
        ids = PROMPT + answer["output_ids"]
        routes = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32).reshape(len(ids) - 1, LAYERS, TOP_K)
        assert np.array_equal(routes, oracle.logits_and_routes(ids)[1][:-1])
    assert answer["meta_info"]["cached_tokens"] == 2 * CHUNK


def test_a_seeded_request_gives_the_same_bits_alone_in_a_crowd_and_with_a_warm_cache(server):
    rng = random.Random(0)

    def crowd_member(http, number):
        shared = PROMPT[:rng.randrange(1, 40)]
        ids = shared + [rng.randrange(V) for _ in range(rng.randrange(0, 60))]
        more = rng.choice([{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.5}, {"logprob_start_len": 0}])
        return http.generate(ids, max_new_tokens=rng.randrange(1, 60), **more)

    async def conversation(http):
        await http.post("/flush_cache")
        alone = await http.generate(sampling_seed=11, max_new_tokens=60)
        warm = await http.generate(sampling_seed=11, max_new_tokens=60)
        await http.post("/flush_cache")
        answers = await asyncio.gather(*(
            http.generate(sampling_seed=11, max_new_tokens=60) if number in (0, 17, 29) else crowd_member(http, number) for number in range(30)
        ))
        return [alone, warm, answers[0], answers[17], answers[29]]

    answers = talk(server, conversation)
    assert answers[0]["meta_info"]["cached_tokens"] == 0 and answers[1]["meta_info"]["cached_tokens"] == 2 * CHUNK
    for answer in answers[1:]:
        assert answer["output_ids"] == answers[0]["output_ids"]
        assert logprobs_of(answer) == logprobs_of(answers[0])


def test_seeds_differ_and_requests_without_a_seed_differ(server):
    async def conversation(http):
        return [await http.generate(**options) for options in ({"sampling_seed": 1}, {"sampling_seed": 2**32 + 1}, {}, {})]

    outputs = [tuple(answer["output_ids"]) for answer in talk(server, conversation)]
    assert len(set(outputs)) == 4


def test_a_later_turn_reuses_the_prefix_that_was_prefilled_and_nothing_that_was_decoded(server, oracle):
    async def conversation(http):
        first = await http.generate(max_new_tokens=50, sampling_seed=3)
        turn = PROMPT + first["output_ids"] + [9, 10, 11]
        return turn, await http.generate(turn, sampling_seed=4)

    turn, answer = talk(server, conversation)
    assert answer["meta_info"]["cached_tokens"] == 2 * CHUNK
    np.testing.assert_allclose(logprobs_of(answer), oracle.logprobs(turn + answer["output_ids"])[len(turn) - 1:], atol=1e-4)


def test_requests_that_arrive_together_share_the_work_of_their_common_prompt(server, oracle):
    async def conversation(http):
        before, groups = (await http.figures())["prefill_tokens"], []
        for offset in (0, 10):  # the second group finds the prompt in a slot that one of it may overwrite
            groups.append(await asyncio.gather(*(http.generate(prompt, sampling_seed=number + offset) for number in range(SLOTS))))
        return groups, (await http.figures())["prefill_tokens"] - before

    prompt = [random.randrange(V) for _ in range(3 * CHUNK + 2)]
    groups, computed = talk(server, conversation)
    assert computed == 3 * CHUNK + 2 * SLOTS * 2
    cached = [sorted(answer["meta_info"]["cached_tokens"] for answer in group) for group in groups]
    assert cached == [[0] + (SLOTS - 1) * [3 * CHUNK], SLOTS * [3 * CHUNK]]
    for answer in sum(groups, []):
        np.testing.assert_allclose(logprobs_of(answer), oracle.logprobs(prompt + answer["output_ids"])[len(prompt) - 1:], atol=1e-4)


# -- ends ----------------------------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_output_and_belongs_to_it(server):
    async def conversation(http):
        free = await http.generate(sampling_seed=1, max_new_tokens=20)
        stop = free["output_ids"][9]
        return free, stop, await http.generate(sampling_seed=1, max_new_tokens=20, stop_token_ids=[stop])

    free, stop, answer = talk(server, conversation)
    assert answer["output_ids"] == free["output_ids"][:free["output_ids"].index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_models_end_token_stops_unless_it_is_ignored(server):
    async def conversation(http):
        seeds = range(60)  # hot enough that some of these many run into the end token
        return [(await http.post("/generate", {
            "input_ids": [PROMPT for _ in seeds],
            "sampling_params": [{"max_new_tokens": 60, "temperature": 5, "sampling_seed": seed, "ignore_eos": ignore} for seed in seeds],
        }))[1] for ignore in (False, True)]

    stopping, ignoring = talk(server, conversation)
    ended = [(a, b) for a, b in zip(stopping, ignoring) if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    for answer, free in ended:
        assert answer["output_ids"] == free["output_ids"][:len(answer["output_ids"])]
        assert answer["output_ids"].index(EOS) == len(answer["output_ids"]) - 1 and len(free["output_ids"]) == 60


def test_a_stop_string_ends_the_output_at_the_first_token_that_completes_it(server, tokenizer):
    async def conversation(http):
        free = await http.generate(sampling_seed=2, max_new_tokens=40)
        text = tokenizer.decode(free["output_ids"])
        stop = text[len(text) // 2:len(text) // 2 + 3]
        return free, text, stop, await http.generate(sampling_seed=2, max_new_tokens=40, stop=["never appears", stop], skip_special_tokens=False)

    free, text, stop, answer = talk(server, conversation)
    ids = answer["output_ids"]
    assert ids == free["output_ids"][:len(ids)]
    assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    assert answer["text"] == text[:text.index(stop)]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_text_in_and_out_is_the_tokenizers(server, tokenizer):
    async def conversation(http):
        return await http.post("/generate", {"text": "echo hello", "sampling_params": {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}})

    status, answer = talk(server, conversation)
    assert status == 200 and answer["meta_info"]["prompt_tokens"] == len(tokenizer.encode("echo hello"))
    assert answer["text"] == tokenizer.decode(answer["output_ids"], skip_special=True)


def test_more_requests_than_slots_are_all_answered_in_full(server):
    async def conversation(http):
        return await asyncio.gather(*(http.generate([number + 1], max_new_tokens=number % 7 + 1) for number in range(4 * SLOTS)))

    answers = talk(server, conversation)
    assert [len(answer["output_ids"]) for answer in answers] == [number % 7 + 1 for number in range(4 * SLOTS)]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"length"}


def test_a_batch_is_answered_in_order_and_like_single_requests(server):
    async def conversation(http):
        prompts = [PROMPT[:n] for n in (5, 20, 33)]
        params = [{"max_new_tokens": n, "sampling_seed": n, "ignore_eos": True} for n in (3, 4, 5)]
        status, batch = await http.post("/generate", {"input_ids": prompts, "sampling_params": params})
        singles = [await http.generate(prompt, **one) for prompt, one in zip(prompts, params)]
        return batch, singles

    batch, singles = talk(server, conversation)
    assert [answer["output_ids"] for answer in batch] == [answer["output_ids"] for answer in singles]


def test_a_context_can_be_filled_to_its_last_token(server):
    answer = talk(server, lambda http: http.generate(max_new_tokens=CONTEXT - len(PROMPT)))
    assert len(PROMPT + answer["output_ids"]) == CONTEXT


def test_a_stream_is_cumulative_and_ends_with_done(server):
    async def conversation(http):
        body = {"input_ids": PROMPT, "stream": True, "return_logprob": True, "sampling_params": {"max_new_tokens": 30, "sampling_seed": 8, "ignore_eos": True}}
        async with http.session.post(http.url + "/generate", json=body) as response:
            lines = [line async for line in response.content if line.strip()]
        return lines, await http.generate(max_new_tokens=30, sampling_seed=8)

    lines, whole = talk(server, conversation)
    assert lines[-1].strip() == b"data: [DONE]"
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert len(events) > 2
    for event in events:
        assert event["output_ids"] == whole["output_ids"][:len(event["output_ids"])]
        assert (event["meta_info"]["finish_reason"] is None) == (event is not events[-1])
    assert events[-1]["output_ids"] == whole["output_ids"] and logprobs_of(events[-1]) == logprobs_of(whole)


# -- abort and pause -----------------------------------------------------------------------------------------------------------------


def test_abort_ends_the_requests_whose_id_begins_so_with_what_they_have(server):
    async def conversation(http):
        tasks = {rid: asyncio.ensure_future(http.generate([5, 6], rid=rid, max_new_tokens=400)) for rid in ("aa1", "aa2", "ab1")}
        await http.until(lambda figures: figures["running"] == 3)
        await http.post("/abort_request", {"rid": "aa"})
        return {rid: await task for rid, task in tasks.items()}

    answers = talk(server, conversation)
    for rid in ("aa1", "aa2"):
        assert answers[rid]["meta_info"]["finish_reason"]["type"] == "abort" and 0 < len(answers[rid]["output_ids"]) < 400
    assert len(answers["ab1"]["output_ids"]) == 400


def test_abort_all_also_ends_requests_in_line(server):
    async def conversation(http):
        tasks = [asyncio.ensure_future(http.generate([5, 6], max_new_tokens=400)) for _ in range(SLOTS + 3)]
        await http.until(lambda figures: figures["running"] == SLOTS and figures["waiting"] == 3)
        await http.post("/abort_request", {"abort_all": True})
        return await asyncio.gather(*tasks)

    assert {answer["meta_info"]["finish_reason"]["type"] for answer in talk(server, conversation)} == {"abort"}


def test_a_client_that_goes_away_frees_its_slot(server):
    async def conversation(http):
        task = asyncio.ensure_future(http.generate([5, 6], max_new_tokens=500))
        await http.until(lambda figures: figures["running"] == 1)
        task.cancel()
        before = await http.until(lambda figures: figures["running"] == 0)
        return before["generated_tokens"], (await http.figures())["generated_tokens"]

    before, after = talk(server, conversation)
    assert before == after


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_request_goes_on_to_the_same_tokens(server, mode):
    async def conversation(http):
        undisturbed = await http.generate(sampling_seed=6, max_new_tokens=300, temperature=0.8)
        task = asyncio.ensure_future(http.generate(sampling_seed=6, max_new_tokens=300, temperature=0.8))
        await http.until(lambda figures: figures["running"] == 1)
        status, answer = await http.post("/pause_generation", {"mode": mode})
        assert status == 200 and answer["status"] == "ok"
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
        partial = await task
        late = asyncio.ensure_future(http.generate([1, 2, 3]))
        done, _ = await asyncio.wait([late], timeout=0.1)
        assert not done
        await http.post("/continue_generation")
        return partial, await late

    partial, late = talk(server, conversation)
    assert partial["meta_info"]["finish_reason"]["type"] == "abort" and 0 < len(partial["output_ids"]) < 400
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


# -- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, words", [
    ({"input_ids": [1] * (CONTEXT + 1)}, f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}"),
    ({"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 20}}, "ask for at most 12"),
    ({"input_ids": [V]}, f"token id {V} is outside the vocabulary of {V}"),
    ({"input_ids": []}, "must not be empty"),
    ({"input_ids": [[1], []]}, "the prompt is empty"),
    ({"input_ids": [1.5]}, "integers only"),
    ({"input_ids": [1], "text": "a"}, "not both"),
    ({}, "either input_ids or text"),
    ({"input_ids": [1], "sampling_params": {"temprature": 1.0}}, "'temprature' = 1.0 is not supported"),
    ({"input_ids": [1], "sampling_params": {"repetition_penalty": 1.2}}, "'repetition_penalty' = 1.2 is not supported"),
    ({"input_ids": [1], "sampling_params": {"n": 2}}, "'n' = 2 is not supported"),
    ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature must be 0"),
    ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p must be in (0, 1]"),
    ({"input_ids": [1], "sampling_params": {"stop_token_ids": ["a"]}}, "stop_token_ids must be an integer"),
    ({"input_ids": [1], "lora_path": "x"}, "'lora_path' = 'x' is not supported"),
    ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
])
def test_a_bad_request_is_refused_with_its_reason(server, body, words):
    status, answer = talk(server, lambda http: http.post("/generate", body))
    assert status == 400 and words in answer["error"]["message"]


def test_what_is_not_json_or_no_route_gets_an_error_in_the_same_shape(server):
    async def conversation(http):
        async with http.session.post(http.url + "/generate", data=b"{") as response:
            return (response.status, await response.json()), await http.post("/nothing")

    (status, answer), (missing_status, missing) = talk(server, conversation)
    assert status == 400 and "not JSON" in answer["error"]["message"]
    assert missing_status == 404 and missing["error"]["message"]


# -- information and weights ---------------------------------------------------------------------------------------------------------


def test_information_under_its_new_and_old_names(server, checkpoint):
    async def conversation(http):
        return {route: await http.ask("GET", route) for route in (
            "/health", "/health_generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info", "/v1/models")}

    answers = talk(server, conversation)
    assert {status for status, _ in answers.values()} == {200}
    assert answers["/model_info"] == answers["/get_model_info"]
    assert answers["/model_info"][1]["model_path"] == str(checkpoint) and answers["/model_info"][1]["is_generation"] is True
    assert answers["/server_info"][1]["version"] and answers["/v1/models"][1]["data"][0]["max_model_len"] == CONTEXT


def test_a_weight_is_given_by_its_checkpoint_name(server):
    async def conversation(http):
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        return (await http.post("/get_weights_by_name", {"name": name, "truncate_size": 3}))[1], await http.post("/get_weights_by_name", {"name": "x"})

    rows, (status, _) = talk(server, conversation)
    np.testing.assert_allclose(rows, make_params(0)["layers"]["moe"]["down"][1, 2].T[:3], rtol=1e-6)
    assert status == 400


def broken_checkpoints(directory):
    """Directories that must not be taken, each with words of the reason."""
    config, params = make_config(), make_params(1)
    save_hf(params, config, directory / "truncated")
    file = directory / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    params["norm"]["scale"] = params["norm"]["scale"] * np.nan
    save_hf(params, config, directory / "nan")
    make_checkpoint(directory / "theta", seed=1)
    (directory / "theta" / "config.json").write_text((directory / "theta" / "config.json").read_text().replace("10000.0", "20000.0"))
    return {"absent": "missing", "truncated": "", "nan": "not finite", "theta": "rope_theta 20000.0 (was 10000.0)"}


def test_a_failed_update_keeps_the_old_weights(server, tmp_path):
    reasons = broken_checkpoints(tmp_path)

    async def conversation(http):
        before = await http.generate(sampling_seed=9)
        for name, words in reasons.items():
            status, answer = await http.post("/update_weights_from_disk", {"model_path": str(tmp_path / name), "weight_version": "99"})
            assert status == 400 and answer["success"] is False and words in answer["message"], (name, answer)
        return before, await http.generate(sampling_seed=9), (await http.ask("GET", "/model_info"))[1]

    before, after, info = talk(server, conversation)
    assert before["output_ids"] == after["output_ids"] and logprobs_of(before) == logprobs_of(after)
    assert info["weight_version"] == after["meta_info"]["weight_version"] == "0"


def test_an_update_changes_version_checksum_and_outputs_and_forgets_the_cached_prefix(server, checkpoint, other_checkpoint):
    new = Oracle.load(other_checkpoint)

    async def update(http, path, version):
        status, answer = await http.post("/update_weights_from_disk", {"model_path": str(path), "weight_version": version})
        assert status == 200 and answer["success"] is True
        return (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]

    async def conversation(http):
        old_sums = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
        before = await http.generate(sampling_seed=9)
        new_sums = await update(http, other_checkpoint, "7")
        after, version = await http.generate(sampling_seed=9), (await http.ask("GET", "/model_info"))[1]["weight_version"]
        return old_sums, before, new_sums, after, version, await update(http, checkpoint, "0"), await http.generate(sampling_seed=9)

    old_sums, before, new_sums, after, version, restored_sums, restored = talk(server, conversation)
    assert version == after["meta_info"]["weight_version"] == "7" and after["meta_info"]["cached_tokens"] == 0
    np.testing.assert_allclose(logprobs_of(after), new.logprobs(PROMPT + after["output_ids"])[len(PROMPT) - 1:], atol=1e-4)
    assert old_sums == restored_sums != new_sums
    assert before["output_ids"] == restored["output_ids"] != after["output_ids"]


@pytest.mark.parametrize("mode, flush", [("in_place", False), ("in_place", True), ("retract", True), (None, True)])
def test_an_update_amid_a_request_is_told_by_spans_and_fresh_caches_give_the_new_weights_logprobs(server, checkpoint, other_checkpoint, oracle, mode, flush):
    new = Oracle.load(other_checkpoint)

    async def conversation(http):
        task = asyncio.ensure_future(http.generate(PROMPT[:8], sampling_seed=4, max_new_tokens=480))
        await http.until(lambda figures: figures["running"] == 1)
        if mode:
            await http.post("/pause_generation", {"mode": mode})
        await http.post("/update_weights_from_disk", {"model_path": str(other_checkpoint), "weight_version": "1", "flush_cache": flush})
        if mode:
            await http.post("/continue_generation")
        answer = await task
        await http.post("/update_weights_from_disk", {"model_path": str(checkpoint), "weight_version": "0"})
        return answer

    meta = (answer := talk(server, conversation))["meta_info"]
    (first, second) = meta["weight_versions"]
    assert (first["version"], second["version"]) == ("0", "1") and meta["weight_version"] == "1"
    assert first["start"] == 0 and 0 < first["end"] == second["start"] and second["end"] == 480
    ids = (PROMPT[:8] + answer["output_ids"])[:128]
    border = min(first["end"], 100)
    np.testing.assert_allclose(logprobs_of(answer)[:border], oracle.logprobs(ids)[7:7 + border], atol=1e-4)
    if flush and first["end"] < 100:
        np.testing.assert_allclose(logprobs_of(answer)[first["end"]:100], new.logprobs(ids)[7 + first["end"]:107], atol=1e-4)


def test_nothing_was_compiled_after_the_start(server):
    """Runs last in this module: everything above went through the programs that the start compiled."""
    assert server.compilations > 0  # the log does tell
    assert compilations(server) == server.compilations
