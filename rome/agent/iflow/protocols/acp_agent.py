"""The agent as an agent of the Agent Client Protocol: editors and harnesses drive it on stdio."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import acp
from acp import RequestError, helpers
from acp import schema as protocol

from rome.agent.iflow import events
from rome.agent.iflow.desk import UnknownRequest
from rome.agent.iflow.events import Event
from rome.agent.iflow.interfaces import MODES, InterfaceSession
from rome.agent.iflow.opening import SessionOpener
from rome.agent.iflow.protocols.acp_forms import (
    DECISIONS,
    block_text,
    commands,
    invalid,
    permissions,
    server,
    settings_of,
)
from rome.agent.iflow.protocols.acp_updates import Translator, diff_contents
from rome.agent.iflow.sessions import SessionUnavailable
from rome.agent.iflow.user_input import InputError, expand
from rome.version import VERSION

STOP_REASONS = {"finished": "end_turn", "limit": "max_turn_requests", "aborted": "cancelled"}


@dataclasses.dataclass
class Held:
    """A session that the client has open."""

    session: InterfaceSession  # with its agent
    translator: Translator  # of its events
    updates: asyncio.Queue[Any]  # that wait to be sent, in order
    # The sender, and requests to the client that wait for an answer
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)


class ProtocolAgent:
    """Answers a client; the methods are those of `acp.interfaces.Agent`."""

    def __init__(self, opener: SessionOpener) -> None:
        self._opener = opener
        self._client: Any = None
        self._held: dict[str, Held] = {}

    def on_connect(self, conn: Any) -> None:
        """Take the connection to the client."""
        self._client = conn

    async def initialize(
        self,
        protocol_version: int,
        client_capabilities: protocol.ClientCapabilities | None = None,
        client_info: protocol.Implementation | None = None,
        **kwargs: Any,
    ) -> protocol.InitializeResponse:
        """Say what this agent can do."""
        return protocol.InitializeResponse(
            protocol_version=min(protocol_version, acp.PROTOCOL_VERSION),
            agent_info=protocol.Implementation(name="iflow", title="iFlow", version=VERSION),
            agent_capabilities=protocol.AgentCapabilities(
                load_session=True,
                prompt_capabilities=protocol.PromptCapabilities(embedded_context=True),
                mcp_capabilities=protocol.McpCapabilities(http=True),
                session_capabilities=protocol.SessionCapabilities(
                    list=protocol.SessionListCapabilities(),
                    fork=protocol.SessionForkCapabilities(),
                    resume=protocol.SessionResumeCapabilities(),
                    close=protocol.SessionCloseCapabilities(),
                ),
            ),
        )

    async def authenticate(self, method_id: str, **kwargs: Any) -> None:
        """Do nothing: keys stand in the settings or in the environment."""

    # -- sessions

    async def new_session(
        self, cwd: str, mcp_servers: Sequence[Any] | None = None, **kwargs: Any
    ) -> protocol.NewSessionResponse:
        """Open a new session in a directory."""
        held = await self._open(cwd, mcp_servers)
        return protocol.NewSessionResponse(
            session_id=held.session.agent.session, **settings_of(held.session)
        )

    async def load_session(
        self, cwd: str, session_id: str, mcp_servers: Sequence[Any] | None = None, **kwargs: Any
    ) -> protocol.LoadSessionResponse:
        """Go on with a session, and send the client all that was said in it."""
        held = await self._open(cwd, mcp_servers, resume=session_id, is_replayed=True)
        await held.updates.join()
        return protocol.LoadSessionResponse(**settings_of(held.session))

    async def resume_session(
        self, session_id: str, cwd: str, mcp_servers: Sequence[Any] | None = None, **kwargs: Any
    ) -> protocol.ResumeSessionResponse:
        """Go on with a session whose past the client knows."""
        held = await self._open(cwd, mcp_servers, resume=session_id)
        return protocol.ResumeSessionResponse(**settings_of(held.session))

    async def fork_session(
        self, session_id: str, cwd: str, mcp_servers: Sequence[Any] | None = None, **kwargs: Any
    ) -> protocol.ForkSessionResponse:
        """Go on with a copy of a session; itself stays as it is."""
        held = await self._open(cwd, mcp_servers, resume=session_id, is_fork=True)
        return protocol.ForkSessionResponse(
            session_id=held.session.agent.session, **settings_of(held.session)
        )

    async def list_sessions(
        self, cwd: str | None = None, cursor: str | None = None, **kwargs: Any
    ) -> protocol.ListSessionsResponse:
        """List the sessions that can be loaded."""
        found = [
            protocol.SessionInfo(
                session_id=one.id,
                cwd=one.directory,
                title=one.title,
                updated_at=datetime.datetime.fromtimestamp(one.changed, datetime.UTC).isoformat(),
            )
            for one in self._opener.sessions(cwd or "")
        ]
        return protocol.ListSessionsResponse(sessions=found)

    async def close_session(self, session_id: str, **kwargs: Any) -> None:
        """End a session; it can be loaded again."""
        await self._release(self._held.pop(self._find(session_id).session.agent.session))

    async def set_session_mode(self, session_id: str, mode_id: str, **kwargs: Any) -> None:
        """Change the mode of approval."""
        if mode_id not in MODES:
            raise invalid(f"no mode {mode_id!r}; there are {', '.join(MODES)}")
        self._find(session_id).session.agent.set_mode(mode_id)

    async def set_config_option(
        self, config_id: str, session_id: str, value: str | bool, **kwargs: Any
    ) -> protocol.SetSessionConfigOptionResponse:
        """Choose the model."""
        session = self._find(session_id).session
        if config_id != "model":
            raise invalid(f"no option {config_id!r}; there is model")
        try:
            session.agent.set_model(await session.make_model(str(value)))
        except ValueError as error:
            raise invalid(str(error)) from error
        options = settings_of(session)["config_options"]
        return protocol.SetSessionConfigOptionResponse(config_options=options)

    # -- a turn

    async def prompt(
        self, session_id: str, prompt: Sequence[Any], **kwargs: Any
    ) -> protocol.PromptResponse:
        """Play a turn, and send what happens meanwhile."""
        held = self._find(session_id)
        agent = held.session.agent
        if agent.is_working:
            raise invalid("the agent works on the last prompt; cancel it first")
        try:
            text = await expand("\n\n".join(map(block_text, prompt)), held.session)
        except InputError as error:
            raise invalid(str(error)) from error
        finished = await agent.run(text)
        await held.session.keep()
        await held.updates.join()  # the client has seen all of the turn before it ends
        if finished.outcome not in STOP_REASONS:
            raise RequestError.internal_error({"message": finished.reason})
        spent = finished.usage
        return protocol.PromptResponse(
            stop_reason=STOP_REASONS[finished.outcome],  # type: ignore[arg-type]
            usage=protocol.Usage(
                total_tokens=spent.prompt + spent.completion,
                input_tokens=spent.prompt,
                output_tokens=spent.completion,
                cached_read_tokens=spent.cached,
            ),
        )

    async def cancel(self, session_id: str, **kwargs: Any) -> None:
        """End the turn that is being played."""
        self._find(session_id).session.agent.cancel()

    async def aclose(self) -> None:
        """End all sessions."""
        held = list(self._held.values())
        self._held.clear()
        await asyncio.gather(*(self._release(one) for one in held))

    # -- within

    async def _open(
        self,
        cwd: str,
        servers: Sequence[Any] | None,
        *,
        resume: str = "",
        is_fork: bool = False,
        is_replayed: bool = False,
    ) -> Held:
        if not cwd.startswith("/"):
            raise invalid(f"cwd must be an absolute path, not {cwd!r}")
        if resume in self._held and not is_fork:
            await self.close_session(resume)
        try:
            session = await self._opener.open(
                cwd, resume=resume, is_fork=is_fork, servers=[server(one) for one in servers or ()]
            )
        except SessionUnavailable as error:
            raise RequestError.resource_not_found(resume) from error
        except ValueError as error:
            raise invalid(str(error)) from error
        return self._hold(session, is_replayed)

    def _hold(self, session: InterfaceSession, is_replayed: bool) -> Held:
        updates: asyncio.Queue[Any] = asyncio.Queue()
        held = Held(session, Translator(session, updates.put_nowait), updates)
        self._held[session.agent.session] = held
        if is_replayed:
            for event in session.agent.log.events:
                held.translator.replay(event)
        session.agent.log.listen(lambda event: self._hear(held, event))
        updates.put_nowait(helpers.update_available_commands(commands(session)))
        self._start(held, self._send_updates(held))
        return held

    def _find(self, session_id: str) -> Held:
        if session_id not in self._held:
            raise RequestError.resource_not_found(session_id)
        return self._held[session_id]

    def _hear(self, held: Held, event: Event) -> None:
        held.translator.take(event)
        if isinstance(event, events.ApprovalRequested):
            self._start(held, self._ask_permission(held, event))
        elif isinstance(event, events.QuestionAsked):
            self._start(held, self._ask_question(held, event))

    def _start(self, held: Held, work: Any) -> None:
        task = asyncio.ensure_future(work)
        held.tasks.add(task)
        task.add_done_callback(held.tasks.discard)

    async def _send_updates(self, held: Held) -> None:
        """Send updates one after another, as long as the client is there."""
        session_id = held.session.agent.session
        while True:
            update = await held.updates.get()
            try:
                await self._client.session_update(session_id=session_id, update=update)
            except (ConnectionError, RequestError):
                held.session.agent.cancel("the client is gone")
            finally:
                held.updates.task_done()

    async def _ask_permission(self, held: Held, event: events.ApprovalRequested) -> None:
        """Let the client decide on a call; a client that fails to denies it."""
        held.updates.put_nowait(held.translator.announce(event.call, event.summary, event.diff))
        await held.updates.join()
        content: list[Any] = diff_contents(event.diff, held.session.workspace.root)
        if event.reason:
            content.insert(0, acp.tool_content(acp.text_block(event.reason)))
        call = protocol.ToolCallUpdate(
            tool_call_id=event.call.id, title=event.summary or event.call.name, content=content
        )
        chosen = await self._choose(held, call, permissions(event.rule))
        decision, scope = DECISIONS.get(chosen, ("deny", "once"))
        with contextlib.suppress(UnknownRequest):  # the turn was cancelled meanwhile
            held.session.agent.desk.respond(event.request, decision, scope=scope)

    async def _ask_question(self, held: Held, event: events.QuestionAsked) -> None:
        """Let the client choose an answer, as a permission; without choices there is none."""
        answer = ""
        if event.choices:
            call = protocol.ToolCallUpdate(tool_call_id=event.request, title=event.question)
            options = [
                protocol.PermissionOption(option_id=choice, name=choice, kind="allow_once")
                for choice in event.choices
            ]
            answer = await self._choose(held, call, options)
        with contextlib.suppress(UnknownRequest):
            held.session.agent.desk.respond(event.request, answer=answer)

    async def _choose(
        self, held: Held, call: protocol.ToolCallUpdate, options: list[protocol.PermissionOption]
    ) -> str:
        """Return the id of the option that the client chooses; "" where it chooses none."""
        try:
            answer = await self._client.request_permission(
                session_id=held.session.agent.session, tool_call=call, options=options
            )
        except (ConnectionError, RequestError):
            return ""
        outcome = answer.outcome
        return outcome.option_id if isinstance(outcome, protocol.AllowedOutcome) else ""

    async def _release(self, held: Held) -> None:
        await held.session.close()
        for task in list(held.tasks):
            task.cancel()


async def serve(opener: SessionOpener) -> None:
    """Serve one client on standard input and output, until it closes them."""
    agent = ProtocolAgent(opener)
    try:
        await acp.run_agent(agent, use_unstable_protocol=True)  # type: ignore[arg-type]
    finally:
        await agent.aclose()
