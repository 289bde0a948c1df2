"""Bodies of /generate, as parsed without a server: what is done, and what is refused by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.serve.protocol import BadRequest, Bounds, parse_generate

BOUNDS = Bounds(vocab_size=100, max_context=500, eos_token_ids=frozenset({7, 8}))
WORDS = st.sampled_from(["", "a", "\0", "\ud800", "1e9", "yes"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=5,
)
BODY_FIELDS = (
    "input_ids",
    "text",
    "rid",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "stream",
    "return_routed_experts",
    "routed_experts_start_len",
    "cache_salt",
    "extra_key",
    "log_metrics",
    "priority",
    "routing_key",
    "anything",
)
SAMPLING_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "no_stop_trim",
    "sampling_seed",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "logit_bias",
    "anything",
)


class Letters:
    """A tokenizer of one id for each letter."""

    vocab_size = 128

    def encode(self, text, allow_special=False):
        return list(text.encode())

    def decode(self, ids, skip_special=False):
        return bytes(ids).decode()


def parse(tokenizer=None, **fields):
    return parse_generate({"input_ids": [1, 2, 3]} | fields, BOUNDS, tokenizer)[0]


def sampling(**params):
    return parse(Letters(), sampling_params=params)[0].sampling


@settings(max_examples=50, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(BODY_FIELDS), JSON),
    params=st.dictionaries(st.sampled_from(SAMPLING_FIELDS), JSON),
    ids=st.sampled_from([[1, 2, 3], [[1], [2, 3]]]),
)
def test_whatever_is_sent_is_taken_or_refused_in_one_sentence(body, params, ids):
    whole = {"input_ids": ids, "sampling_params": params} | body
    try:
        requests, _ = parse_generate(whole, BOUNDS, Letters())
    except BadRequest as refusal:
        assert str(refusal)
        return
    for request in requests:
        assert isinstance(request.rid, str) and isinstance(request.stream, bool)
        assert 0 <= request.sampling.seed < 2**64
        assert -1 <= request.sampling.top_k <= BOUNDS.vocab_size


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rid": ["a"]}, "rid must be a string, got ['a']"),
        ({"cache_salt": ["x"]}, "cache_salt must be a string"),
        ({"extra_key": {"a": 1}}, "extra_key must be a string"),
        ({"return_logprob": "no"}, "return_logprob must be true or false, got 'no'"),
        ({"stream": 1}, "stream must be true or false"),
        ({"priority": "high"}, "priority must be an integer of 64 bits, got 'high'"),
        ({"routing_key": "a"}, "'routing_key' = 'a' is not supported"),
        ({"data_parallel_rank": 2}, "'data_parallel_rank' = 2 is not supported"),
        ({"top_logprobs_num": 2}, "'top_logprobs_num' = 2 is not supported"),
        ({"return_text_in_logprobs": 1}, "return_text_in_logprobs must be true or false, got 1"),
        ({"sampling_params": {"n": 129}}, "n must be from 1 to 128, got 129"),
        ({"sampling_params": {"n": 1.5}}, "n must be an integer"),
        ({"sampling_params": {"structural_tag": "a"}}, "'structural_tag' = 'a' is not supported"),
        ({"sampling_params": {"json_schema": {}, "regex": ["a"]}}, "regex must be a string"),
        ({"sampling_params": {"json_schema": "{}", "regex": "a"}}, "give only one of json_schema"),
        ({"sampling_params": {"logit_bias": [1]}}, "logit_bias must be an object"),
        ({"sampling_params": {"logit_bias": {"a": 1}}}, "logit_bias has the key 'a'"),
        ({"sampling_params": {"logit_bias": {"-1": 1}}}, "logit_bias has the key '-1'"),
        ({"sampling_params": {"logit_bias": {"9" * 5000: 1}}}, "keys must be token ids below 100"),
        ({"sampling_params": {"logit_bias": {"1": 101}}}, "must be from -100 to 100, got 101"),
        ({"sampling_params": {"logit_bias": {"1": None}}}, "logit_bias must be a finite number"),
        ({"sampling_params": {"frequency_penalty": 2.5}}, "frequency_penalty must be in [-2, 2]"),
        ({"sampling_params": {"presence_penalty": "a"}}, "presence_penalty must be a finite"),
        ({"sampling_params": {"repetition_penalty": 0}}, "repetition_penalty must be from 1e-06"),
        (
            {"sampling_params": {"min_new_tokens": 3, "max_new_tokens": 2}},
            "min_new_tokens must be from 0 to max_new_tokens, got 3",
        ),
        (
            {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [*range(600)]}},
            "may have 512 tokens, got 600",
        ),
        ({"return_logprob": True, "logprob_start_len": 4}, "logprob_start_len must be -1"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len must be -1"),
        ({"sampling_params": {"stop": 5}}, "stop must be a string or a list of strings"),
        ({"sampling_params": {"stop": {"a": 1}}}, "stop must be a string or a list of strings"),
        ({"sampling_params": {"stop": ["a", 5]}}, "stop must be a string, got 5"),
        ({"sampling_params": {"stop": ["\ud800"]}}, "stop is not valid Unicode"),
        ({"sampling_params": {"stop_token_ids": 5}}, "stop_token_ids must be a list"),
        ({"sampling_params": {"sampling_seed": 10**30}}, "sampling_seed must be an integer of 64"),
        ({"sampling_params": {"ignore_eos": "yes"}}, "ignore_eos must be true or false"),
        ({"sampling_params": {"temperature": 10**400}}, "temperature must be a finite number"),
    ],
)
def test_what_is_not_done_is_refused_by_name(fields, words):
    with pytest.raises(BadRequest) as refusal:
        parse(Letters(), **fields)
    assert words in str(refusal.value)


def test_a_score_may_begin_at_the_end_of_the_prompt_and_is_not_looked_at_where_none_is_wanted():
    assert parse(return_logprob=True, logprob_start_len=3)[0].score_from == 3
    assert parse(logprob_start_len=99)[0].score_from is None


def test_salts_with_the_same_letters_are_different_salts():
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ('a", "b', ""), ("a", "")]
    salts = {parse(cache_salt=salt, extra_key=key)[0].salt for salt, key in pairs}
    assert len(salts) == len(pairs)
    assert parse()[0].salt == parse(cache_salt="", extra_key=None)[0].salt


def test_every_end_token_stops_beside_the_clients_own_unless_all_are_ignored():
    assert sampling().stop_ids == {7, 8}
    assert sampling(stop_token_ids=[3, 7]).stop_ids == {3, 7, 8}
    assert sampling(stop_token_ids=[3], ignore_eos=True).stop_ids == frozenset()


def test_ids_of_a_batch_are_those_that_were_given_and_differ():
    ids = [[1], [2]]
    assert [one.rid for one in parse(input_ids=ids, rid=["a", "b"])] == ["a", "b"]
    assert [one.rid for one in parse(input_ids=ids, rid="a")] == ["a_0", "a_1"]
    assert len({one.rid for one in parse(input_ids=ids)}) == 2
    with pytest.raises(BadRequest, match="Duplicate request ID detected: a"):
        parse(input_ids=ids, rid=["a", "a"])


@pytest.mark.long
def test_several_answers_to_a_prompt_are_requests_with_seeds_and_ids_of_their_own():
    params = {"n": 3, "sampling_seed": 7}
    requests, is_batch = parse_generate(
        {"input_ids": [[1], [2]], "sampling_params": params, "rid": ["a", "b"]}, BOUNDS, None
    )
    assert is_batch and [one.prompt_ids for one in requests] == [[1]] * 3 + [[2]] * 3
    assert [one.rid for one in requests] == ["a_0", "a_1", "a_2", "b_0", "b_1", "b_2"]
    seeds = [one.sampling.seed for one in requests]
    assert seeds[0] == 7 and len(set(seeds)) == 3 and seeds[:3] == seeds[3:]
    assert requests[0].output_ids is not requests[1].output_ids
    assert parse_generate({"input_ids": [1], "sampling_params": {"n": 2}}, BOUNDS, None)[1]
    with pytest.raises(BadRequest, match="send at most 65536 prompts, times their n"):
        parse_generate({"input_ids": [[1]] * 600, "sampling_params": {"n": 128}}, BOUNDS, None)


def test_what_is_no_temperature_in_float32_is_greedy_as_in_sglang():
    assert sampling(temperature=1e-30).temperature == 0.0
    assert sampling(temperature=0.01).temperature == 0.01


@pytest.mark.parametrize("limits", [{"max_queued_requests": -1}, {"request_seconds": 0.0}])
def test_limits_that_serve_nobody_are_refused(limits):
    with pytest.raises(ValueError, match=r"--(max_queued|request)"):
        Bounds(100, 500, frozenset(), **limits)
