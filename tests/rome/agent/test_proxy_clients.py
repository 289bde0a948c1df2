"""The official clients of OpenAI and Anthropic against the model proxy."""

import asyncio
import json

import pytest

from rome.agent.proxy import ModelProxy, ProxiedEpisode
from tests.rome.agent.test_dialogue import CALL, dialogue
from tests.rome.agent.test_proxy import PARAMETERS

pytestmark = pytest.mark.live
NEEDS = "pip install -r tests/requirements-live.txt"
FUNCTION = {"name": "bash", "description": "runs", "parameters": PARAMETERS}


def run(work, *turns):
    """Run work(url, key, dialogue) beside a proxy with one episode."""
    conversation, engine = dialogue(*turns)

    async def steps():
        proxy = ModelProxy()
        async with proxy.listen() as url:
            return await work(url, proxy.admit(ProxiedEpisode(conversation)), conversation)

    found = asyncio.run(asyncio.wait_for(steps(), 60))
    assert len(engine.requests) == len(conversation.session.chunks)
    assert conversation.counts["context_answers"] == 0
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_holds_a_conversation_with_tools(stream):
    openai = pytest.importorskip("openai", reason=NEEDS)
    tools = [{"type": "function", "function": FUNCTION}]

    async def ask(client, messages):
        if not stream:
            answer = await client.chat.completions.create(
                model="policy", messages=messages, tools=tools
            )
            return answer.choices[0].message.model_dump(exclude_none=True)
        manager = client.chat.completions.stream(model="policy", messages=messages, tools=tools)
        async with manager as pieces:
            async for _ in pieces:
                pass
            answer = await pieces.get_final_completion()
        return answer.choices[0].message.model_dump(exclude_none=True)

    async def work(url, key, conversation):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
            messages = [{"role": "user", "content": "go"}]
            said = await ask(client, messages)
            call = said["tool_calls"][0]
            assert json.loads(call["function"]["arguments"]) == {"b": 1, "a": "x"}
            result = {"role": "tool", "tool_call_id": call["id"], "content": "files"}
            last = await ask(client, [*messages, said, result])
            assert (await client.models.list()).data[0].id == "policy"
            with pytest.raises(openai.BadRequestError, match="cannot be honoured"):
                await client.chat.completions.create(model="m", messages=messages, n=2)
            return last["content"]

    assert run(work, f"look {CALL}", "done") == "done"


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_responses(stream):
    openai = pytest.importorskip("openai", reason=NEEDS)
    tools = [{"type": "function", **FUNCTION}]

    async def ask(client, given):
        if not stream:
            return await client.responses.create(model="policy", input=given, tools=tools)
        async with client.responses.stream(model="policy", input=given, tools=tools) as pieces:
            async for _ in pieces:
                pass
            return await pieces.get_final_response()

    async def work(url, key, conversation):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
            first = [{"role": "user", "content": "go"}]
            answer = await ask(client, first)
            call = answer.output[-1]
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "files"}
            history = [one.model_dump(exclude_none=True) for one in answer.output]
            for one in history:  # what the streaming helper adds
                one.pop("parsed_arguments", None)
                for part in one.get("content") or []:
                    part.pop("parsed", None)
            return (await ask(client, [*first, *history, result])).output_text

    assert run(work, f"<think>\nhm\n</think>\n\nlook {CALL}", "done") == "done"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_holds_a_conversation_with_tools(stream):
    anthropic = pytest.importorskip("anthropic", reason=NEEDS)
    tools = [{"name": "bash", "description": "runs", "input_schema": PARAMETERS}]

    async def ask(client, messages):
        asked = {"model": "policy", "max_tokens": 400, "messages": messages, "tools": tools}
        if not stream:
            return await client.messages.create(**asked)
        async with client.messages.stream(**asked) as pieces:
            return await pieces.get_final_message()

    async def work(url, key, conversation):
        async with anthropic.AsyncAnthropic(base_url=url, api_key=key) as client:
            messages = [{"role": "user", "content": "go"}]
            answer = await ask(client, messages)
            call = answer.content[-1]
            assert call.input == {"b": 1, "a": "x"} and answer.stop_reason == "tool_use"
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "files"}
            said = [block.model_dump(exclude_none=True) for block in answer.content]
            history = [*messages, {"role": "assistant", "content": said}]
            last = await ask(client, [*history, {"role": "user", "content": [result]}])
            with pytest.raises(anthropic.AuthenticationError):
                other = anthropic.AsyncAnthropic(base_url=url, api_key="no", max_retries=0)
                await other.messages.create(model="m", max_tokens=9, messages=messages)
            return last.content[0].text

    assert run(work, f"<think>\nhm\n</think>\n\nlook {CALL}", "done") == "done"
