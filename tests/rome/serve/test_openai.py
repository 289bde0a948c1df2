"""OpenAI's completions and chat completions: whole and streamed answers say the same, and what is
not done is refused by name.
"""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.tokenizer import TINY, Tokenizer
from rome.serve.checks import BadRequest
from rome.serve.openai_api import (
    Answers,
    chat_ids,
    prompt_of,
    read_calls,
    to_generate,
    wants_usage,
)
from rome.serve.protocol import Bounds, parse_generate
from rome.serve.request import Request, SamplingParams
from rome.serve.stopping import find_end
from tests.rome.serve.talk import talk

CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]
TOKENIZER = Tokenizer.load(TINY)
BOUNDS = Bounds(TOKENIZER.vocab_size, 500, frozenset({TOKENIZER.im_end}))
TEXTS = st.lists(
    st.sampled_from(
        ["I look. ", "é", "漢字", "\n", "<tool", "_call>", "a < b", "STOP", "ST", CALL]
    ),
    max_size=6,
).map("".join)


def play(body, text, cuts, stop=()):
    """Let a request say a text in steps that end at the cuts; return its chunks and the whole."""
    params = SamplingParams(10_000, stop=tuple(stop), stop_ids=frozenset({TOKENIZER.im_end}))
    request = Request("r", [1, 2, 3], params, return_logprob=True)
    answers = Answers(body, [request], TOKENIZER, "m", is_chat=True)
    ids = [*TOKENIZER.encode(text, allow_special=True), TOKENIZER.im_end]
    chunks = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        taken, finish = find_end(request, ids[start:end], TOKENIZER)
        request.output_ids += ids[start : start + taken]
        request.logprobs += [-1.0] * taken
        request.finish = finish
        chunks += answers.chunks(request)
        if finish is not None:
            break
    return [chunk["choices"][0] for chunk in chunks], answers.whole()["choices"][0]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data(), has_tools=st.booleans(), stops=st.booleans())
def test_the_chunks_of_a_stream_add_up_to_the_whole_answer(text, data, has_tools, stops):
    length = len(TOKENIZER.encode(text, allow_special=True))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length, 1)), max_size=6)))
    body = {"tools": TOOLS} if has_tools else {}
    chunks, whole = play(body, text, cuts, ["STOP"] if stops else [])
    deltas = [chunk["delta"] for chunk in chunks]
    said = "".join(delta.get("content") or "" for delta in deltas)
    assert said == (whole["message"]["content"] or "")
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for call in calls:
        call.pop("index")
    assert calls == whole["message"].get("tool_calls", [])
    assert [delta.get("role") for delta in deltas if "role" in delta] == ["assistant"]
    reasons = [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]]
    assert reasons == [whole["finish_reason"]]
    entries = [one for chunk in chunks for one in (chunk["logprobs"] or {}).get("content", [])]
    assert entries == whole["logprobs"]["content"]


def test_calls_of_tools_are_told_apart_from_what_is_said():
    chunks, whole = play({"tools": TOOLS}, f"I look.\n{CALL}", [])
    (call,) = whole["message"]["tool_calls"]
    assert whole["message"]["content"] == "I look." and whole["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "bash", "arguments": '{"command": "ls"}'}
    assert chunks[-1]["finish_reason"] == "tool_calls"
    # Without tools the text is the answer, and so is a call that cannot be read.
    assert CALL in play({}, CALL, [])[1]["message"]["content"]
    assert read_calls("<tool_call>\n{", "r") == ("<tool_call>\n{", [])


def test_a_chat_is_rendered_as_the_template_has_it():
    body = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Look"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "a<|im_end|>"},
        ],
        "tools": TOOLS,
    }
    ids = chat_ids(body, TOKENIZER)
    text = TOKENIZER.decode(ids)
    assert "Be short." in text and CALL in text and "<tool_response>\na" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert ids.count(TOKENIZER.im_end) == 4  # not the one that a tool has spelled


WORDS = st.sampled_from(["", "a", "user", "tool", "\0", "\ud800", "text", "function", "none"])
NAMES = st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "parameters"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
OF_PROMPTS = ["model", "prompt", "messages", "tools", "tool_choice"]
OF_ANSWERS = ["n", "stop", "seed", "max_tokens", "logprobs", "stream", "stream_options"]
FIELDS = st.sampled_from([*OF_PROMPTS, *OF_ANSWERS, "rid", "priority", "response_format"])


@settings(max_examples=80, deadline=None)
@given(body=st.dictionaries(FIELDS, JSON, max_size=5), is_chat=st.booleans())
def test_whatever_is_sent_is_taken_or_refused_in_one_sentence(body, is_chat):
    whole = {"messages": [{"role": "user", "content": "a"}], "prompt": "a"} | body
    whole.pop("prompt" if is_chat else "messages")
    try:
        asked = to_generate(whole, (), is_chat)
        wants_usage(whole)
        prompt = {"input_ids": chat_ids(whole, TOKENIZER)} if is_chat else prompt_of(whole)
        requests, _ = parse_generate(asked | prompt, BOUNDS, TOKENIZER)
        Answers(whole, requests, TOKENIZER, "m", is_chat)
    except BadRequest as refusal:
        assert str(refusal)


@pytest.mark.parametrize(
    "field, value",
    [
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("logprobs", 5),
        ("anything", 1),
    ],
)
def test_what_is_not_done_is_refused_by_name(field, value):
    with pytest.raises(BadRequest, match=field):
        to_generate({"prompt": "a", field: value}, (), is_chat=False)


@pytest.mark.parametrize(
    "body, words",
    [
        ({}, "messages must be a list"),
        ({"messages": [{"role": "king", "content": ""}]}, "has role 'king'"),
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        ({"messages": [{"role": "user"}], "tools": [{"type": "web"}]}, "tools[0] must be"),
        (
            {
                "messages": [{"role": "user"}],
                "tools": [{"function": {"name": "a", "description": "\ud800"}}],
            },
            "not valid Unicode",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}]},
            "not valid Unicode",
        ),
        ({"messages": [{"role": "user"}], "tool_choice": "must"}, "give auto, none, required"),
        ({"messages": [{"role": "user"}], "tool_choice": {"type": "custom"}}, '"custom"'),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "without a function's name"),
    ],
)
def test_a_bad_chat_is_refused_with_its_reason(body, words):
    with pytest.raises(BadRequest) as refusal:
        chat_ids(body, TOKENIZER)
    assert words in str(refusal.value)


def test_prompts_are_texts_or_ids_and_adapters_are_models():
    assert prompt_of({"prompt": ["a", "b"]}) == {"text": ["a", "b"]}
    assert prompt_of({"prompt": [[1], [2]]}) == {"input_ids": [[1], [2]]}
    with pytest.raises(BadRequest, match="prompt must be"):
        prompt_of({"prompt": []})
    asked = to_generate({"model": "mine", "seed": 3, "max_tokens": 5}, {"mine"}, is_chat=False)
    assert asked["lora_path"] == "mine"
    assert asked["sampling_params"] == {"sampling_seed": 3, "max_new_tokens": 5}


# -- over HTTP
# -------------------------------------------------------------------------------------------------


async def stream(http, route, body):
    """Return the events of a stream, without the last."""
    async with http.session.post(http.url + route, json=body | {"stream": True}) as response:
        text = await response.text()
    events = [line.removeprefix("data: ") for line in text.split("\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_chat_over_http_whole_and_as_a_stream_and_several_answers(server):
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "Say something"}],
        "max_tokens": 20,
        "seed": 7,
        "logprobs": True,
        "n": 2,
        "stream_options": {"include_usage": True},
    }

    async def conversation(http):
        return await asyncio.gather(
            http.post("/v1/chat/completions", body), stream(http, "/v1/chat/completions", body)
        )

    (status, whole), events = talk(server, conversation)
    assert status == 200 and [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] > 0
    texts = ["", ""]
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert texts[0] != texts[1]
    assert whole["usage"]["completion_tokens"] == sum(
        len(choice["logprobs"]["content"]) for choice in whole["choices"]
    )


def test_a_text_completion_of_ids_equals_what_generate_gives(server):
    async def conversation(http):
        sampling = {"max_new_tokens": 9, "sampling_seed": 4}
        body = {"prompt": [[5, 6], [7, 8]], "max_tokens": 9, "seed": 4, "return_token_ids": True}
        return (
            await http.post(
                "/generate", {"input_ids": [[5, 6], [7, 8]], "sampling_params": sampling}
            ),
            await http.post("/v1/completions", body | {"logprobs": 1}),
            await http.post("/v1/completions", body | {"echo": True}),
            await http.ask("GET", "/v1/models/nothing"),
            await http.ask("GET", "/metrics"),
            (await http.ask("GET", "/get_load"))[1],
        )

    (_, plain), (status, answer), refused, missing, metrics, load = talk(server, conversation)
    assert status == 200
    assert [one["text"] for one in answer["choices"]] == [one["text"] for one in plain]
    assert [one["token_ids"] for one in answer["choices"]] == [one["output_ids"] for one in plain]
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(plain[0]["output_ids"])
    assert refused[0] == 400 and refused[1]["error"]["type"] == "invalid_request_error"
    assert missing[0] == 404
    assert metrics[0] == 200 and "sglang:generation_tokens_total{model_name=" in metrics[1]
    assert load[0]["num_reqs"] == 0


@pytest.mark.live
def test_the_openai_package_talks_to_the_server(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Say something"}]
    options = {"model": model, "messages": messages, "max_tokens": 16, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, tools=TOOLS)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    chunks = client.chat.completions.create(
        **options, tools=TOOLS, stream=True, stream_options={"include_usage": True}
    )
    said = ""
    for chunk in chunks:
        if chunk.choices:
            said += chunk.choices[0].delta.content or ""
        last = chunk
    assert said == (whole.choices[0].message.content or "")
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    text = client.completions.create(model=model, prompt="Once", max_tokens=5, n=2, logprobs=1)
    assert len(text.choices) == 2 and len(text.choices[0].logprobs.tokens) <= 5
    one = {"logit_bias": {"70": 100}, "presence_penalty": -1, "extra_body": {"min_tokens": 4}}
    biased = client.chat.completions.create(**options | {"max_tokens": 4}, **one, logprobs=True)
    assert len({one.token for one in biased.choices[0].logprobs.content}) == 1
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(**options, logit_bias={"5": 101})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.live
def test_the_openai_package_requires_calls_and_grammars(server):
    openai = pytest.importorskip("openai")
    pytest.importorskip("llguidance")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    way = {"type": "object", "properties": {"way": {"enum": ["up", "on"]}}, "required": ["way"]}
    tools = [{"type": "function", "function": {"name": "go", "parameters": way}}]
    way["additionalProperties"] = False
    messages = [{"role": "user", "content": "Go"}]
    options = {"model": "any", "messages": messages, "seed": 3, "tools": tools}
    go = {"type": "function", "function": {"name": "go"}}
    for choice in ("required", go):
        asked = options | {"tool_choice": choice, "parallel_tool_calls": False}
        answers = client.chat.completions.create(**asked, n=3, stop=["no such text"]).choices
        for answer in answers:
            (call,) = answer.message.tool_calls
            assert answer.finish_reason == "tool_calls" and not answer.message.content
            assert call.function.name == "go"
            assert json.loads(call.function.arguments)["way"] in ("up", "on")
        chunks = client.chat.completions.create(**asked, stream=True)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
        whole = answers[0].message.tool_calls[0].function
        assert streamed.function.name == whole.name
        assert streamed.function.arguments == whole.arguments
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        client.chat.completions.create(**asked, extra_body={"regex": "a"})
    with pytest.raises(openai.BadRequestError, match="named 'fly'"):
        fly = {"type": "function", "function": {"name": "fly"}}
        client.chat.completions.create(**options | {"tool_choice": fly})
    free = options | {"tools": []}
    said = client.chat.completions.create(**free, extra_body={"ebnf": 'root ::= "a" | "b"'})
    assert said.choices[0].message.content in ("a", "b")
