"""A model behind a URL: streams, quirks of servers, retries, and clear errors."""

import asyncio
import dataclasses
import json

import pytest

from rome.agent.endpoint import ChatEndpoint
from rome.agent.iflow.models.endpoint_model import EndpointModel, Prices
from rome.agent.iflow.models.model import ModelError
from rome.agent.messages import Call, Message
from tests.rome.agent.iflow.scripted import Break, Fail, Raw, Say, ScriptedEndpoint, call

TOOL = {
    "type": "function",
    "function": {"name": "shell", "description": "Run.", "parameters": {"type": "object"}},
}
HELLO = [Message("system", "be brief"), Message("user", "hello")]


def ask(answers, messages=HELLO, tools=(TOOL,), times=1, stream=True, **options):
    """Return what the model said, the server, and the pieces of text."""
    pieces = []

    async def steps(url):
        endpoint = ChatEndpoint(url, "m", "key", first_wait_seconds=0.01, max_requests=3)
        model = EndpointModel(endpoint, **options)
        try:
            on_text = (lambda text, thought: pieces.append((text, thought))) if stream else None
            said = [await model.ask(messages, tools, on_text=on_text) for _ in range(times)]
            return said[0] if times == 1 else said
        finally:
            await model.aclose()

    with ScriptedEndpoint(answers) as server:
        said = asyncio.run(asyncio.wait_for(steps(server.url), 60))
        return said, server, pieces


@pytest.mark.parametrize("stream", [True, False])
def test_text_thoughts_calls_usage_and_price(stream):
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 600},
    }
    made = [("shell", {"command": "ls"}), ("shell", {"command": 'echo "ü"'})]
    said = Say("I look", made, "hm", usage=usage)
    answer, server, pieces = ask([said], prices=Prices(2.0, 10.0, 0.5), stream=stream)
    assert (answer.text, answer.reasoning, answer.finish) == ("I look", "hm", "tool_calls")
    assert [json.loads(one.arguments) for one in answer.tool_calls] == [given for _, given in made]
    assert dataclasses.astuple(answer.usage) == (1000, 100, 600, pytest.approx(0.0021))
    if stream:
        assert "".join(text for text, thought in pieces if not thought) == "I look"
        assert "".join(text for text, thought in pieces if thought) == "hm"
    assert server.keys == ["Bearer key"]
    assert server.requests[0]["tools"] == [TOOL]


def test_a_broken_stream_and_a_busy_server_are_asked_again():
    retries = []
    script = [Break("half an ans"), Fail(503, "busy"), "whole"]
    answer, server, _ = ask(script, on_retry=lambda *given: retries.append(given))
    assert answer.text == "whole" and len(server.requests) == 3
    assert [number for _, number, _ in retries] == [1, 2]
    assert "busy" in retries[1][0]


def test_a_server_that_stays_broken_is_one_clear_line():
    with pytest.raises(ModelError, match=r"no answer in 3 requests; last: .*busy") as raised:
        ask([Fail(503, "busy")] * 3)
    assert "\n" not in str(raised.value) and "key" not in str(raised.value).lower()


def test_a_conversation_that_is_too_long_is_told_apart():
    refusal = Fail(400, "This model's maximum context length is 4096 tokens")
    with pytest.raises(ModelError) as raised:
        ask([refusal])
    assert raised.value.is_context_full


@pytest.mark.parametrize(
    ("refusal", "member"),
    [
        ("Unrecognized request argument supplied: stream_options", "stream_options"),
        ('"auto" tool choice requires --enable-auto-tool-choice to be set', "tools"),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens"),
    ],
)
def test_what_a_server_does_not_know_is_left_out_from_then_on(refusal, member):
    script = [Fail(400, refusal), "one", "two"]
    said, server, _ = ask(script, times=2, max_tokens=50)
    assert [one.text for one in said] == ["one", "two"]
    first, *others = server.requests
    assert member in first and all(member not in request for request in others)


def test_thoughts_are_not_sent_back_where_they_are_refused():
    history = [*HELLO, Message("assistant", "a", "thought"), Message("user", "more")]
    _, server, _ = ask([Fail(400, "unknown field reasoning_content"), "ok"], history)
    assert server.prompts[0][2]["reasoning_content"] == "thought"
    assert "reasoning_content" not in server.prompts[1][2]


def test_another_refusal_is_an_error_at_once():
    with pytest.raises(ModelError, match="answered 401"):
        ask([Fail(401, "wrong key")])


QWEN3 = '<tool_call>\n{"name": "shell", "arguments": {"command": "ls"}}\n</tool_call>'
CODER = "<tool_call>\n<function=shell>\n<parameter=command>\nls\n</parameter>\n</function>\n"
CODER += "</tool_call>"
GEM = '<tool_call><tool_name>shell</tool_name><arguments>{"command": "ls"}</arguments></tool_call>'


@pytest.mark.parametrize("form", [QWEN3, CODER, GEM])
def test_calls_are_read_from_the_text_where_the_server_reads_none(form):
    answer, _, _ = ask([f"<think>\nhm\n</think>\n\nI look.\n{form}"])
    assert (answer.text, answer.reasoning, answer.finish) == ("I look.", "hm", "tool_calls")
    [made] = answer.tool_calls
    assert made.name == "shell" and json.loads(made.arguments) == {"command": "ls"}


def test_a_call_that_cannot_be_read_is_told():
    answer, _, _ = ask(['<tool_call>\n{"name": "shell", \n</tool_call>'])
    assert answer.tool_calls == () and "not JSON" in answer.malformed
    [_, answer], _, _ = ask([call("shell", command="ls"), "Write <tool_call> to call."], times=2)
    assert answer.malformed == "" and "<tool_call>" in answer.text


def test_a_server_without_tool_calls_is_told_the_tools_in_the_system_text():
    history = [
        *HELLO,
        Message("assistant", "I look", tool_calls=(Call("c1", "shell", '{"command": "ls"}'),)),
        Message("tool", "a.txt", tool_call_id="c1"),
    ]
    answer, server, _ = ask([Fail(400, "this model does not support tools"), QWEN3], history)
    assert answer.tool_calls[0].name == "shell"
    system, _, assistant, result = server.prompts[1]
    assert '"name": "shell"' in system["content"] and system["content"].startswith("be brief")
    assert '{"name": "shell", "arguments": {"command": "ls"}}' in assistant["content"]
    assert result == {"role": "user", "content": "<tool_response>\na.txt\n</tool_response>"}


def test_what_no_server_takes_back_is_written_in_another_way():
    history = [
        *HELLO,
        Message("user", "more \ud800"),
        Message("assistant", tool_calls=(Call("c1", "shell", "{broken"),)),
        Message("tool", "no JSON", tool_call_id="c1"),
    ]
    _, server, _ = ask(["ok"], history)
    _, user, assistant, _ = server.prompts[0]
    assert user["content"] == "hello\n\nmore \ufffd"
    arguments = assistant["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"malformed_arguments": "{broken"}


def test_ids_of_calls_are_unique():
    history = [*HELLO, Message("assistant", tool_calls=(Call("call_0_0", "shell", "{}"),))]
    history.append(Message("tool", "x", tool_call_id="call_0_0"))
    answer, _, _ = ask([Say(calls=[("shell", {}), ("shell", {})])], history)
    ids = {one.id for one in answer.tool_calls}
    assert len(ids) == 2 and "call_0_0" not in ids


def test_an_answer_that_is_cut_is_said_to_be():
    answer, _, _ = ask([Say("<tool_call>\n{", finish="length")])
    assert answer.finish == "length" and answer.malformed == ""


def connect(url, model=""):
    async def steps():
        found = EndpointModel(ChatEndpoint(url, model))
        try:
            await found.connect()
            return found
        finally:
            await found.aclose()

    return asyncio.run(asyncio.wait_for(steps(), 60))


def test_the_only_model_of_a_server_is_taken():
    with ScriptedEndpoint([], model="tiny") as server:
        assert connect(server.url).name == "tiny"


def test_a_server_that_is_not_there_is_one_clear_line():
    with pytest.raises(
        ModelError, match=r"there is no server at http://127.0.0.1:1/v1.*--base_url"
    ):
        connect("http://127.0.0.1:1/v1")


def delta(finish=None, **given):
    return {"choices": [{"index": 0, "delta": given, "finish_reason": finish}]}


def piece(id, name, arguments, **rest):
    return {"id": id, "function": {"name": name, "arguments": arguments}, **rest}


@pytest.mark.parametrize("place", [{}, {"index": 0}])
def test_whole_calls_in_events_of_their_own_stay_apart(place):
    """Some servers give no index, or the same one for all calls."""
    events = [
        delta(tool_calls=[piece(id, "shell", f'{{"command": "{id}"}}', **place)]) for id in "ab"
    ]
    answer, _, _ = ask([Raw([*events, delta("tool_calls"), "data: [DONE]"])])
    made = [(one.id, json.loads(one.arguments)) for one in answer.tool_calls]
    assert made == [("a", {"command": "a"}), ("b", {"command": "b"})]


def test_a_call_whose_id_comes_with_every_piece_is_one():
    parts = ['{"comm', 'and": ', '"ls"}']
    events = [delta(tool_calls=[piece("a", "shell", part, index=0)]) for part in parts]
    answer, _, _ = ask([Raw([*events, delta("tool_calls")])])
    [made] = answer.tool_calls
    assert json.loads(made.arguments) == {"command": "ls"}


def test_a_stream_ends_with_its_mark_though_the_connection_does_not():
    answer, _, _ = ask([Raw([delta(content="hi"), delta("stop"), "data: [DONE]"], wait=60)])
    assert answer.text == "hi"


def test_small_faults_of_a_stream_are_passed_over():
    lines = [": ping", "data:", delta(content="hi"), {"choices": None, "usage": None}]
    answer, server, _ = ask([Raw([*lines, "data: [DONE]"])])
    assert (answer.text, answer.finish, len(server.requests)) == ("hi", "stop", 1)


@pytest.mark.parametrize(
    "lines",
    [
        [delta(content=[{"type": "text", "text": "x"}]), delta("stop")],
        [delta(tool_calls=[piece(5, "shell", "{}")]), delta("stop")],
        ["data: [DONE]"],
        ["<html>busy</html>"],
        [delta(content="half"), {"error": {"message": "out of memory"}}],
    ],
)
def test_what_is_no_answer_is_one_clear_line(lines):
    with pytest.raises(ModelError, match="no answer in 3 requests"):
        ask([Raw(lines)] * 3)


def test_a_context_that_is_found_full_in_the_stream_is_told_apart():
    error = {"error": {"message": "the request exceeds the available context size"}}
    with pytest.raises(ModelError) as raised:
        ask([Raw([error])])
    assert raised.value.is_context_full


def test_a_call_without_a_name_is_the_models_fault():
    answer, server, _ = ask([Raw([delta(tool_calls=[piece("a", "", "{}")]), delta("tool_calls")])])
    assert "name" in answer.malformed and len(server.requests) == 1


def test_a_listener_that_fails_is_no_fault_of_the_connection():
    async def steps(url):
        endpoint = ChatEndpoint(url, "m", first_wait_seconds=0.01, max_requests=3)
        model = EndpointModel(endpoint)
        try:
            await model.ask(HELLO, (), on_text=fail)
        finally:
            await model.aclose()

    def fail(text, is_thought):
        raise BrokenPipeError("nobody reads")

    with ScriptedEndpoint(["a", "b", "c"]) as server:
        with pytest.raises(BrokenPipeError):
            asyncio.run(asyncio.wait_for(steps(server.url), 60))
        assert len(server.requests) == 1
