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
from collections.abc import Callable, Sequence
from typing import Any

from rome.agent.iflow import events
from rome.agent.iflow.approval.permissions import hides, is_wanted, make_policy
from rome.agent.iflow.approval.supervisor import Supervisor, make_supervisor
from rome.agent.iflow.connect import connect_model, endpoint_model
from rome.agent.iflow.context import ContextManager, ContextSettings
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
from rome.agent.iflow.subagents import Birth, TaskTool, may_have_subagents, tools_for
from rome.agent.iflow.tools.base import Tool
from rome.agent.iflow.tools.standard import standard_tools

NOT_BELOW = ("exit_plan_mode",)  # tools that sub-agents do not have: the mode is the main agent's


async def assemble(
    options: Options,
    session: OpenSession,
    *,
    is_attended: bool = False,
    home: pathlib.Path | None = None,
    wrap: Callable[[Workspace], Workspace] | None = None,
) -> InterfaceSession:
    """Return a session with its agent, which is not started; `session` is closed with it.

    Args:
      options: of the user.
      session: new, or one to go on with.
      is_attended: whether an interface answers approvals and questions.
      home: of the user; None for that of this process.
      wrap: is given the workspace, and returns the one that is to be used.

    Raises:
      UsageError: a setting is missing or wrong.
      SpecError: a file of settings is wrong.
      ModelError: the endpoint is not there.
      WorkspaceError: the place is not there.
    """
    project = options.directory.resolve()
    settings, projects = read_settings(options, home)
    model = await connect_model(options, settings, session)
    try:
        place = await open_place(
            options.workspace,
            project,
            session.folder,
            egress=options.egress,
            hides=hides(options, settings),
        )
    except BaseException:
        await model.aclose()
        raise
    if wrap is not None:
        place = wrap(place)
    user = home or pathlib.Path.home()
    configs = (*settings.mcp_servers.values(), *options.servers)
    servers = MCPServers(
        [dataclasses.replace(one, cwd=str(project / one.cwd)) for one in configs],
        session.log.append,
        session.folder,
        user / ".iflow" / "mcp-approved.json",
    )
    try:
        await servers.start()  # one that does not start costs its own tools only
        given = (options, settings, session, place, servers, model, projects, is_attended, home)
        return _Builder(*given).build()
    except BaseException:
        await servers.close()
        await place.aclose()
        await model.aclose()
        raise


def read_settings(options: Options, home: pathlib.Path | None = None) -> tuple[Settings, Projects]:
    """Return the settings that hold in the options' directory, and what the user granted.

    Raises:
      SpecError: a file of settings is wrong.
    """
    root = root_of(options.directory, home)
    projects = Projects(home and home / ".iflow" / "projects.json")
    if options.trust:
        projects.trust(root)
    trusted = projects.is_trusted(root)
    return load_settings(options.directory, trusted=trusted, home=home), projects


class _Builder:
    """Builds an agent and, when they are asked for, its sub-agents and other models."""

    def __init__(
        self,
        options: Options,
        settings: Settings,
        session: OpenSession,
        place: Workspace,
        servers: MCPServers,
        model: Model,
        projects: Projects,
        is_attended: bool,
        home: pathlib.Path | None,
    ) -> None:
        self._options = options
        self._settings = settings
        self._session = session
        self._place = place
        self._servers = servers
        self._models = [model]  # the main agent's first
        self._home = home
        project = options.directory.resolve()
        where = places(project, home)
        self._skills, skill_problems = load_skills(where)
        self._specs, spec_problems = load_agent_specs(where)
        self._commands, command_problems = load_commands(where)
        names = settings.context_files or FILE_NAMES
        self._instructions = Instructions(root_of(project, home), project, where, names)
        self._problems = [*skill_problems, *spec_problems, *command_problems]
        self._policy = make_policy(options, settings, place, session.folder, projects)
        self._desk = Desk(session.log, is_attended=is_attended)
        self._hooks = Hooks(settings.hooks, str(project))
        self._supervisor = self._make_supervisor()
        turns = options.limits.turns or settings.max_turns
        self._limits = dataclasses.replace(options.limits, turns=turns)
        self._spent = Spent()

    def build(self) -> InterfaceSession:
        """Return the agent with what is around it."""
        workspace = self._place
        model = self._models[0]
        agent = self._agent = self._make_agent(
            model,
            self._session.log,
            self._make_tools(),
            workspace,
            system=system_text(
                directory=workspace.root,
                is_isolated=workspace.is_isolated,
                instructions=self._instructions.opening(),
                skills=describe_skills(self._skills.values()),
            ),
            has_checkpoints=self._settings.checkpointing,
            session=self._session.id,
            session_folder=str(self._session.folder),
            mode=self._options.mode,
        )
        self._task = TaskTool(self._specs, self._make_child, notify=agent.notify)
        if is_wanted(self._task.name, self._options, self._settings):
            agent.tools[self._task.name] = self._task
        self._follow_folders(agent)
        return InterfaceSession(
            agent=agent,
            close=self._close,
            keep=self._keep,
            make_model=self._make_model,
            servers=self._servers,
            commands=self._commands,
            skills=self._skills,
            agents=self._specs,
            models=model.offered if isinstance(model, EndpointModel) else (),
            notices=(*self._settings.notices, *self._problems, *self._instructions.problems),
        )

    # -- what the session is given

    async def _close(self, outcome: events.Outcome = "finished") -> None:
        """End the session in order and free all that it holds."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._session.close)
            for model in self._models:
                stack.push_async_callback(model.aclose)
            stack.push_async_callback(self._place.aclose)
            stack.push_async_callback(self._servers.close)
            stack.push_async_callback(self._agent.aclose, outcome)
            stack.push_async_callback(self._task.aclose)

    async def _keep(self) -> str:
        """Keep what is outside of the events: a sandbox's files, an engine's tokens."""
        try:
            for model in self._models:
                if isinstance(model, EngineModel):
                    model.keep()
            await self._place.keep()
        except WorkspaceError as error:
            self._session.log.append(events.Notice(text=str(error), level="error"))
            return str(error)
        return ""

    async def _make_model(self, name: str) -> Model:
        """Return a model of the endpoint by its name; ValueError where there is none."""
        if self._options.engine:
            raise ValueError("an engine of token ids has one model")
        model = self._endpoint_model(name)
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
        workspace = self._place.beside()
        tools = [tool for tool in tools_for(spec, self._make_tools()) if tool.name not in NOT_BELOW]
        around = surroundings(workspace.root, workspace.is_isolated)
        model = self._models[0]
        if spec.model not in ("", model.name) and not self._options.engine:
            model = self._endpoint_model(spec.model)
        child = self._make_agent(
            model,
            birth.log,
            tools,
            workspace,
            owns_workspace=True,
            system=f"{spec.prompt}\n\n{around}",
            session=birth.id,
            session_folder=birth.folder,
            agent=spec.name,
            parent=self._session.id,
            mode=self._policy.mode,
        )
        if may_have_subagents(spec, birth.depth):
            # Without a background: a sub-agent ends with its answer, and so does what it started.
            task = TaskTool(self._specs, self._make_child, depth=birth.depth)
            child.tools[task.name] = task
        return child

    def _make_agent(
        self,
        model: Model,
        log: EventLog,
        tools: Sequence[Tool],
        workspace: Workspace,
        **rest: Any,
    ) -> Agent:
        """Return an agent with what all agents of the session have alike."""
        if isinstance(model, EndpointModel) and model.on_retry is None:
            model.on_retry = functools.partial(_log_retry, log)
        context = ContextManager(
            ContextSettings(threshold=self._settings.compression_threshold),
            store=functools.partial(self._store, rest["session_folder"]),
            workspace=workspace,
        )
        agent = Agent(
            model,
            tools,
            log,
            workspace,
            policy=self._policy,
            hooks=self._hooks,
            supervisor=self._supervisor,
            context=context,
            desk=self._desk,
            limits=self._limits,
            spent=self._spent,
            **rest,
        )
        context.run_hooks = agent.run_hooks
        return agent

    def _endpoint_model(self, name: str) -> EndpointModel:
        """Return another model of the endpoint, which is closed with the session."""
        model = endpoint_model(self._options, self._settings, name)
        self._models.append(model)
        return model

    def _make_tools(self) -> list[Tool]:
        tools = standard_tools(
            skills=self._skills,
            has_web=self._options.has_web,
            user_memory=self._home and self._home / ".iflow" / "IFLOW.md",
            shell_seconds=self._settings.shell_timeout,
        )
        wanted = functools.partial(is_wanted, options=self._options, settings=self._settings)
        own = [tool for tool in tools if wanted(tool.name)]
        return [*own, *(one for one in self._servers.tools if wanted(one.name, is_own=False))]

    def _make_supervisor(self) -> Supervisor | None:
        """Return the supervisor that the settings ask for, which sub-agents share."""
        given = self._settings.supervisor
        if given is None:
            return None
        hosts = (entry.rpartition(":")[0] or entry for entry in self._options.egress)
        workspace = self._place
        return make_supervisor(
            dataclasses.replace(given, hosts=(*given.hosts, *hosts)),
            root=workspace.root,
            home="/root" if workspace.is_isolated else os.path.expanduser("~"),
            events=self._session.log.events,
            judge=self._endpoint_model(given.judge) if given.judge else None,
            read=workspace.read,
        )

    async def _store(self, session_folder: str, name: str, text: str) -> str:
        """Keep an output as a file that the model can read, and return its path."""
        content = text.encode("utf-8", "surrogatepass")
        workspace = self._place
        folder = f"{session_folder}/outputs"
        if workspace.is_isolated:  # agents of one sandbox have a folder each
            folder = f"{workspace.outputs}/{pathlib.PurePath(session_folder).name}"
        path = f"{folder}/{name}"
        await workspace.write(path, content)
        return path

    def _follow_folders(self, agent: Agent) -> None:
        """Tell the agent the instructions of folders whose files it touches."""
        root = self._place.root

        def on_event(event: events.Event) -> None:
            if not isinstance(event, events.ToolStarted):
                return
            tool = agent.tools.get(event.call.name)
            with contextlib.suppress(ValueError, OSError):
                for path in tool.paths(json.loads(event.call.arguments or "{}")) if tool else ():
                    below = os.path.relpath(os.path.join(root, path), root)
                    text = self._instructions.of_file(below)
                    if text:
                        agent.remind(text)

        said = agent.log.events
        self._instructions.resume(
            event.text
            for event in said
            if isinstance(event, events.UserMessage) and event.source == "reminder"
        )
        agent.log.listen(on_event)


def _log_retry(log: EventLog, reason: str, attempt: int, wait: float) -> None:
    log.append(events.Retried(reason=reason, attempt=attempt, wait=round(wait, 1)))
