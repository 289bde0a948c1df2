"""The model proxy: what agents send in three dialects, and the record that comes of it."""

import asyncio
import contextlib
import json
import re

import aiohttp
import pytest

from envs.rock import Sandbox, SandboxConfig, probe
from rome.agent import proxy as proxies
from rome.agent.dialects import DIALECTS
from rome.agent.proxy import Budget, ModelProxy, ProxiedEpisode
from rome.engine.errors import EngineError
from tests.rome.agent.test_dialogue import CALL, dialogue

CHAT, RESPONSES, MESSAGES = (dialect.path for dialect in DIALECTS)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Site:
    """A proxy that listens, and the episodes that it knows."""

    def __init__(self, proxy, url, http):
        self.proxy, self.url, self.http = proxy, url, http

    async def post(self, path, body, key, **headers):
        headers["Authorization"] = f"Bearer {key}"
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def stream(self, path, body, key):
        headers = {"x-api-key": key}
        body = {**body, "stream": True}
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return (await response.read()).decode()


@contextlib.asynccontextmanager
async def site():
    proxy = ModelProxy()
    async with proxy.listen() as url, aiohttp.ClientSession() as http:
        yield Site(proxy, url, http)


def run(work, *turns, budget=None, **options):
    """Run work(site, episode, key) with a scripted engine; returns its result and the engine."""
    conversation, engine = dialogue(*turns, **options)
    episode = ProxiedEpisode(conversation, budget=budget)

    async def steps():
        async with site() as place:
            return await work(place, episode, place.proxy.admit(episode))

    return asyncio.run(asyncio.wait_for(steps(), 60)), engine


# -- one conversation, written in each dialect


def chat_bodies(answer):
    tool = {"name": "bash", "description": "runs", "parameters": PARAMETERS}
    first = [{"role": "system", "content": "be"}, {"role": "user", "content": "go"}]
    yield {"messages": first, "tools": [{"type": "function", "function": tool}]}
    said = answer["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "files"}
    tools = [{"type": "function", "function": tool}]
    yield {"messages": [*first, said, result], "tools": tools}


def messages_bodies(answer):
    tools = [{"name": "bash", "description": "runs", "input_schema": PARAMETERS}]
    first = {"role": "user", "content": [{"type": "text", "text": "go"}]}
    yield {"system": "be", "messages": [first], "tools": tools, "max_tokens": 500}
    said = {"role": "assistant", "content": answer["content"]}
    identity = answer["content"][-1]["id"]
    block = {"type": "tool_result", "tool_use_id": identity, "content": "files"}
    history = [first, said, {"role": "user", "content": [block]}]
    yield {"system": "be", "messages": history, "tools": tools, "max_tokens": 500}


def responses_bodies(answer):
    tools = [{"type": "function", "name": "bash", "description": "runs", "parameters": PARAMETERS}]
    first = {"role": "user", "content": [{"type": "input_text", "text": "go"}]}
    yield {"instructions": "be", "input": [first], "tools": tools}
    call = answer["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "files"}
    history = [first, *answer["output"], result]
    yield {"instructions": "be", "input": history, "tools": tools}


WRITERS = {CHAT: chat_bodies, MESSAGES: messages_bodies, RESPONSES: responses_bodies}


def converse(path, said=f"look {CALL}"):
    """The record of a conversation of two calls in one dialect, and its answers."""
    turns = (f"<think>\nhm\n</think>\n\n{said}", "done")

    async def work(place, episode, key):
        answer = {}
        bodies = WRITERS[path](answer)
        status, found = await place.post(path, next(bodies), key)
        assert status == 200, found
        answer |= found
        status, last = await place.post(path, next(bodies), key)
        assert status == 200, last
        return found, last, episode

    (found, last, episode), _ = run(work, *turns)
    return found, last, episode.dialogue


def test_all_dialects_make_the_same_record():
    records = []
    for path in WRITERS:
        _, _, conversation = converse(path)
        chunks = conversation.session.chunks
        records.append([(chunk.prompt_ids, chunk.action_ids, chunk.parent) for chunk in chunks])
        assert conversation.counts["context_answers"] == 0
        assert chunks[0].observation == "files"
    assert records[0] == records[1] == records[2]


def test_answers_have_the_shape_of_their_dialect():
    found, last, _ = converse(CHAT)
    message = found["choices"][0]["message"]
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"] == "look" and message["reasoning_content"].strip() == "hm"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"b": 1, "a": "x"}
    assert last["choices"][0] | {"message": 0} == {
        "index": 0,
        "message": 0,
        "logprobs": None,
        "finish_reason": "stop",
    }
    found, last, _ = converse(MESSAGES)
    assert [block["type"] for block in found["content"]] == ["thinking", "text", "tool_use"]
    assert (found["stop_reason"], last["stop_reason"]) == ("tool_use", "end_turn")
    found, last, _ = converse(RESPONSES)
    kinds = [item["type"] for item in found["output"]]
    assert kinds == ["reasoning", "message", "function_call"] and last["status"] == "completed"


@pytest.mark.parametrize("path", WRITERS)
def test_a_stream_says_what_the_whole_answer_says(path):
    async def work(place, episode, key):
        return await place.stream(path, next(WRITERS[path]({})), key)

    text, _ = run(work, f"look {CALL}")
    frames = [json.loads(one.split("data: ", 1)[1]) for one in text.split("\n\n") if "{" in one]
    if path == CHAT:
        deltas = [frame["choices"][0]["delta"] for frame in frames]
        said = "".join(delta.get("content") or "" for delta in deltas)
        arguments = deltas[-2]["tool_calls"][0]["function"]["arguments"]
        assert text.endswith("data: [DONE]\n\n")
    elif path == MESSAGES:
        deltas = [frame["delta"] for frame in frames if frame["type"] == "content_block_delta"]
        said, arguments = deltas[0]["text"], deltas[1]["partial_json"]
        assert frames[0]["type"] == "message_start" and frames[-1]["type"] == "message_stop"
    else:
        numbers = [frame["sequence_number"] for frame in frames]
        assert numbers == list(range(len(frames)))
        done = {frame["type"]: frame for frame in frames}
        said = done["response.output_text.done"]["text"]
        arguments = done["response.function_call_arguments.done"]["arguments"]
        assert done["response.completed"]["response"]["status"] == "completed"
    assert said == "look" and json.loads(arguments) == {"b": 1, "a": "x"}


@pytest.mark.parametrize("path", WRITERS)
def test_a_stream_counts_tokens_as_the_whole_answer_does(path):
    async def work(place, episode, key):
        body = next(WRITERS[path]({}))
        whole = (await place.post(path, body, key))[1]["usage"]
        without = await place.stream(path, body, key)
        asked = {**body, "stream_options": {"include_usage": True}}
        return whole, without, await place.stream(path, asked, key)

    (whole, without, text), engine = run(work, f"look {CALL}")
    assert len(engine.requests) == 1  # the second and the third call are retries
    frames = [json.loads(one.split("data: ", 1)[1]) for one in text.split("\n\n") if "{" in one]
    if path == CHAT:
        assert '"usage"' not in without
        assert frames[-1]["choices"] == [] and frames[-1]["usage"] == whole
    elif path == MESSAGES:
        counted = frames[0]["message"]["usage"] | frames[-2]["usage"]
        assert counted == whole
    else:
        assert frames[-1]["response"]["usage"] == whole


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": []}, "needs a last message"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "needs a last message"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        (CHAT, {"messages": [3]}, r"messages\[0\] is not an object"),
        (CHAT, {"messages": "x"}, "messages has the wrong type"),
        (CHAT, {**HELLO, "n": 2}, "n=2 cannot be honoured"),
        (CHAT, {**HELLO, "stop": ["x"]}, "stop"),
        (CHAT, {**HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {**HELLO, "logprobs": True}, "logprobs"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "function_call": {"name": "x"}}]},
            "function_call is the form before tools",
        ),
        (CHAT, {**HELLO, "max_tokens": 0}, "max_tokens is 0"),
        (CHAT, {**HELLO, "max_tokens": True}, "max_tokens has the wrong type"),
        (CHAT, {**HELLO, "tools": [{"type": "function"}]}, "has no name"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "image_url.*reads text only",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 4000}]}, "no room left"),
        (MESSAGES, {**HELLO, "stop_sequences": ["x"]}, "stop_sequences"),
        (
            MESSAGES,
            {**HELLO, "tools": [{"type": "web_search_20250305", "name": "s"}]},
            "web_search",
        ),
        (MESSAGES, {**HELLO, "tool_choice": {"type": "any"}}, "tool_choice"),
        (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "no item of this episode"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema"}}}, "json_schema"),
        (RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, "web_search"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_the_shape_of_its_dialect(path, body, words):
    async def work(place, episode, key):
        return await place.post(path, body, key)

    (status, answer), engine = run(work, "never")
    error = answer["error"]
    assert status == 400 and not engine.requests
    assert re.search(words, error["message"]), error
    if path == MESSAGES:
        assert answer["type"] == "error" and error["type"] == "invalid_request_error"
    else:
        assert error["type"] == "invalid_request_error" and "code" in error


def test_what_is_no_request_is_refused():
    async def work(place, episode, key):
        headers = {"Authorization": f"Bearer {key}"}
        found = []
        for data in (b"{", b"[]", b"\xff", b"[" * 100_000):
            async with place.http.post(place.url + CHAT, data=data, headers=headers) as response:
                found.append(response.status)
        async with place.http.get(place.url + "/v1/nothing", headers=headers) as response:
            found.append(response.status)
        async with place.http.get(place.url + "/v1/models", headers=headers) as response:
            return found, await response.json()

    (found, models), _ = run(work, "never")
    assert found == [400, 400, 400, 400, 404] and models["data"][0]["id"] == "policy"


def test_a_body_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(proxies, "MAX_BODY_BYTES", 1000)

    async def work(place, episode, key):
        body = {"messages": [{"role": "user", "content": "x" * 2000}]}
        return await place.post(CHAT, body, key)

    (status, answer), _ = run(work, "never")
    assert status == 413 and answer["error"]["code"] == "request_too_large"


def test_a_secret_is_its_episodes_alone_and_ends_with_it():
    other, _ = dialogue("other")

    async def work(place, episode, key):
        wrong = await place.post(CHAT, HELLO, "sk-wrong")
        ours = await place.post(CHAT, HELLO, key)
        theirs = await place.post(CHAT, HELLO, place.proxy.admit(ProxiedEpisode(other)))
        place.proxy.revoke(key)
        return wrong, ours, theirs, await place.post(CHAT, HELLO, key), vars(place.proxy), key

    (wrong, ours, theirs, after, kept, key), _ = run(work, "ours")
    assert wrong[0] == after[0] == 401
    assert ours[1]["choices"][0]["message"]["content"] == "ours"
    assert theirs[1]["choices"][0]["message"]["content"] == "other"
    assert key not in repr(kept)


@pytest.mark.parametrize(
    ("headers", "calls"),
    [
        ([{"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}], 1),
        ([{"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "0"}], 2),
        ([{"Idempotency-Key": "a"}, {"Idempotency-Key": "a"}], 1),
        ([{}, {}], 1),
    ],
)
def test_a_retry_is_answered_again_and_is_no_branch(headers, calls):
    async def work(place, episode, key):
        return [await place.post(CHAT, HELLO, key, **one) for one in headers]

    answers, engine = run(work, "one", "two")
    assert len(engine.requests) == calls
    contents = [answer["choices"][0]["message"]["content"] for _, answer in answers]
    assert contents == ["one", "one" if calls == 1 else "two"]


def test_a_client_that_goes_away_finds_its_answer_when_it_comes_back():
    gate = asyncio.Event()

    async def work(place, episode, key):
        first = asyncio.ensure_future(place.post(CHAT, HELLO, key))
        while not episode.dialogue.counts["calls"]:
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.2)
        second = asyncio.ensure_future(place.post(CHAT, HELLO, key))
        await asyncio.sleep(0.2)
        gate.set()
        return await second

    (status, _), engine = run(work, "one", gate=gate)
    assert status == 200 and len(engine.requests) == 1


def test_a_slow_answer_is_a_stream_with_pings(monkeypatch):
    monkeypatch.setattr(proxies, "FIRST_PING_SECONDS", 0.05)
    monkeypatch.setattr(proxies, "PING_SECONDS", 0.05)
    gate = asyncio.Event()

    async def work(place, episode, key):
        asyncio.get_running_loop().call_later(0.4, gate.set)
        return await place.stream(MESSAGES, HELLO, key)

    text, _ = run(work, "one", gate=gate)
    assert text.startswith("event: ping\n") and text.rstrip().endswith('"type": "message_stop"}')


def test_an_engine_that_fails_is_the_infrastructures_fault():
    async def work(place, episode, key):
        return await place.post(CHAT, HELLO, key), episode

    ((status, answer), episode), _ = run(work, EngineError("gone"))
    assert status == 503 and answer["error"]["code"] == "engine_unavailable"
    assert str(episode.fault) == "gone"


def test_an_episode_has_a_budget_of_calls_and_tokens():
    async def work(place, episode, key):
        bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
        return [await place.post(CHAT, body, key) for body in bodies]

    answers, engine = run(work, "1", "2", "3", budget=Budget(calls=2))
    assert [status for status, _ in answers] == [200, 200, 400]
    assert answers[-1][1]["error"]["code"] == "episode_limit" and len(engine.requests) == 2
    answers, _ = run(work, "1", "2", "3", budget=Budget(tokens=1))
    assert [status for status, _ in answers] == [200, 400, 400]


def test_counted_tokens_are_those_of_the_prompt():
    async def work(place, episode, key):
        body = next(messages_bodies({}))
        _, count = await place.post(proxies.COUNT_PATH, body, key)
        _, answer = await place.post(MESSAGES, body, key)
        return count["input_tokens"], answer["usage"]["input_tokens"], len(episode.dialogue._roots)

    (count, used, roots), _ = run(work, "x")
    assert count == used and roots == 1


def test_an_agent_in_a_sandbox_asks_at_a_door():
    if probe(tier="namespaces").tier is None:
        pytest.skip("no namespaces tier here")
    program = (
        "import json, urllib.request as u\n"
        "body = json.dumps({'messages': [{'role': 'user', 'content': 'go'}]}).encode()\n"
        "kind = {'Content-Type': 'application/json'}\n"
        "asked = u.Request('http://model/v1/chat/completions', body, kind)\n"
        "print(json.load(u.urlopen(asked))['choices'][0]['message']['content'])\n"
    )
    conversation, _ = dialogue("hello from the policy")
    episode = ProxiedEpisode(conversation)
    doors = {"model:80": ModelProxy().door(episode)}

    async def work():
        config = SandboxConfig(isolation="best_available", tier="namespaces", doors=doors)
        async with Sandbox(config) as sandbox:
            await sandbox.write_file("agent.py", program)
            return await sandbox.execute("python3 agent.py", timeout=30)

    result = asyncio.run(asyncio.wait_for(work(), 60))
    assert result.stdout == "hello from the policy\n", result
    assert len(conversation.session.chunks) == 1
