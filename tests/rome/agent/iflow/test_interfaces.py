"""The command iflow with its interfaces: the whole agent, put together as for users."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

import pytest

from rome.agent.iflow.specs.settings_values import McpServer
from tests.paths import ROOT
from tests.rome.agent.iflow.mcp_test_server import __file__ as SERVER
from tests.rome.agent.iflow.pseudo_terminal import PseudoTerminal
from tests.rome.agent.iflow.scripted import ScriptedEndpoint, call
from tests.rome.agent.iflow.test_acp import Editor, acp
from tests.rome.agent.iflow.test_mcp_client import Place, tool

pytestmark = pytest.mark.slow


class Home:
    """A project and a home with a skill, a command, a sub-agent and an MCP server."""

    def __init__(self, folder):
        self.project = folder / "project"
        self.home = folder / "home"
        manners = folder / "manners.json"
        manners.write_text(json.dumps({"tools": [tool("echo", "Echoes.")]}))
        server = {"command": sys.executable, "args": [SERVER, str(manners)]}
        self.write("home/.iflow/settings.json", json.dumps({"mcpServers": {"own": server}}))
        self.write(
            "home/.agents/skills/pdf/SKILL.md", "---\nname: pdf\ndescription: Reads.\n---\n."
        )
        self.write("project/.agents/commands/greet.md", "Say hello to $ARGUMENTS.")
        self.write(
            "project/.agents/agents/helper.md", "---\nname: helper\ndescription: Helps.\n---\nHelp."
        )
        self.write("project/a.txt", "one\ntwo\n")

    def write(self, name, text):
        path = self.project.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def environment(self):
        return {**os.environ, "HOME": str(self.home), "PYTHONPATH": str(ROOT)}

    def flags(self, endpoint, *flags):
        return ["-m", "launch.agent", "--workspace=host", f"--base_url={endpoint.url}", *flags]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


EDIT = call("edit", path="a.txt", old_string="two", new_string="2")


@pytest.mark.live
def test_in_a_terminal(home, monkeypatch):
    pytest.importorskip("pyte")
    monkeypatch.setenv("HOME", str(home.home))
    script = [
        call("read_file", path="a.txt"),
        EDIT,
        "It says **2** now.",
        "Hello Ada.",
        call("own__echo"),
        "Echoed.",
    ]
    with ScriptedEndpoint(script) as endpoint:
        arguments = home.flags(endpoint, "-i", "change two to 2")
        with PseudoTerminal(arguments, directory=home.project, columns=100) as screen:
            screen.wait_for("> change two to 2", "-two", "+2", "Allow?", seconds=40)
            screen.enter("y")
            screen.wait_for("It says 2 now.")
            screen.enter("/greet Ada")
            screen.wait_for("Hello Ada.")
            screen.enter("call the server")
            screen.wait_for("own: echo", "Allow?")
            screen.enter("y")
            screen.wait_for("Echoed.")
            for command, shown in [
                ("/mcp", "ready, 1 tools"),
                ("/skills", "Reads."),
                ("/agents", "Helps."),
                ("/rewind 1 both", "went back: conversation and files"),
                ("/cost", "written"),
                ("/feedback accept", "feedback: accept"),
            ]:
                screen.enter(command)
                screen.wait_for(shown)
            assert (home.project / "a.txt").read_text() == "one\ntwo\n"
            screen.enter("/quit")
            assert screen.wait_end(20) == 0
        assert "Say hello to Ada." in json.dumps(endpoint.requests[3])


def test_through_an_editor(home):
    async def play(endpoint):
        editor = Editor()
        arguments = home.flags(endpoint, "--acp")
        async with acp.spawn_agent_process(
            editor,
            sys.executable,
            *arguments,
            cwd=ROOT,
            env=home.environment,
            use_unstable_protocol=True,
        ) as (agent, _):
            await agent.initialize(protocol_version=acp.PROTOCOL_VERSION)
            opened = await agent.new_session(cwd=str(home.project), mcp_servers=[])
            session = opened.session_id
            assert opened.config_options[0].current_value == "scripted"
            prompt = [acp.text_block("change it")]
            done = await agent.prompt(session_id=session, prompt=prompt)
            assert done.stop_reason == "end_turn" and editor.text == "It is done."
            ((asked, _options),) = editor.permissions
            diff = asked.content[-1]
            assert diff.path == str(home.project / "a.txt") and "2" in diff.new_text
            names = {
                one.name for one in editor.of("available_commands_update")[0].available_commands
            }
            assert {"greet", "pdf"} <= names
            (listed,) = (await agent.list_sessions(cwd=str(home.project))).sessions
            where = {"cwd": str(home.project), "mcp_servers": []}
            forked = await agent.fork_session(session_id=session, **where)
            assert forked.session_id != listed.session_id == session
            editor.updates.clear()
            await agent.load_session(session_id=session, **where)
            assert editor.text == "It is done."
            with pytest.raises(acp.RequestError):
                await agent.set_config_option(config_id="model", session_id=session, value="none")
        assert (home.project / "a.txt").read_text() == "one\n2\n"

    with ScriptedEndpoint([call("read_file", path="a.txt"), EDIT, "It is done."]) as endpoint:
        asyncio.run(asyncio.wait_for(play(endpoint), 100))


def test_over_http(home):
    with ScriptedEndpoint(["It is done."]) as endpoint:
        program = subprocess.Popen(
            [sys.executable, *home.flags(endpoint, "--http=0", f"--directory={home.project}")],
            env={**home.environment, "IFLOW_HTTP_TOKEN": "secret"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = re.search(r"http\S+\d", program.stderr.readline())[0]
            headers = {"Authorization": "Bearer secret"}
            body = json.dumps({"text": "do it"}).encode()
            urlopen(Request(f"{url}/prompt", body, headers), timeout=20).read()
            with urlopen(Request(f"{url}/events", headers=headers), timeout=20) as stream:
                assert any(b"It is done." in line for line in iter(stream.readline, b""))
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 4
            assert "Traceback" not in program.stderr.read()
        finally:
            program.kill()
            program.wait()


def test_its_tools_over_mcp(home, tmp_path):
    """Without a model; what the rules would ask about is refused."""
    place = Place(tmp_path)
    flags = ["-m", "launch.agent", "--serve_mcp=stdio", "--workspace=host"]
    config = McpServer(
        "own",
        command=sys.executable,
        args=(*flags, f"--directory={home.project}"),
        env={"HOME": str(home.home), "PYTHONPATH": str(ROOT)},
        cwd=str(ROOT),
        timeout=60,
    )

    async def play():
        async with place.servers([config]) as servers:
            assert not place.notices
            names = {one.name for one in servers.tools}
            assert {"own__shell", "own__read_file", "own__edit"} <= names
            assert not {"own__task", "own__ask_user", "own__exit_plan_mode"} & names
            read = await place.call(servers, "own__read_file", path="a.txt")
            assert "two" in read.output
            written = await place.call(servers, "own__write_file", path="b.txt", content="b")
            assert written.status == "error" and "nobody is here to approve it" in written.output

    asyncio.run(play())
    assert not (home.project / "b.txt").exists()
