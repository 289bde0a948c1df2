"""The scripted endpoint says what its script says, streamed or whole."""

import asyncio
import json

import aiohttp

from tests.rome.agent.iflow.scripted import Fail, Say, ScriptedEndpoint


async def post(url, **body):
    async with aiohttp.ClientSession() as session:
        body = {"messages": [{"role": "user", "content": "hello"}]} | body
        async with session.post(f"{url}/chat/completions", json=body) as response:
            return response.status, await response.text()


async def ask(endpoint):
    whole = json.loads((await post(endpoint.url))[1])
    streamed = (await post(endpoint.url, stream=True, stream_options={"include_usage": True}))[1]
    return whole, streamed


def test_streamed_and_whole_answers_are_the_same():
    said = Say("Hello there", [("shell", {"command": "ls"}), ("read_file", "{broken")], "hm")
    with ScriptedEndpoint([said, said, Fail(429, "later"), lambda messages: "last"]) as endpoint:
        whole, streamed = asyncio.run(ask(endpoint))
        assert asyncio.run(post(endpoint.url))[0] == 429
        assert "last" in asyncio.run(post(endpoint.url))[1]
        assert asyncio.run(post(endpoint.url))[0] == 400
    message = whole["choices"][0]["message"]
    events = [json.loads(line[6:]) for line in streamed.split("\n\n") if line[6:7] == "{"]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    arguments = ["", ""]
    for delta in deltas:
        for made in delta.get("tool_calls", []):
            arguments[made["index"]] += made["function"].get("arguments", "")
    assert arguments == [one["function"]["arguments"] for one in message["tool_calls"]]
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert len(endpoint.prompts) == 5
