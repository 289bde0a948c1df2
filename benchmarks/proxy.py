r"""Measure what the model proxy adds to a call of an engine, with many episodes at once.

python -m benchmarks.proxy --json proxy.json [--sessions 64] [--turns 12]

Each of the agents, in a process of their own, holds a conversation of growing length over HTTP, a
connection each: it asks, thinks for a quarter of a second, and asks with the answer and a tool's
result appended. The engine is a sleep of a fixed time that returns a fixed number of tokens, so
what a call takes beyond that time is the proxy's, the network's and the agent's own: `overhead_ms`.
The rival of the same run is the same HTTP server without a proxy behind it, which answers after the
same sleep with a body of the same size: `bare_ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp import web
from rich.console import Console

from rome.agent.dialogue import Dialogue
from rome.agent.proxy import ModelProxy, ProxiedEpisode
from rome.agent.session import Session
from rome.engine.completion import Completion, Sampling
from rome.model.tokenizer import TINY, Chat, Tokenizer

ENGINE_SECONDS = 0.05
THINK_SECONDS = 0.25
TURNS_AT_FIRST = 2  # of each conversation that are not counted
SAID = "The folder holds three files, and the second one is the log. I look at its end."
RESULT = "2026-01-01 12:00:00 INFO worker 3 took job 17 and finished it in 0.8 s\n" * 6
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run a command.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
        },
    }
]


class SleepingEngine:
    """Answers each call after a fixed time with the same tokens."""

    def __init__(self, chat: Chat) -> None:
        call = {"name": "bash", "arguments": {"command": "tail log"}}
        text = f"{SAID}\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
        self._ids = chat.turn(text)[:-1]

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        await asyncio.sleep(ENGINE_SECONDS)
        ids = list(self._ids)
        return Completion(ids, [-0.5] * len(ids), "stop", [(1, 0, len(ids))])


async def hold_conversation(url: str, key: str, turns: int, delay: float) -> list[float]:
    """Ask again and again as an agent does; return the seconds of each counted call."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are an agent with a shell."},
        {"role": "user", "content": f"Task {key[-8:]}: find the fault in the log."},
    ]
    headers = {"Authorization": f"Bearer {key}"}
    times = []
    await asyncio.sleep(delay)
    async with aiohttp.ClientSession(headers=headers) as http:
        for turn in range(turns):
            body = {"model": "policy", "messages": messages, "tools": TOOLS}
            began = time.perf_counter()
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                answer = await response.json()
            if turn >= TURNS_AT_FIRST:
                times.append(time.perf_counter() - began)
            said = answer["choices"][0]["message"]
            messages.append(said)
            for call in said["tool_calls"]:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": RESULT})
            await asyncio.sleep(THINK_SECONDS)
    return times


async def run_agents(url: str, keys: Sequence[str], turns: int) -> list[float]:
    """Run all agents at once, spread over the time of one turn; return the seconds of all calls."""
    spread = (ENGINE_SECONDS + THINK_SECONDS) / len(keys)
    talks = [hold_conversation(url, key, turns, n * spread) for n, key in enumerate(keys)]
    return [seconds for times in await asyncio.gather(*talks) for seconds in times]


async def measure_url(url: str, keys: Sequence[str], turns: int) -> list[float]:
    """Let agents in a process of their own ask at a URL; return the seconds of their calls."""
    asked = json.dumps({"url": url, "keys": list(keys), "turns": turns})
    command = [sys.executable, "-m", "benchmarks.proxy", "--agents", asked]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the agents ended with status {process.returncode}")
    times: list[float] = json.loads(out)
    return times


async def measure_proxy(sessions: int, turns: int) -> list[float]:
    """Return the seconds of calls through the proxy."""
    chat = Chat(Tokenizer.load(TINY))
    engine = SleepingEngine(chat)
    proxy = ModelProxy()
    async with proxy.listen() as url:
        keys = []
        for number in range(sessions):
            session = Session(
                engine,
                chat.tokenizer,
                seed=number,
                max_context=1 << 20,
                max_new_tokens=4096,
                completion_seconds=60.0,
            )
            keys.append(proxy.admit(ProxiedEpisode(Dialogue(session, chat))))
        return await measure_url(url, keys, turns)


async def measure_bare(sessions: int, turns: int) -> list[float]:
    """Return the seconds of calls of a server that sleeps and answers, without a proxy."""
    call = {"name": "bash", "arguments": json.dumps({"command": "tail log"})}
    message = {
        "role": "assistant",
        "content": SAID,
        "tool_calls": [{"id": "call_0_0", "type": "function", "function": call}],
    }

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.json()
        await asyncio.sleep(ENGINE_SECONDS)
        return web.json_response({"choices": [{"index": 0, "message": message}]})

    server = web.Server(answer)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    async with listening:
        where = listening.sockets[0].getsockname()
        keys = [f"sk-{number}" for number in range(sessions)]
        return await measure_url(f"http://{where[0]}:{where[1]}", keys, turns)


def overhead(times: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile of what calls took beyond the engine's time."""
    beyond = sorted(1000 * (seconds - ENGINE_SECONDS) for seconds in times)
    return {"p50": statistics.median(beyond), "p99": beyond[int(0.99 * len(beyond))]}


async def measure(sessions: int, turns: int) -> dict[str, Any]:
    """Run both and return what --json writes."""
    bare = overhead(await measure_bare(sessions, turns))
    ours = overhead(await measure_proxy(sessions, turns))
    return {
        "sessions": sessions,
        "turns": turns,
        "overhead_ms_p50": ours["p50"],
        "overhead_ms_p99": ours["p99"],
        "bare_ms_p50": bare["p50"],
        "bare_ms_p99": bare["p99"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--agents", help=argparse.SUPPRESS)  # of the process with the agents
    flags = parser.parse_args(argv)
    if flags.agents:
        print(json.dumps(asyncio.run(run_agents(**json.loads(flags.agents)))))
        return
    found = asyncio.run(measure(flags.sessions, flags.turns))
    Console(highlight=False).print(
        f"{found['sessions']} episodes at once. Beyond the engine's time a call takes"
        f" {found['overhead_ms_p50']:.1f} ms (99th percentile {found['overhead_ms_p99']:.1f});"
        f" a bare HTTP server {found['bare_ms_p50']:.1f} ms ({found['bare_ms_p99']:.1f})."
    )
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
