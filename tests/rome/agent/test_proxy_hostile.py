"""What unusual and hostile clients send to the model proxy: refused by name, never an accident."""

import asyncio
import itertools
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent import dialogue as dialogues
from rome.agent import proxy as proxies
from rome.agent.dialects import openai_responses
from rome.agent.proxy import Budget
from rome.model.tokenizer.template import _unused_character
from tests.rome.agent.test_dialogue import CALL, CHAT
from tests.rome.agent.test_proxy import (
    CHAT as CHAT_PATH,
)
from tests.rome.agent.test_proxy import (
    HELLO,
    MESSAGES,
    RESPONSES,
    WRITERS,
    run,
)

HALF = '<tool_call>\n{"name": "bash", "arguments": {"command": "\\ud83d"}}\n</tool_call>'
DEEP = "[" * 900 + "]" * 900


def user(text):
    return {"messages": [{"role": "user", "content": text}]}


def post_raw(data, path=CHAT_PATH, **headers):
    """The status and the error of a request whose body is these bytes."""

    async def work(place, episode, key):
        headers["Authorization"] = f"Bearer {key}"
        async with place.http.post(place.url + path, data=data, headers=headers) as response:
            return response.status, await response.json()

    return run(work, "never")[0]


# -- bodies


@pytest.mark.parametrize("path", WRITERS)
def test_half_a_surrogate_pair_that_the_policy_spelt_is_streamed(path):
    async def work(place, episode, key):
        return await place.stream(path, next(WRITERS[path]({})), key)

    text, _ = run(work, HALF)
    assert "ud83d" in text and ("[DONE]" in text or "message_stop" in text or "completed" in text)


def test_what_is_nested_too_deep_is_refused():
    function = f'{{"name": "a", "parameters": {{"a": {DEEP}}}}}'
    tools = f'[{{"type": "function", "function": {function}}}]'
    asked = f'{{"messages": [{{"role": "user", "content": "x"}}], "tools": {tools}}}'
    status, answer = post_raw(asked.encode())
    assert status == 400 and "nested too deep" in answer["error"]["message"]


def test_deep_arguments_of_an_agents_own_are_text():
    call = {"id": "a", "function": {"name": "b", "arguments": f'{{"a": {DEEP}}}'}}
    asked = [{"role": "user"}, {"role": "assistant", "tool_calls": [call]}, {"role": "tool"}]

    async def work(place, episode, key):
        return await place.post(CHAT_PATH, {"messages": asked}, key)

    (status, answer), _ = run(work, "one", max_context=6000)
    assert status == 200, answer


def test_a_body_that_is_not_compressed_as_it_says_is_refused():
    status, answer = post_raw(b"no gzip", **{"Content-Encoding": "gzip"})
    assert (status, answer["error"]["code"]) == (400, "invalid_body")


def test_a_body_that_does_not_come_is_refused(monkeypatch):
    monkeypatch.setattr(proxies, "BODY_SECONDS", 0.2)

    async def stalling():
        yield b'{"messages": '
        await asyncio.sleep(600)  # longer than this test may take

    status, answer = post_raw(stalling())
    assert (status, answer["error"]["code"]) == (408, "timeout")


def test_bodies_that_one_episode_sends_at_once_are_bounded(monkeypatch):
    monkeypatch.setattr(proxies, "MAX_BODIES_BYTES", 5000)

    async def work(place, episode, key):
        found = [await place.post(CHAT_PATH, user("x" * 6000), key)]
        found += [await place.post(CHAT_PATH, user("x" * 400), key) for _ in range(20)]
        return found, episode.bytes_in_flight

    (found, left), _ = run(work, "one")
    assert found[0][0] == 503 and found[0][1]["error"]["code"] == "too_much_at_once"
    assert {status for status, _ in found[1:]} == {200} and left == 0


def test_a_count_of_retries_that_is_no_count_is_passed_over():
    async def work(place, episode, key):
        return await place.post(CHAT_PATH, HELLO, key, **{"x-stainless-retry-count": "9" * 5000})

    assert run(work, "one")[0][0] == 200


def test_a_chat_that_the_template_cannot_write_is_the_agents_error(monkeypatch):
    def refuse(messages, chat):
        raise ValueError("the template takes tables")

    monkeypatch.setattr(dialogues, "opening_ids", refuse)

    async def work(place, episode, key):
        counted = await place.post(proxies.COUNT_PATH, HELLO, key)
        return counted, await place.post(CHAT_PATH, HELLO, key)

    for status, answer in run(work, "never")[0]:
        assert status == 400 and "the template takes tables" in answer["error"]["message"]


# -- size


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch):
    monkeypatch.setattr(dialogues, "opening_ids", lambda messages, chat: 1 / 0)

    long = {"messages": [{"role": "user", "content": "word " * 100_000}]}
    tool = {"type": "function", "function": {"name": "a", "description": "word " * 100_000}}
    system = {"role": "system", "content": "word " * 100_000}
    asked = [
        (CHAT_PATH, long),
        (CHAT_PATH, user("go") | {"tools": [tool]}),
        (CHAT_PATH, {"messages": [system, *user("go")["messages"]]}),
        (proxies.COUNT_PATH, long),
    ]

    async def work(place, episode, key):
        return [await place.post(path, body, key) for path, body in asked]

    for status, answer in run(work, "never")[0]:
        assert status == 400 and "no room left in a context" in answer["error"]["message"]


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(["a", "\u0301", "\u0323", " ", "\n", "ω", "\u0345", "\u0313", "ᄒ"])
        )
        .map("".join)
        .map(lambda text: text * 20),
    )
)
def test_a_text_has_at_least_as_many_tokens_as_the_bound_says(text):
    tokenizer = CHAT.tokenizer
    bound = len(text) / (dialogues.MOST_COMPOSED * tokenizer.longest)
    assert len(tokenizer.encode(text)) >= bound


def test_a_long_text_is_tokenised_beside_the_event_loop(monkeypatch):
    def slow(messages, chat):
        time.sleep(0.5)
        return [3, 4, 5]

    monkeypatch.setattr(dialogues, "opening_ids", slow)
    monkeypatch.setattr(dialogues, "LONG", 10)

    async def work(place, episode, key):
        asking = asyncio.ensure_future(place.post(CHAT_PATH, user("word " * 10), key))
        ticks = 0
        while not asking.done():
            await asyncio.sleep(0.02)
            ticks += 1
        return ticks, await asking

    (ticks, (status, _)), _ = run(work, "one")
    assert status == 200 and ticks > 3


def test_a_text_that_is_tokenised_lets_other_threads_run():
    ticks = []
    thread = threading.Thread(target=CHAT.tokenizer.encode, args=("ab1 " * 50_000,))
    thread.start()
    while thread.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.002)
    longest = max(after - before for before, after in itertools.pairwise(ticks))
    assert longest < 0.5 * (ticks[-1] - ticks[0])


def test_the_texts_of_an_episode_are_bounded_over_all_its_branches(monkeypatch):
    monkeypatch.setattr(dialogues, "MAX_CHARACTERS", 1000)

    async def work(place, episode, key):
        return [await place.post(CHAT_PATH, user(f"{n}" * 300), key) for n in range(5)]

    found, _ = run(work, *"12345", max_context=5000)
    assert [status for status, _ in found] == [200, 200, 200, 400, 400]
    assert found[-1][1]["error"]["code"] == "too_many_messages"


def test_the_mark_of_a_template_is_in_no_text():
    text = "".join(map(chr, range(0xFDD0, 0x20000)))
    assert _unused_character([text]) == chr(0x20000)


# -- budgets


def test_calls_at_once_do_not_exceed_the_budget_and_a_retry_is_answered_after_it():
    gate = asyncio.Event()

    async def work(place, episode, key):
        asking = [asyncio.ensure_future(place.post(CHAT_PATH, user(str(n)), key)) for n in range(5)]
        while episode.dialogue.counts["calls"] < 3 or sum(one.done() for one in asking) < 2:
            await asyncio.sleep(0.01)
        gate.set()
        found = await asyncio.gather(*asking)
        answered = [n for n, (status, _) in enumerate(found) if status == 200]
        again = await place.post(CHAT_PATH, user(str(answered[-1])), key)
        return found, again

    (found, again), engine = run(work, *"12345", gate=gate, budget=Budget(calls=3))
    assert sorted(status for status, _ in found) == [200, 200, 200, 400, 400]
    assert len(engine.requests) == 3 and again[0] == 200


def test_a_client_that_leaves_amid_a_stream_leaves_nothing_open(monkeypatch):
    monkeypatch.setattr(proxies, "FIRST_PING_SECONDS", 0.05)
    monkeypatch.setattr(proxies, "PING_SECONDS", 0.05)
    gate = asyncio.Event()

    async def work(place, episode, key):
        body = {**HELLO, "stream": True}
        headers = {"x-api-key": key}
        async with place.http.post(place.url + MESSAGES, json=body, headers=headers) as response:
            assert b"ping" in await response.content.readline()
            response.close()
        while episode.is_working:
            await asyncio.sleep(0.01)
        gate.set()
        status, answer = await place.post(MESSAGES, HELLO, key)
        return status, answer["content"][0]["text"]

    found, engine = run(work, "one", gate=gate)
    assert found == (200, "one") and len(engine.requests) == 1


# -- calls in unusual shapes, and conversations by reference


@pytest.mark.parametrize("arguments", [{"b": 1, "a": "x"}, '{"a":"x","b":1.0}'])
@pytest.mark.parametrize("path", [CHAT_PATH, RESPONSES])
def test_a_call_comes_back_as_text_or_as_an_object(path, arguments):
    async def work(place, episode, key):
        answer = {}
        bodies = WRITERS[path](answer)
        answer |= (await place.post(path, next(bodies), key))[1]
        if path == CHAT_PATH:
            call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
        else:
            call = answer["output"][-1]
        call["arguments"] = arguments
        status, _ = await place.post(path, next(bodies), key)
        return status, episode.dialogue.counts["context_answers"]

    assert run(work, f"look {CALL}", "done")[0] == (200, 0)


def test_responses_go_on_from_the_one_that_they_name():
    """The record is that of a client which sends everything."""

    async def work(place, episode, key):
        _, first = await place.post(RESPONSES, {"input": "go", "instructions": "be"}, key)
        call = first["output"][-1]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "files"}
        asked = {"instructions": "be", "previous_response_id": first["id"], "input": [result]}
        _, second = await place.post(RESPONSES, asked, key)
        asked = {"instructions": "be", "previous_response_id": second["id"], "input": "more"}
        status, third = await place.post(RESPONSES, {**asked, "stream": False}, key)
        assert status == 200, third
        return episode.dialogue

    conversation, _ = run(work, f"<think>\nhm\n</think>\n\nlook {CALL}", "done", "last")
    chunks = conversation.session.chunks
    assert [chunk.edge for chunk in chunks] == ["continuation"] * 3
    assert conversation.counts["context_answers"] == 0 and chunks[0].observation == "files"


def test_items_may_be_referred_to_by_their_ids():
    async def work(place, episode, key):
        _, first = await place.post(RESPONSES, {"input": "go"}, key)
        result = {"type": "function_call_output", "call_id": "call_0_0", "output": "files"}
        kept = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
        asked = {"input": [{"role": "user", "content": "go"}, *kept, result]}
        status, _ = await place.post(RESPONSES, asked, key)
        return status, episode.dialogue.counts["context_answers"]

    assert run(work, f"look {CALL}", "done")[0] == (200, 0)


def test_responses_that_are_not_kept_or_forgotten_are_not_gone_on_from(monkeypatch):
    monkeypatch.setattr(openai_responses, "MAX_KEPT_BYTES", 100)

    async def work(place, episode, key):
        _, secret = await place.post(RESPONSES, {"input": "a", "store": False}, key)
        _, old = await place.post(RESPONSES, {"input": "b"}, key)
        _, new = await place.post(RESPONSES, {"input": "c" * 80}, key)
        return [
            await place.post(RESPONSES, {"previous_response_id": one["id"], "input": "x"}, key)
            for one in (secret, old, new)
        ]

    found, _ = run(work, *"12345")
    assert [status for status, _ in found] == [400, 400, 200]
    assert "send the whole conversation" in json.dumps(found[0][1])
