"""Conversations with an engine over plain HTTP: what the tests of its protocol say and how long
they wait.
"""

import asyncio
import json

import aiohttp

PROMPT = [(7 * i) % 200 + 3 for i in range(40)]  # two whole chunks and a half


def compilations(server) -> int:
    return server.log_path.read_text().count("Finished XLA compilation")


class Missed(Exception):
    """The request that a conversation wanted to disturb had ended before: this process got no turn
    on a busy machine.
    """


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
            return response.status, (
                json.loads(text) if response.content_type == "application/json" else text
            )

    async def post(self, route, body=None):
        return await self.ask("POST", route, body or {})

    async def generate(self, ids=PROMPT, **sampling):
        fields = {
            name: sampling.pop(name)
            for name in (
                "rid",
                "logprob_start_len",
                "return_routed_experts",
                "routed_experts_start_len",
            )
            if name in sampling
        }
        status, answer = await self.post(
            "/generate",
            {
                "input_ids": ids,
                "return_logprob": True,
                "sampling_params": {"max_new_tokens": 12, "ignore_eos": True} | sampling,
                **fields,
            },
        )
        assert status == 200, answer
        return answer

    async def figures(self):
        return (await self.ask("GET", "/server_info"))[1]["internal_states"][0]

    async def until(self, condition):
        idle = 0
        for _ in range(2000):
            figures = await self.figures()
            if condition(figures):
                return figures
            idle = (
                idle + 1
                if figures["running"] == figures["waiting"] == figures["prefilling"] == 0
                else 0
            )
            if idle > 50:
                raise Missed
            await asyncio.sleep(0.003)
        raise AssertionError(f"never came true: {figures}")


def talk(server, conversation):
    """What the conversation returns; begun anew where it missed its moment."""

    async def run():
        async with Http(server) as http:
            return await conversation(http)

    for _ in range(10):
        try:
            return asyncio.run(run())
        except Missed:
            continue
    raise AssertionError("every request had ended before it could be disturbed")


def logprobs_of(answer):
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
