"""Evaluate an OpenAI-compatible endpoint: python -m examples.06_evaluate_endpoint [URL MODEL]

Without a URL, it starts a tiny endpoint that knows one command.
"""

import asyncio
import sys
import tempfile

from aiohttp import web

from envs.rock import SandboxConfig
from rome.evals.endpoint import Endpoint
from rome.evals.run import evaluate

COMMAND = r'{"command": "rm $(cat note.txt)"}'


async def answer(request: web.Request) -> web.Response:
    """Answer as a model that calls the tool once and then says that it is done."""
    last = (await request.json())["messages"][-1]
    call = {"id": "1", "type": "function", "function": {"name": "bash", "arguments": COMMAND}}
    message = {"content": "done"} if last["role"] == "tool" else {"tool_calls": [call]}
    return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})


async def main(url: str = "", model: str = "tiny") -> None:
    server = web.AppRunner(web.Application())
    server.app.router.add_post("/v1/chat/completions", answer)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    url = url or f"http://127.0.0.1:{server.addresses[0][1]}/v1"
    agent = Endpoint(url, model, SandboxConfig(isolation="best_available"))
    with tempfile.TemporaryDirectory() as out:  # a lasting folder makes the evaluation resumable
        results = await evaluate("terminal:delete_named,count:4", agent, out)
    await server.cleanup()
    for task in results["tasks"]:
        print(f"{task['task']}: {task['ending']}, reward {task['reward']}")
    print("pass@1:", results["pass_at_1"], results["intervals"]["pass_at_1"])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
