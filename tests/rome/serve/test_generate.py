"""Generation in SGLang's protocol, by a real `launch.serve` process; numbers against the plain
forward pass.
"""

import asyncio
import base64
import json
import random

import numpy as np
import pytest

from tests.rome.serve.talk import PROMPT, logprobs_of, talk
from tests.rome.serve.tiny import CHUNK, CONTEXT, LAYERS, SLOTS, TOP_K, make_config

V = make_config().vocab_size
# The first is in config.json, the second in generation_config.json only.
END_TOKENS = {make_config().eos_token_id, make_config().pad_token_id}

# -- numbers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_sampled_tokens_equal_the_plain_forward_pass(server, oracle, temperature):
    answer = talk(server, lambda http: http.generate(max_new_tokens=40, temperature=temperature))
    ids = answer["output_ids"]
    assert (
        len(ids) == 40
        and [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == ids
    )
    np.testing.assert_allclose(
        logprobs_of(answer),
        oracle.logprobs(PROMPT + ids, temperature)[len(PROMPT) - 1 :],
        atol=1e-4,
    )


def test_logprobs_of_a_prompt_equal_the_plain_forward_pass(server, oracle):
    answer = talk(server, lambda http: http.generate(max_new_tokens=0, logprob_start_len=0))
    entries = answer["meta_info"]["input_token_logprobs"]
    assert (
        answer["output_ids"] == []
        and [entry[1] for entry in entries] == PROMPT
        and entries[0][0] is None
    )
    np.testing.assert_allclose(
        [entry[0] for entry in entries[1:]], oracle.logprobs(PROMPT), atol=1e-4
    )
    tail = talk(server, lambda http: http.generate(max_new_tokens=1, logprob_start_len=30))[
        "meta_info"
    ]["input_token_logprobs"]
    assert tail == entries[30:]


def test_temperature_zero_takes_the_likeliest_token(server, oracle):
    ids = talk(server, lambda http: http.generate(temperature=0))["output_ids"]
    logits_TV, _ = oracle.logits_and_routes(PROMPT + ids)
    assert ids == logits_TV[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_routes_equal_the_plain_forward_pass_also_for_cached_tokens(server, oracle):
    async def twice(http):
        return [
            await http.generate(return_routed_experts=True, seed=None, sampling_seed=5)
            for _ in range(2)
        ]

    for answer in talk(server, twice):
        ids = PROMPT + answer["output_ids"]
        routes = np.frombuffer(
            base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32
        ).reshape(len(ids) - 1, LAYERS, TOP_K)
        assert np.array_equal(routes, oracle.logits_and_routes(ids)[1][:-1])
    assert answer["meta_info"]["cached_tokens"] >= 2 * CHUNK
    rest = talk(
        server,
        lambda http: http.generate(
            return_routed_experts=True, routed_experts_start_len=38, seed=None, sampling_seed=5
        ),
    )
    assert base64.b64decode(rest["meta_info"]["routed_experts"]) == routes[38:].tobytes()


def test_a_seeded_request_gives_the_same_bits_alone_in_a_crowd_and_with_a_warm_cache(server):
    rng = random.Random(0)

    def crowd_member(http, number):
        shared = PROMPT[: rng.randrange(1, 40)]
        ids = shared + [rng.randrange(V) for _ in range(rng.randrange(0, 60))]
        more = rng.choice(
            [
                {},
                {"top_p": 0.7},
                {"top_k": 5},
                {"min_p": 0.1},
                {"temperature": 0.5},
                {"logprob_start_len": 0},
            ]
        )
        return http.generate(ids, max_new_tokens=rng.randrange(1, 60), **more)

    async def conversation(http):
        await http.post("/flush_cache")
        alone = await http.generate(sampling_seed=11, max_new_tokens=60)
        warm = await http.generate(sampling_seed=11, max_new_tokens=60)
        await http.post("/flush_cache")
        answers = await asyncio.gather(
            *(
                (
                    http.generate(sampling_seed=11, max_new_tokens=60)
                    if number in (0, 17, 29)
                    else crowd_member(http, number)
                )
                for number in range(30)
            )
        )
        return [alone, warm, answers[0], answers[17], answers[29]]

    answers = talk(server, conversation)
    assert (
        answers[0]["meta_info"]["cached_tokens"] == 0
        and answers[1]["meta_info"]["cached_tokens"] >= 2 * CHUNK
    )
    for answer in answers[1:]:
        assert answer["output_ids"] == answers[0]["output_ids"]
        assert logprobs_of(answer) == logprobs_of(answers[0])


def test_seeds_differ_and_requests_without_a_seed_differ(server):
    async def conversation(http):
        return [
            await http.generate(**options)
            for options in ({"sampling_seed": 1}, {"sampling_seed": 2**32 + 1}, {}, {})
        ]

    outputs = [tuple(answer["output_ids"]) for answer in talk(server, conversation)]
    assert len(set(outputs)) == 4


def test_a_later_turn_takes_all_of_the_earlier_one_from_the_cache_and_gets_the_same_bits(
    server, oracle
):
    async def conversation(http):
        first = await http.generate(max_new_tokens=50, sampling_seed=3)
        turn = PROMPT + first["output_ids"] + [9, 10, 11]
        answer = await http.generate(turn, sampling_seed=4)
        await http.post("/flush_cache")
        return turn, answer, await http.generate(turn, sampling_seed=4)

    turn, answer, fresh = talk(server, conversation)
    assert fresh["meta_info"]["cached_tokens"] == 0
    # All but the last token that was drawn, whose keys nobody needed.
    assert answer["meta_info"]["cached_tokens"] == len(turn) - 4
    assert answer["output_ids"] == fresh["output_ids"]
    assert logprobs_of(answer) == logprobs_of(fresh)
    np.testing.assert_allclose(
        logprobs_of(answer),
        oracle.logprobs(turn + answer["output_ids"])[len(turn) - 1 :],
        atol=1e-4,
    )


def test_requests_that_arrive_together_share_the_work_of_their_common_prompt(server, oracle):
    async def conversation(http):
        before, groups = (await http.figures())["prefill_tokens"], []
        for offset in (
            0,
            10,
        ):  # the second group finds the prompt in a slot that one of it may overwrite
            groups.append(
                await asyncio.gather(
                    *(
                        http.generate(prompt, sampling_seed=number + offset)
                        for number in range(SLOTS)
                    )
                )
            )
        return groups, (await http.figures())["prefill_tokens"] - before

    prompt = [random.randrange(V) for _ in range(3 * CHUNK + 2)]
    groups, computed = talk(server, conversation)
    assert computed == 3 * CHUNK + 2 * SLOTS * 2
    cached = [sorted(answer["meta_info"]["cached_tokens"] for answer in group) for group in groups]
    assert cached == [[0] + (SLOTS - 1) * [3 * CHUNK], SLOTS * [3 * CHUNK]]
    for answer in [answer for group in groups for answer in group]:
        np.testing.assert_allclose(
            logprobs_of(answer),
            oracle.logprobs(prompt + answer["output_ids"])[len(prompt) - 1 :],
            atol=1e-4,
        )


# -- ends
# -------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_output_and_belongs_to_it(server):
    async def conversation(http):
        free = await http.generate(sampling_seed=1, max_new_tokens=20)
        stop = free["output_ids"][9]
        return (
            free,
            stop,
            await http.generate(
                sampling_seed=1, max_new_tokens=20, stop_token_ids=[stop], ignore_eos=False
            ),
            await http.generate(sampling_seed=1, max_new_tokens=20, stop_token_ids=[stop]),
        )

    free, stop, answer, ignoring = talk(server, conversation)
    assert answer["output_ids"] == free["output_ids"][: free["output_ids"].index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    # In SGLang too, ignore_eos ignores every stop token.
    assert ignoring["output_ids"] == free["output_ids"]


def test_every_end_token_of_the_checkpoint_stops_unless_they_are_ignored(server):
    async def conversation(http):
        seeds = range(60)  # hot enough that some of these many run into the end token
        return [
            (
                await http.post(
                    "/generate",
                    {
                        "input_ids": [PROMPT for _ in seeds],
                        "sampling_params": [
                            {
                                "max_new_tokens": 60,
                                "temperature": 5,
                                "sampling_seed": seed,
                                "ignore_eos": ignore,
                            }
                            for seed in seeds
                        ],
                    },
                )
            )[1]
            for ignore in (False, True)
        ]

    stopping, ignoring = talk(server, conversation)
    ended = [
        (a, b)
        for a, b in zip(stopping, ignoring, strict=True)
        if a["meta_info"]["finish_reason"]["type"] == "stop"
    ]
    found = set()
    for answer, free in ended:
        *before, last = answer["output_ids"]
        assert answer["output_ids"] == free["output_ids"][: len(answer["output_ids"])]
        assert not END_TOKENS & set(before) and len(free["output_ids"]) == 60
        found.add(last)
    assert found == END_TOKENS


def test_a_stop_string_ends_the_output_at_the_first_token_that_completes_it(server, tokenizer):
    async def conversation(http):
        free = await http.generate(sampling_seed=2, max_new_tokens=40)
        text = tokenizer.decode(free["output_ids"])
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        return (
            free,
            text,
            stop,
            await http.generate(
                sampling_seed=2,
                max_new_tokens=40,
                stop=["never appears", stop],
                skip_special_tokens=False,
            ),
        )

    free, text, stop, answer = talk(server, conversation)
    ids = answer["output_ids"]
    assert ids == free["output_ids"][: len(ids)]
    assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    assert answer["text"] == text[: text.index(stop)]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_text_in_and_out_is_the_tokenizers(server, tokenizer):
    async def conversation(http):
        return await http.post(
            "/generate",
            {
                "text": "echo hello",
                "sampling_params": {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True},
            },
        )

    status, answer = talk(server, conversation)
    assert status == 200 and answer["meta_info"]["prompt_tokens"] == len(
        tokenizer.encode("echo hello")
    )
    assert answer["text"] == tokenizer.decode(answer["output_ids"], skip_special=True)


def test_more_requests_than_slots_are_all_answered_in_full(server):
    async def conversation(http):
        return await asyncio.gather(
            *(
                http.generate([number + 1], max_new_tokens=number % 7 + 1)
                for number in range(4 * SLOTS)
            )
        )

    answers = talk(server, conversation)
    assert [len(answer["output_ids"]) for answer in answers] == [
        number % 7 + 1 for number in range(4 * SLOTS)
    ]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"length"}


def test_a_batch_is_answered_in_order_and_like_single_requests(server):
    async def conversation(http):
        prompts = [PROMPT[:n] for n in (5, 20, 33)]
        params = [{"max_new_tokens": n, "sampling_seed": n, "ignore_eos": True} for n in (3, 4, 5)]
        _, batch = await http.post("/generate", {"input_ids": prompts, "sampling_params": params})
        singles = [
            await http.generate(prompt, **one) for prompt, one in zip(prompts, params, strict=True)
        ]
        return batch, singles

    batch, singles = talk(server, conversation)
    assert [answer["output_ids"] for answer in batch] == [
        answer["output_ids"] for answer in singles
    ]


def test_a_context_can_be_filled_to_its_last_token(server):
    answer = talk(server, lambda http: http.generate(max_new_tokens=CONTEXT - len(PROMPT)))
    assert len(PROMPT + answer["output_ids"]) == CONTEXT


def test_a_stream_is_cumulative_and_ends_with_done(server):
    async def conversation(http):
        body = {
            "input_ids": PROMPT,
            "stream": True,
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": 30, "sampling_seed": 8, "ignore_eos": True},
        }
        async with http.session.post(http.url + "/generate", json=body) as response:
            lines = [line async for line in response.content if line.strip()]
        return lines, await http.generate(max_new_tokens=30, sampling_seed=8)

    lines, whole = talk(server, conversation)
    assert lines[-1].strip() == b"data: [DONE]"
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert len(events) > 2
    for event in events:
        assert event["output_ids"] == whole["output_ids"][: len(event["output_ids"])]
        assert (event["meta_info"]["finish_reason"] is None) == (event is not events[-1])
    assert events[-1]["output_ids"] == whole["output_ids"] and logprobs_of(
        events[-1]
    ) == logprobs_of(whole)
