"""A proxy of the environment carries what leaves this machine, and nothing else."""

import asyncio
import contextlib
import json
import pathlib

import aiohttp
import pytest

from envs.gem.remote import RemoteEnv, RemoteEnvError
from envs.gem.tools.mcp import MCPTool
from envs.proxies import environment_proxy, is_loopback, open_directly
from rome.agent.endpoint import ChatEndpoint
from rome.engine.client import Engine
from rome.engine.errors import EngineError
from rome.engine.mirror import MirrorClient

OUTSIDE = "http://engine.example:30000"


@contextlib.asynccontextmanager
async def listening(monkeypatch):
    """A server that answers every request with {}, and is set as the proxy of the environment.

    Gives its URL and the first lines of the requests: a proxy is asked for whole URLs.
    """
    asked = []

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(head.decode())
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
                b"Connection: close\r\n\r\n{}"
            )
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", url.replace("//", "//user:word@"))
    async with server:
        yield url, asked


async def ask_engine(url):
    async with Engine(url, api_key="key", dead_after_seconds=0.2) as engine:
        await engine.server_info()


async def ask_mirror(url):
    with pytest.raises(EngineError, match=r"answered '\{\}', unlike a launch.mirror|not answer"):
        await MirrorClient(url, seconds=60).fetch(pathlib.Path("/weights"))


async def ask_endpoint(url):
    endpoint = ChatEndpoint(url, "m")
    try:
        assert (await endpoint._post({})).status == 200
    finally:
        await endpoint.close()


async def ask_environment(url):
    env = RemoteEnv(url, "a")
    try:
        assert await env._post("make", {}) == {}
    finally:
        await env._session().close()


async def ask_mcp(url):
    pytest.importorskip("mcp", reason="pip install -r tests/requirements-live.txt")
    tool = MCPTool(f"{url}/mcp", execution_timeout=10)
    with pytest.raises(ConnectionError):  # {} is no answer of an MCP server
        await asyncio.to_thread(tool.get_available_tools)


@pytest.mark.parametrize("ask", [ask_engine, ask_mirror, ask_endpoint, ask_environment, ask_mcp])
def test_only_what_leaves_this_machine_goes_through_the_proxy(monkeypatch, tmp_path, ask):
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))

    async def conversation():
        async with listening(monkeypatch) as (url, asked):
            await ask(url)
            await ask(OUTSIDE)
            # a client may try twice: the requests of the first question, and as many of the second
            here, outside = asked[: len(asked) // 2], asked[len(asked) // 2 :]
            assert here and all(one.split()[1].startswith("/") for one in here)
            assert all(one.split()[1].startswith(OUTSIDE + "/") for one in outside)
            assert all("Proxy-Authorization: Basic dXNlcjp3b3Jk" in one for one in outside)
            assert "secret" not in "".join(asked)
            monkeypatch.setenv("no_proxy", "engine.example")
            with contextlib.suppress(EngineError, RemoteEnvError, aiohttp.ClientError):
                await ask(OUTSIDE)  # directly: the name does not exist
            assert len(asked) == len(here + outside)

    asyncio.run(asyncio.wait_for(conversation(), 60))


def test_the_wait_for_an_embedded_engine_goes_through_no_proxy(monkeypatch):
    async def conversation():
        async with listening(monkeypatch) as (url, asked):
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing is there

            def ask():
                with open_directly(url + "/health", 5.0) as answer:
                    return json.loads(answer.read())

            assert await asyncio.to_thread(ask) == {}
            assert asked[0].startswith("GET /health ")

    asyncio.run(asyncio.wait_for(conversation(), 60))


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://127.0.0.1:30000", True),
        ("http://127.8.0.1/x", True),
        ("http://[::1]:8080", True),
        ("http://localhost:1", True),
        ("http://LOCALHOST", True),
        ("http://a.localhost:1", True),
        ("http://0.0.0.0:1", True),
        ("http://127.0.0.1.example:1", False),
        ("http://10.0.0.1:30000", False),
        ("https://localhost.example", False),
        ("http://user:127.0.0.1@example", False),
    ],
)
def test_loopback_is_told_from_names_that_look_like_it(monkeypatch, url, expected):
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert is_loopback(url) is expected
    assert (environment_proxy(url) is None) is expected
