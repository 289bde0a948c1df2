"""Evaluate an OpenAI-compatible endpoint (python -m examples.06_evaluate_endpoint [URL MODEL]).

Without a URL, it starts a tiny endpoint that knows one command.
"""

import asyncio
import sys
import tempfile

from aiohttp import web

from envs.rock import SandboxConfig
from rome.evals.endpoint import Endpoint
from rome.evals.run import evaluate


async def call_tool_once(request: web.Request) -> web.Response:
    messages = (await request.json())["messages"]
    function = {"name": "bash", "arguments": '{"command": "rm $(cat note.txt)"}'}
    call = {"id": "1", "type": "function", "function": function}
    message = {"content": "done"} if messages[-1]["role"] == "tool" else {"tool_calls": [call]}
    return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})


async def main(url: str = "", model: str = "tiny") -> None:
    server = web.AppRunner(web.Application())
    server.app.router.add_post("/v1/chat/completions", call_tool_once)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", port=0).start()
    url = url or f"http://127.0.0.1:{server.addresses[0][1]}/v1"
    agent = Endpoint(url, model, SandboxConfig(isolation="best_available"))
    with tempfile.TemporaryDirectory() as out:
        results = await evaluate("terminal:delete_named,count:4", agent, out)
    await server.cleanup()
    for task in results["tasks"]:
        print(f"{task['task']}: {task['ending']}, reward {task['reward']}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
