"""Puts an agent together: settings, specs, model, tools, rules, hooks, context, sub-agents.

Every interface (headless, terminal, ACP, HTTP) begins here, so the agent is the same in all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rome.agent.iflow import events
from rome.agent.iflow.approval.permissions import hides, is_wanted, make_policy
from rome.agent.iflow.approval.supervisor import Supervisor
from rome.agent.iflow.connect import connect_model, endpoint_model
from rome.agent.iflow.context import ContextManager
from rome.agent.iflow.desk import Desk
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.interfaces import InterfaceSession
from rome.agent.iflow.limits import Spent
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.endpoint_model import EndpointModel
from rome.agent.iflow.models.engine_model import EngineModel
from rome.agent.iflow.models.model import Model, ModelError
from rome.agent.iflow.options import Options
from rome.agent.iflow.places.place import open_place
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.prompts import surroundings, system_text
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.sessions import OpenSession
from rome.agent.iflow.specs.agent_specs import load_agent_specs
from rome.agent.iflow.specs.commands import load_commands
from rome.agent.iflow.specs.hooks import Hooks
from rome.agent.iflow.specs.instructions import FILE_NAMES, Instructions
from rome.agent.iflow.specs.projects import Projects
from rome.agent.iflow.specs.settings import Settings, load_settings
from rome.agent.iflow.specs.skills import describe_skills, load_skills
from rome.agent.iflow.specs.spec_files import places, root_of
from rome.agent.iflow.subagents import Birth, TaskTool, tools_for
from rome.agent.iflow.tools.base import Tool
from rome.agent.iflow.tools.standard import standard_tools

NOT_BELOW = ("exit_plan_mode",)  # tools that sub-agents do not have: the mode is the main agent's


async def assemble(
    options: Options,
    session: OpenSession,
    *,
    is_attended: bool = False,
    home: pathlib.Path | None = None,
) -> InterfaceSession:
    """Return a session with its agent, which is not started.

    `session` is closed with it, or where there is an error. `is_attended` says whether an interface
    answers approvals and questions; `home` is the user's, None for that of this process.

    Raises:
      UsageError, SpecError: a setting or a file of settings is missing or wrong.
      ModelError, WorkspaceError: the endpoint or the place is not there.
    """
    project = options.directory.resolve()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(session.close)
        settings, projects = read_settings(options, home)
        limits = dataclasses.replace(
            options.limits, turns=options.limits.turns or settings.max_turns
        )
        options = dataclasses.replace(
            options,
            model=options.model or settings.model,
            base_url=options.base_url or settings.base_url,
            api_key=options.api_key or settings.api_key,
            context_tokens=options.context_tokens or settings.tokens_limit,
            limits=limits,
        )
        model = await connect_model(options, session)
        stack.push_async_callback(model.aclose)
        hidden = hides(options, settings)
        place = await open_place(
            options.workspace, project, session.folder, egress=options.egress, hides=hidden
        )
        stack.push_async_callback(place.aclose)
        configs = (*settings.mcp_servers.values(), *options.servers)
        servers = MCPServers(
            [dataclasses.replace(one, cwd=str(project / one.cwd)) for one in configs],
            session.log.append,
            session.folder,
            (home or pathlib.Path.home()) / ".iflow" / "mcp-approved.json",
            functools.partial(is_wanted, options=options, settings=settings, is_own=False),
        )
        stack.push_async_callback(servers.close)
        await servers.start()  # one that does not start costs its own tools only
        builder = _Builder(options, settings, session, place, servers, projects, home, stack)
        assembled = builder.build(model, is_attended=is_attended)
        builder.stack = stack.pop_all()
    return assembled


def read_settings(options: Options, home: pathlib.Path | None = None) -> tuple[Settings, Projects]:
    """Return the settings that hold in the options' directory, and what the user granted."""
    root = root_of(options.directory, home)
    projects = Projects(home and home / ".iflow" / "projects.json")
    if options.trust:
        projects.trust(root)
    trusted = projects.is_trusted(root)
    return load_settings(options.directory, trusted=trusted, home=home), projects


@dataclasses.dataclass(eq=False)
class _Builder:
    """Builds an agent and, when they are asked for, its sub-agents and other models."""

    options: Options
    settings: Settings
    session: OpenSession
    place: Workspace
    servers: MCPServers
    projects: Projects
    home: pathlib.Path | None
    stack: contextlib.AsyncExitStack  # closes all that the session holds

    def build(self, model: Model, *, is_attended: bool) -> InterfaceSession:
        """Return the agent with what is around it."""
        settings = self.settings
        project = self.options.directory.resolve()
        where = places(project, self.home)
        self._skills, skill_problems = load_skills(where)
        self._specs, spec_problems = load_agent_specs(where)
        commands, command_problems = load_commands(where)
        names = settings.context_files or FILE_NAMES
        instructions = Instructions(root_of(project, self.home), project, where, names)
        self._model = model
        self._policy = make_policy(
            self.options, settings, self.place, self.session.folder, self.projects
        )
        self._desk = Desk(self.session.log, is_attended=is_attended)
        self._hooks = Hooks(settings.hooks, str(project))
        self._supervisor = self._make_supervisor()
        self._spent = Spent()
        self._agent = agent = self._make_agent(
            model,
            self.session.log,
            self._make_tools(),
            self.place,
            system=system_text(
                directory=self.place.root,
                is_isolated=self.place.is_isolated,
                instructions=instructions.opening(),
                skills=describe_skills(self._skills.values()),
            ),
            has_checkpoints=settings.checkpointing,
            session=self.session.id,
            session_folder=str(self.session.folder),
            mode=self.options.mode,
        )
        self._task = TaskTool(self._specs, self._make_child, notify=agent.notify)
        if is_wanted(self._task.name, self.options, settings):
            agent.tools[self._task.name] = self._task
        _follow_folders(agent, instructions)
        problems = (*skill_problems, *spec_problems, *command_problems, *instructions.problems)
        return InterfaceSession(
            agent=agent,
            close=self._close,
            keep=self._keep,
            make_model=self._make_model,
            servers=self.servers,
            commands=commands,
            skills=self._skills,
            agents=self._specs,
            models=model.offered if isinstance(model, EndpointModel) else (),
            notices=(*settings.notices, *problems),
        )

    # -- what the session is given

    async def _close(self, outcome: events.Outcome = "finished") -> None:
        """End the session in order and free all that it holds."""
        self.stack.push_async_callback(self._agent.aclose, outcome)
        self.stack.push_async_callback(self._task.aclose)
        await self.stack.aclose()

    async def _keep(self) -> str:
        """Keep what is outside of the events: a sandbox's files, an engine's tokens."""
        try:
            if isinstance(self._model, EngineModel):
                self._model.keep()
            await self.place.keep()
        except WorkspaceError as error:
            self.session.log.append(events.Notice(text=str(error), level="error"))
            return str(error)
        return ""

    async def _make_model(self, name: str) -> Model:
        """Return a model of the endpoint by its name; ValueError where there is none."""
        if self.options.engine:
            raise ValueError("an engine of token ids has one model")
        model = self._endpoint_model(name)
        model.on_retry = functools.partial(_log_retry, self.session.log)
        try:
            await model.connect()
        except ModelError as error:
            raise ValueError(str(error)) from error
        if model.offered and name not in model.offered:
            raise ValueError(f"the endpoint has no model {name!r}; it has {model.offered}")
        return model

    # -- agents

    def _make_child(self, birth: Birth) -> Agent:
        """Return a sub-agent: it shares files, rules, hooks and desk with its parent.

        Its shell is its own: several sub-agents work at once, and none moves another's directory.
        """
        spec = birth.spec
        workspace = self.place.beside()
        tools = [tool for tool in tools_for(spec, self._make_tools()) if tool.name not in NOT_BELOW]
        around = surroundings(workspace.root, workspace.is_isolated)
        model = self._agent.model  # the user may have chosen another one
        if spec.model not in ("", model.name) and not self.options.engine:
            model = self._endpoint_model(spec.model)
        return self._make_agent(
            model,
            birth.log,
            tools,
            workspace,
            owns_workspace=True,
            system=f"{spec.prompt}\n\n{around}",
            session=birth.id,
            session_folder=birth.folder,
            agent=spec.name,
            parent=self.session.id,
            mode=self._policy.mode,
        )

    def _make_agent(
        self, model: Model, log: EventLog, tools: Sequence[Tool], place: Workspace, **rest: Any
    ) -> Agent:
        """Return an agent with what all agents of the session have alike."""
        if isinstance(model, EndpointModel) and model.on_retry is None:
            model.on_retry = functools.partial(_log_retry, log)
        store = functools.partial(self._store, rest["session_folder"])
        return Agent(
            model,
            tools,
            log,
            place,
            policy=self._policy,
            hooks=self._hooks,
            supervisor=self._supervisor,
            context=ContextManager(self.settings.compression_threshold, store=store),
            desk=self._desk,
            limits=self.options.limits,
            spent=self._spent,
            **rest,
        )

    def _endpoint_model(self, name: str) -> EndpointModel:
        """Return another model of the endpoint, which is closed with the session."""
        model = endpoint_model(self.options, name)
        self.stack.push_async_callback(model.aclose)
        return model

    def _make_tools(self) -> list[Tool]:
        tools = standard_tools(
            skills=self._skills,
            has_web=self.options.has_web,
            user_memory=self.home and self.home / ".iflow" / "IFLOW.md",
            shell_seconds=self.settings.shell_timeout,
        )
        own = [tool for tool in tools if is_wanted(tool.name, self.options, self.settings)]
        return [*own, *self.servers.tools]

    def _make_supervisor(self) -> Supervisor | None:
        """Return the supervisor that the settings ask for, which sub-agents share."""
        given = self.settings.supervisor
        if given is None:
            return None
        hosts = (entry.rpartition(":")[0] or entry for entry in self.options.egress)
        bounds = dataclasses.replace(
            given,
            root=self.place.root,
            home="/root" if self.place.is_isolated else os.path.expanduser("~"),
            hosts=(*given.hosts, *hosts),
        )
        judge = self._endpoint_model(given.judge) if given.judge else None
        supervisor = Supervisor(bounds, judge=judge, read=self.place.read)
        supervisor.resume(self.session.log.events)
        return supervisor

    async def _store(self, session_folder: str, name: str, text: str) -> str:
        """Keep an output as a file that the model can read, and return its path."""
        folder = f"{session_folder}/outputs"
        if self.place.is_isolated:  # agents of one sandbox have a folder each
            folder = f"{self.place.outputs}/{pathlib.PurePath(session_folder).name}"
        path = f"{folder}/{name}"
        await self.place.write(path, text.encode("utf-8", "surrogatepass"))
        return path


def _follow_folders(agent: Agent, instructions: Instructions) -> None:
    """Tell the agent the instructions of folders whose files it touches."""
    root = agent.workspace.root

    def on_event(event: events.Event) -> None:
        if not isinstance(event, events.ToolStarted):
            return
        tool = agent.tools.get(event.call.name)
        with contextlib.suppress(ValueError, OSError):
            for path in tool.paths(json.loads(event.call.arguments or "{}")) if tool else ():
                text = instructions.of_file(os.path.relpath(os.path.join(root, path), root))
                if text:
                    agent.inbox.put(text, "reminder")

    instructions.resume(
        event.text
        for event in agent.log.events
        if isinstance(event, events.UserMessage) and event.source == "reminder"
    )
    agent.log.listen(on_event)


def _log_retry(log: EventLog, reason: str, attempt: int, wait: float) -> None:
    log.append(events.Retried(reason=reason, attempt=attempt, wait=round(wait, 1)))
