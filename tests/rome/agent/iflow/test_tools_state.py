"""Tools about the session rather than its files: todo, plan, questions, memory, skills, the web."""

import pathlib
import socket

import aiohttp.web
import pytest

from rome.agent.iflow.events import ModeChanged, SkillLoaded, TodoChanged, TodoItem
from rome.agent.iflow.specs.skills import load_skills
from rome.agent.iflow.specs.spec_files import Place
from rome.agent.iflow.tools.ask import APPROVE, APPROVE_EDITS, REJECT, AskUserTool, ExitPlanModeTool
from rome.agent.iflow.tools.base import Tool, schema_of
from rome.agent.iflow.tools.memory import SaveMemoryTool, add_fact
from rome.agent.iflow.tools.skill import SkillTool
from rome.agent.iflow.tools.standard import standard_tools
from rome.agent.iflow.tools.text import Text
from rome.agent.iflow.tools.todo import TodoTool
from rome.agent.iflow.tools.web import WebFetchTool, is_private, to_text
from tests.rome.agent.iflow.places import KINDS, Hand, work


def use(tmp_path, tool, answers=(), state=None, **arguments):
    """Return the result of one call, and the hand that made it."""

    async def body(workspace):
        hand = Hand(workspace, answers, **(state or {}))
        return await hand.use(tool, **arguments), hand

    return work("host", tmp_path, body)


def test_the_list_is_replaced_and_shown(tmp_path):
    items = [
        {"text": "a\n b", "status": "done"},
        {"text": "c", "status": "in_progress"},
        {"text": "d"},
    ]
    result, hand = use(tmp_path, TodoTool(), items=items)
    expected = (TodoItem("a b", "done"), TodoItem("c", "in_progress"), TodoItem("d"))
    assert hand.events == [TodoChanged(items=expected)]
    assert result.output == "[x] a b\n[>] c\n[ ] d"
    shown, _ = use(tmp_path, TodoTool(), state={"todo": expected})
    assert shown.output == result.output
    empty, _ = use(tmp_path, TodoTool(), items=[])
    assert empty.output == "(nothing to do)"


@pytest.mark.parametrize(
    "item, words",
    [
        ({"text": " "}, "each item needs a text"),
        (7, "item 1 of items of todo must be of type object, not 7"),
        (
            {"text": "a", "status": "started"},
            "status of item 1 of items of todo must be one of pending",
        ),
    ],
)
def test_an_item_that_is_none_changes_nothing(tmp_path, item, words):
    result, hand = use(tmp_path, TodoTool(), items=[item])
    assert words in result.output and hand.events == []


def test_a_question_has_its_answer_or_none(tmp_path):
    result, hand = use(
        tmp_path, AskUserTool(), ["blue"], question="Which?", choices=["red", "blue"]
    )
    assert result.output == "The user answers: blue"
    assert hand.questions == [("Which?", ("red", "blue"))]
    silent, _ = use(tmp_path, AskUserTool(), question="Which?")
    assert "There is no answer. Decide by yourself" in silent.output
    wrong, _ = use(tmp_path, AskUserTool(), question="?", choices=[1])
    assert "item 1 of choices of ask_user must be of type string" in wrong.output


@pytest.mark.parametrize(
    "answer, mode, status, ends",
    [
        (APPROVE, "default", "ok", False),
        (APPROVE_EDITS, "accept_edits", "ok", False),
        (REJECT, None, "denied", False),
        ("first the tests", None, "denied", False),
        ("", None, "denied", True),
    ],
)
def test_a_plan_is_carried_out_only_when_the_user_agrees(tmp_path, answer, mode, status, ends):
    state = {"mode": "plan"}
    result, hand = use(tmp_path, ExitPlanModeTool(), [answer], state, plan="1. x")
    assert hand.events == ([ModeChanged(mode=mode)] if mode else [])
    assert (result.status, result.ends_turn) == (status, ends)
    assert "1. x" in hand.questions[0][0]
    assert answer not in ("first the tests",) or answer in result.output


def test_outside_plan_mode_there_is_no_plan_to_leave(tmp_path):
    result, hand = use(tmp_path, ExitPlanModeTool(), [APPROVE], plan="x")
    assert "the mode is default, not plan" in result.output and hand.questions == []


def test_facts_are_remembered_once_under_their_heading(tmp_path):
    user_file = tmp_path / "home" / "IFLOW.md"
    tool = SaveMemoryTool(user_file)
    for _ in range(2):
        use(tmp_path, tool, fact="Tabs,\nnot spaces.")
    use(tmp_path, tool, fact="Second.", scope="user")
    assert user_file.read_text() == "## Memories\n\n- Second.\n- Tabs, not spaces.\n"
    text = Text(
        "# P\r\n\r\n## Memories\r\n\r\n- a\r\n\r\n## Other\r\nb".replace("\r\n", "\n"),
        newline="\r\n",
    )
    assert add_fact(text, "c").encode() == (
        b"# P\r\n\r\n## Memories\r\n\r\n- c\r\n- a\r\n\r\n## Other\r\nb\r\n"
    )
    assert tool.paths({"fact": "x"}) == (str(user_file),)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_the_project_go_where_its_instructions_are(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        tool = SaveMemoryTool(tmp_path / "unused")
        await workspace.write("IFLOW.md", b"# Rules\n")
        result = await hand.use(tool, fact="Run make.", scope="project")
        assert (result.output, result.changed) == ("remembered in IFLOW.md", ("IFLOW.md",))
        assert await workspace.read("IFLOW.md") == b"# Rules\n\n## Memories\n\n- Run make.\n"
        assert "+- Run make." in result.diff
        assert set(result.changed) <= set(tool.paths({"fact": "x", "scope": "project"}))

    work(kind, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skill_is_loaded_with_its_files(kind, tmp_path):
    folder = tmp_path / "user" / "skills" / "pdf"
    (folder / "scripts").mkdir(parents=True)
    (folder / "SKILL.md").write_text("---\nname: pdf\ndescription: d\n---\nRun scripts/x.sh\n")
    (folder / "scripts" / "x.sh").write_text("echo from the skill\n")
    (folder / "leak").symlink_to("/etc/passwd")
    skills, problems = load_skills([Place(tmp_path / "user", "user")])
    assert not problems

    async def body(workspace):
        hand = Hand(workspace)
        result = await hand.use(SkillTool(skills), name="pdf")
        assert "Run scripts/x.sh" in result.output
        place = result.output.split("relative to ")[1].split(".\n")[0]
        said = await workspace.execute(f"cd {place}; bash scripts/x.sh", timeout=9)
        assert said.output == "from the skill\n"
        if kind == "sandbox":
            assert await workspace.stat(f"{place}/leak") is None
        assert hand.events == [SkillLoaded(name="pdf")]
        assert (
            "there is no skill 'x'; there are pdf"
            in (await hand.use(SkillTool(skills), name="x")).output
        )

    work(kind, tmp_path, body)


# -- the web

PAGE = """<html><head><title>t</title></head><body><h1>Hi</h1><p>a <b>b</b></p>
<ul><li><a href='/x'>link</a></ul><script>bad()</script></body></html>"""


def serve(tmp_path, tool, path):
    """Return what a tool says of a page of a real server."""

    async def page(request):
        answers = {
            "/page": (PAGE, "text/html"),
            "/long": ("line\n" * 20_000, "text/plain"),
            "/image": ("x", "image/png"),
        }
        if request.path == "/inside":
            raise aiohttp.web.HTTPFound("http://127.0.0.1:9/secret")
        if request.path == "/round":
            raise aiohttp.web.HTTPFound("/round")
        if request.path not in answers:
            raise aiohttp.web.HTTPNotFound(text="nothing here")
        text, kind = answers[request.path]
        return aiohttp.web.Response(text=text, content_type=kind)

    async def body(workspace):
        app = aiohttp.web.Application()
        app.router.add_get("/{path:.*}", page)
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            result = await Hand(workspace).use(tool, url=f"http://127.0.0.1:{port}{path}")
            whole = await workspace.read(result.file) if result.file else b""
            return result, whole
        finally:
            await runner.cleanup()

    return work("host", tmp_path, body)


def test_a_page_is_read_as_text(tmp_path):
    tool = WebFetchTool(allows_private=True)
    assert serve(tmp_path, tool, "/page")[0].output == "# Hi\n\na b\n\n- link (/x)"
    result, whole = serve(tmp_path, tool, "/long")
    assert len(result.output) < 31_000 and whole == b"line\n" * 20_000
    assert "image/png, and no text" in serve(tmp_path, tool, "/image")[0].output
    missing = serve(tmp_path, tool, "/none")[0]
    assert (missing.status, missing.output) == ("error", "nothing here")
    assert "more than 5 redirects" in serve(tmp_path, tool, "/round")[0].output
    assert "cannot be fetched" in serve(tmp_path, tool, "/inside")[0].output


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://inner.test/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/meta",
        "http://0/",
        "http://10.1.2.3:80/",
    ],
)
def test_addresses_inside_a_network_are_refused(tmp_path, url, monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *arguments, **named):
        return real("10.9.8.7" if host == "inner.test" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    result, _ = use(tmp_path, WebFetchTool(), url=url)
    assert result.status == "error" and "inside a network" in result.output


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/", "x", "http://"])
def test_only_addresses_of_the_web_are_fetched(tmp_path, url):
    result, _ = use(tmp_path, WebFetchTool(), url=url)
    assert "no address that begins with http" in result.output


def test_public_addresses_and_names_are_not_private():
    assert not any(map(is_private, ["8.8.8.8", "example.org", "2606:4700::1111"]))
    assert to_text("<head><title>x</head><body>a<br>b") == "a\nb"


# -- all of them


def test_every_tool_is_complete_and_has_its_name_once():
    tools: list[Tool] = standard_tools(has_web=True, user_memory=pathlib.Path("x"))
    names = [tool.name for tool in tools]
    assert len(set(names)) == len(names) == 16
    for tool in tools:
        function = schema_of(tool)["function"]
        assert function["description"] and function["parameters"]["type"] == "object"
        assert set(function["parameters"].get("required", ())) <= set(
            function["parameters"]["properties"]
        )
        assert tool.summary({}) and tool.access({}) in (
            "none",
            "read",
            "write",
            "execute",
            "network",
        )
        assert not tool.is_parallel or tool.access({}) in ("none", "read", "network")
    assert "web_fetch" not in [tool.name for tool in standard_tools()]
