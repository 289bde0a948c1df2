"""The agent over ACP, driven by the SDK's client through a real process."""

import asyncio
import contextlib
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paths import ROOT
from tests.rome.agent.iflow.test_mcp_client import SERVER

acp = pytest.importorskip("acp")
from acp import schema  # noqa: E402

from rome.agent.iflow.protocols.acp_updates import diff_contents  # noqa: E402
from rome.agent.iflow.tools.text import unified_diff  # noqa: E402


class Editor:
    """A client that answers as a test says, and keeps what it is sent."""

    def __init__(self):
        self.updates = []
        self.permissions = []
        self.choice = "allow"
        self.seen = asyncio.Event()

    def on_connect(self, conn):
        """Do nothing."""

    async def session_update(self, session_id, update, **kwargs):
        self.updates.append((session_id, update))
        self.seen.set()

    async def request_permission(self, session_id, tool_call, options, **kwargs):
        self.permissions.append((tool_call, options))
        if self.choice not in [option.option_id for option in options]:
            outcome = schema.DeniedOutcome(outcome="cancelled")
        else:
            outcome = schema.AllowedOutcome(outcome="selected", option_id=self.choice)
        return schema.RequestPermissionResponse(outcome=outcome)

    def of(self, kind):
        """Return the updates of a kind."""
        return [one for _, one in self.updates if one.session_update == kind]

    @property
    def text(self):
        return "".join(one.content.text for one in self.of("agent_message_chunk"))


@contextlib.asynccontextmanager
async def connected(folder):
    editor = Editor()
    arguments = ("-m", "tests.rome.agent.iflow.opened", "acp", str(folder / "sessions"))
    async with acp.spawn_agent_process(
        editor,
        sys.executable,
        *arguments,
        cwd=ROOT,
        env=dict(os.environ),
        use_unstable_protocol=True,
    ) as (agent, _):
        answer = await agent.initialize(protocol_version=acp.PROTOCOL_VERSION)
        assert answer.agent_capabilities.load_session
        yield editor, agent


def play(body, folder):
    async def run():
        async with asyncio.timeout(60), connected(folder) as (editor, agent):
            await body(editor, agent)

    asyncio.run(run())


async def say(agent, session, *lines):
    prompt = [acp.text_block("\n".join(lines))]
    return await agent.prompt(session_id=session, prompt=prompt)


LINES = st.lists(
    st.sampled_from(["", "a", "b", "--- a", "+++ b", "-- c", "++ d", "@@ -1 +1 @@", "\\ no"])
)


@given(LINES, LINES, st.booleans())
def test_a_diff_has_the_old_and_the_new_text(old, new, is_ended):
    before, after = ("".join(f"{line}\n" for line in lines) for lines in (old, new))
    if not is_ended:
        before, after = before.removesuffix("\n"), after.removesuffix("\n")
    contents = diff_contents(unified_diff("b/x.py", before, after), "/project")
    assert all(one.path == "/project/b/x.py" for one in contents)
    whole = before
    for one in reversed(contents):
        place = whole.rindex(one.old_text or "")
        whole = whole[:place] + one.new_text + whole[place + len(one.old_text or "") :]
    assert whole == after or len(contents) > 1  # with several, a text may fit at several places


@pytest.mark.long
def test_a_turn_with_thoughts_a_plan_a_permission_and_a_diff(tmp_path):
    async def body(editor, agent):
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        opened = await agent.new_session(cwd=str(tmp_path), mcp_servers=[])
        assert opened.modes.current_mode_id == "default" and len(opened.modes.available_modes) == 4
        done = await say(
            agent,
            opened.session_id,
            'call todo {"items": ["look", "write"]}',
            'call write_file {"path": "a.txt", "content": "one\\n2\\n"}',
            "think hard",
            "say finished",
        )
        assert done.stop_reason == "end_turn" and done.usage.output_tokens == 150
        assert editor.text == "finished"
        assert editor.of("agent_thought_chunk")[0].content.text == "hard"
        plan = editor.of("plan")[0].entries
        assert [(one.content, one.status) for one in plan] == [
            ("look", "completed"),
            ("write", "in_progress"),
        ]
        ((asked, options),) = editor.permissions
        assert asked.title == "Write a.txt"
        assert asked.content[1].path == str(tmp_path / "a.txt")
        assert (asked.content[1].old_text, asked.content[1].new_text) == ("one\ntwo\n", "one\n2\n")
        assert [one.kind for one in options] == [
            "allow_once",
            "allow_always",
            "reject_once",
            "reject_once",
        ]
        states = [
            (one.status, one.kind)
            for _, one in editor.updates
            if getattr(one, "tool_call_id", "") == asked.tool_call_id
        ]
        assert states == [("pending", "edit"), ("in_progress", None), ("completed", None)]
        assert (tmp_path / "a.txt").read_text() == "one\n2\n"
        usage = editor.of("usage_update")[-1]
        assert (usage.used, usage.size, usage.cost.amount) == (1050, 8000, 0.75)

    play(body, tmp_path)


@pytest.mark.slow
def test_denials_modes_models_and_endings(tmp_path):
    async def body(editor, agent):
        opened = await agent.new_session(cwd=str(tmp_path), mcp_servers=[])
        session = opened.session_id
        command = 'call shell {"command": "echo ran"}'
        editor.choice = "deny"
        await say(agent, session, command, "say a")
        assert editor.of("tool_call_update")[-1].status == "failed"
        editor.choice = "stop"
        assert (await say(agent, session, command, "say b")).stop_reason == "cancelled"
        editor.choice = "always"
        await say(agent, session, command, "say c")
        await say(agent, session, command, "say d")
        assert len(editor.permissions) == 3 and editor.text == "acd"
        assert editor.of("tool_call_update")[-1].raw_output == {"status": "ok", "exitCode": 0}
        await agent.set_session_mode(session_id=session, mode_id="plan")
        await say(agent, session, 'call write_file {"path": "x", "content": ""}', "say e")
        assert editor.of("current_mode_update")[0].current_mode_id == "plan"
        assert not (tmp_path / "x").exists()
        changed = await agent.set_config_option(
            config_id="model", session_id=session, value="other"
        )
        assert changed.config_options[0].current_value == "other"
        for wrong in (
            agent.set_session_mode(session_id=session, mode_id="nothing"),
            agent.set_config_option(config_id="model", session_id=session, value="nothing"),
            agent.new_session(cwd="relative", mcp_servers=[]),
            agent.load_session(cwd=str(tmp_path), session_id="nothing", mcp_servers=[]),
            say(agent, "nothing", "say x"),
            say(agent, session, "/nothing"),
            say(agent, session, "fail the endpoint is gone"),
        ):
            with pytest.raises(acp.RequestError):
                await wrong

    play(body, tmp_path)


@pytest.mark.slow
def test_a_cancelled_turn_ends_at_once_and_the_session_goes_on(tmp_path):
    async def body(editor, agent):
        session = (await agent.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        working = asyncio.create_task(say(agent, session, "slow " + "word " * 400))
        while "word" not in editor.text:
            await editor.seen.wait()
            editor.seen.clear()
        with pytest.raises(acp.RequestError):
            await say(agent, session, "say meanwhile")
        await agent.cancel(session_id=session)
        assert (await working).stop_reason == "cancelled"
        editor.updates.clear()
        await say(agent, session, "say again")
        assert editor.text == "again"

    play(body, tmp_path)


@pytest.mark.slow
def test_sessions_are_listed_loaded_resumed_and_forked(tmp_path):
    async def first(editor, agent):
        session = (await agent.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        await say(agent, session, "say hello", "say nothing more")

    async def second(editor, agent):
        (listed,) = (await agent.list_sessions(cwd=str(tmp_path))).sessions
        assert listed.title.startswith("say hello") and listed.cwd == str(tmp_path)
        where = {"cwd": str(tmp_path), "session_id": listed.session_id, "mcp_servers": []}
        forked = await agent.fork_session(**where)
        assert forked.session_id != listed.session_id and not editor.text
        await agent.load_session(**where)
        assert editor.of("user_message_chunk")[0].content.text.startswith("say hello")
        assert editor.text == "hello"
        editor.updates.clear()
        await agent.resume_session(**where)
        assert not editor.text
        await say(agent, listed.session_id, "say on it goes")
        await say(agent, forked.session_id, "say apart")
        assert {one for one, _ in editor.updates} == {listed.session_id, forked.session_id}
        await agent.close_session(session_id=forked.session_id)
        assert len((await agent.list_sessions()).sessions) == 2

    play(first, tmp_path)
    play(second, tmp_path)


@pytest.mark.slow
def test_servers_of_the_client_and_files_that_are_mentioned(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    manners = tmp_path / "manners.json"
    manners.write_text('{"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}')
    server = schema.McpServerStdio(
        name="own", command=sys.executable, args=[str(SERVER), str(manners)], env=[]
    )

    async def body(editor, agent):
        session = (await agent.new_session(cwd=str(tmp_path), mcp_servers=[server])).session_id
        await say(agent, session, "call own__echo", "say done @a.txt")
        said = [
            one.content[0].content.text
            for one in editor.of("tool_call_update")
            if one.content and one.content[0].type == "content"
        ]
        assert "echo: {}" in said
        assert "done @a.txt" in editor.text

    play(body, tmp_path)


@pytest.mark.slow
def test_a_question_with_choices_is_a_permission(tmp_path):
    async def body(editor, agent):
        session = (await agent.new_session(cwd=str(tmp_path), mcp_servers=[])).session_id
        editor.choice = "red"
        question = 'call ask_user {"question": "Which?", "choices": ["red", "blue"]}'
        await say(agent, session, question, 'call ask_user {"question": "Why?"}', "say done")
        texts = [
            one.content[0].content.text for one in editor.of("tool_call_update") if one.content
        ]
        assert texts == ["the user says red", "no answer"]

    play(body, tmp_path)
