"""The agent's client against the official reference servers of MCP, which npm installs."""

import asyncio
import contextlib
import functools
import json
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

from rome.agent.iflow.events import ToolCall
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.specs.settings_values import McpServer
from rome.agent.iflow.tools.base import ToolContext, ToolError, read_arguments
from tests.rome.agent.iflow.doubles import Folder

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.network]
PACKAGES = ("server-everything", "server-filesystem", "server-memory")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return the folder of the servers' commands."""
    pytest.importorskip("mcp")
    if shutil.which("npm") is None:
        pytest.skip("needs npm and node >= 18")
    folder = tmp_path_factory.mktemp("npm")
    names = [f"@modelcontextprotocol/{name}" for name in PACKAGES]
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", folder, *names]
    try:
        subprocess.run(command, check=True, timeout=800, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm cannot install the servers: {error}")
    return folder / "node_modules" / ".bin"


class Silent:
    async def question(self, question, choices=()):
        return ""


async def call(servers, folder, name, **arguments):
    tool = next(tool for tool in servers.tools if tool.name == name)
    context = ToolContext(
        ToolCall("1", name, "{}"), Folder(), lambda event: event, Silent(), str(folder)
    )
    return await tool.run(read_arguments(tool, json.dumps(arguments)), context)


@contextlib.asynccontextmanager
async def opened(folder, *configs):
    notices = []
    servers = MCPServers(configs, notices.append, folder)
    try:
        async with asyncio.timeout(60):
            await servers.start()
        assert not notices, notices
        yield servers, functools.partial(call, servers, folder)
    finally:
        await servers.close()


def test_everything(programs, tmp_path):
    async def play():
        config = McpServer("all", command=str(programs / "mcp-server-everything"), args=("stdio",))
        async with opened(tmp_path, config) as (servers, run):
            assert (await run("all__echo", message="hi")).output == "Echo: hi"
            assert "5" in (await run("all__get-sum", a=2, b=3)).output
            assert "[image, image/png" in (await run("all__get-tiny-image")).output
            listed = await run("mcp_resource")
            uri = listed.output.splitlines()[0].split()[1]
            assert (await run("mcp_resource", uri=uri)).output
            assert f'uri="{uri}"' in await servers.expand(f"read @all:{uri}")
            commands = {prompt.command: prompt for prompt in servers.prompts}
            assert await servers.prompt("all:simple-prompt", "")
            needing = commands["all:args-prompt"]
            assert needing.arguments[0] == "city*"
            assert "Paris" in await servers.prompt("all:args-prompt", "Paris")
            with pytest.raises(ToolError, match="needs city"):
                await servers.prompt("all:args-prompt", "")

    asyncio.run(play())


def test_everything_over_http(programs, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [programs / "mcp-server-everything", "streamableHttp"],
        env={"PORT": str(port), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    async def play():
        config = McpServer("far", url=f"http://127.0.0.1:{port}/mcp")
        async with opened(tmp_path, config) as (_, run):
            assert (await run("far__echo", message="hi")).output == "Echo: hi"
            server.kill()
            server.wait()
            with pytest.raises(ToolError, match="far"):
                await run("far__echo", message="hi")

    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        asyncio.run(play())
    finally:
        server.kill()
        server.wait()


def test_filesystem(programs, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")

    async def play():
        command = str(programs / "mcp-server-filesystem")
        config = McpServer("files", command=command, args=(str(tmp_path),))
        async with opened(tmp_path, config) as (_, run):
            path = str(tmp_path / "a.txt")
            assert "one" in (await run("files__read_text_file", path=path)).output
            await run("files__write_file", path=str(tmp_path / "b.txt"), content="two")
            denied = await run("files__read_text_file", path="/etc/passwd")
            assert denied.status == "error" and "denied" in denied.output

    asyncio.run(play())
    assert (tmp_path / "b.txt").read_text() == "two"


def test_memory(programs, tmp_path):
    file = pathlib.Path(tmp_path / "memory.jsonl")

    async def play():
        command = str(programs / "mcp-server-memory")
        config = McpServer("memory", command=command, env={"MEMORY_FILE_PATH": str(file)})
        async with opened(tmp_path, config) as (_, run):
            entity = {"name": "Ada", "entityType": "person", "observations": ["likes milk"]}
            await run("memory__create_entities", entities=[entity])
            assert "likes milk" in (await run("memory__read_graph")).output

    asyncio.run(play())
    assert "Ada" in file.read_text()
