"""An episode that the iFlow agent plays: the environment is the user, and gives the tools.

It is the agent of production, with a model whose tokens are recorded. What the model says is handed
to the environment whole, as in the plain loop (`rome.agent.loop`): where the agent has no tools of
its own and its context is not made shorter, both make the same record. Summaries, and the contexts
of sub-agents, are branches of the record.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, cast

from envs.gem.core import Env
from envs.gem.episode import EnvironmentFault, PlayedEnv, Turn
from rome.agent import loop as plain
from rome.agent.command import sampling_dialogue
from rome.agent.dialogue import Dialogue
from rome.agent.iflow.context import ContextManager
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage, TurnFinished
from rome.agent.iflow.limits import Limits
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.dialogue_model import DialogueModel
from rome.agent.iflow.models.model import Ask, Messages, ModelError, Schemas
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.specs.agent_specs import GENERAL, AgentSpec
from rome.agent.iflow.subagents import Birth, TaskTool, tools_for
from rome.agent.iflow.tools.base import Tool, ToolResult
from rome.agent.iflow.tools.todo import TodoTool
from rome.agent.session import Generator
from rome.data.trajectory import Trajectory
from rome.model.tokenizer import Chat

# Tools of the agent that need no workspace; `task` comes beside them.
OWN_TOOLS: Mapping[str, Callable[[], Tool]] = {TodoTool.name: TodoTool}
STATUSES: Mapping[str, str] = {"ok": "ok", "infra": "infrastructure"}  # of a turn -> of a result


class IFlowError(ValueError):
    """Settings with which the agent cannot play; the message says why."""


@dataclasses.dataclass(frozen=True)
class IFlowAgent:
    """How the agent plays episodes."""

    # Names of its own tools, beside those of the environment: "task" and OWN_TOOLS
    tools: tuple[str, ...] = ()
    compaction: float = 0.0  # share of the context at which it is summarised; 0 is never
    # Of the model in one episode, sub-agents and summaries included; 0 is no limit
    answers: int = 0
    specs: tuple[AgentSpec, ...] = (GENERAL,)  # the kinds of sub-agents

    def __post_init__(self) -> None:
        known = [*OWN_TOOLS, TaskTool.name]
        for name in self.tools:
            if name not in known:
                choices = ", ".join(known)
                raise IFlowError(f"the agent has no tool {name!r} in training; choose of {choices}")
        if not 0.0 <= self.compaction < 1.0:
            raise IFlowError(f"compaction={self.compaction} is no share; choose such as 0.8, or 0")


async def run_iflow_episode(
    engine: Generator,
    env: Env,
    chat: Chat,
    limits: plain.Limits,
    agent: IFlowAgent,
    *,
    seed: int,
    temperature: float = 1.0,
    group: int = 0,
    episode: int = 0,
    routes: bool = False,
    tell_tools: bool = False,
) -> Trajectory:
    """Play one episode to its typed ending; arguments are as in `rome.agent.loop.run_episode`.

    `tell_tools` says whether the model is told of tools and of the environment's system text.
    """
    started = time.monotonic()
    played = PlayedEnv(env, limits.episode_seconds, limits.start_seconds)
    dialogue = sampling_dialogue(
        engine, chat, limits, seed=seed, temperature=temperature, routes=routes
    )
    instruction = ""
    end = Turn("", ending="cancelled")
    try:
        instruction, _ = await played.start()
        played.hand_over()
        playing = _Episode(played, dialogue, chat, agent, is_told=tell_tools)
        end = await playing.play(instruction)
    except EnvironmentFault as error:
        end = Turn("", ending="infra_sandbox", note=str(error))
    finally:
        await dialogue.aclose()
        await plain.close_env(env)
    chunks = dialogue.session.chunks
    return plain.record(
        played, chunks, end, started, seed=seed, group=group, episode=episode, told=instruction
    )


class _Episode:
    """One episode: the agent, its sub-agents, and the environment that they share."""

    def __init__(
        self, played: PlayedEnv, dialogue: Dialogue, chat: Chat, agent: IFlowAgent, *, is_told: bool
    ) -> None:
        self._played = played
        self._dialogue = dialogue
        self._chat = chat
        self._agent = agent
        self._is_told = is_told
        self._turns = asyncio.Lock()  # an environment takes one turn at a time
        self._end: Turn | None = None
        self._fault: EnvironmentFault | None = None
        self.engine_fault = ""
        self._tools = list(getattr(played.env, "tools", None) or ()) if is_told else []

    async def play(self, instruction: str) -> Turn:
        """Let the agent play; return how the episode ended, EnvironmentFault if that failed."""
        system = str(getattr(self._played.env, "system", None) or "") if self._is_told else ""
        log = EventLog()
        tools = self._own_tools()
        if TaskTool.name in self._agent.tools:
            specs = {spec.name: spec for spec in self._agent.specs}
            tools.append(TaskTool(specs, self._make_child))
        main = self._make_agent(log, system, tools, is_main=True)
        try:
            finished = await main.run(instruction)
        finally:
            await main.aclose()
        if self._fault is not None:  # a sub-agent met it
            raise self._fault
        return self._end or await self._end_at(finished)

    async def _end_at(self, finished: TurnFinished) -> Turn:
        """Judge what is there, where the agent ended before the environment did."""
        if self.engine_fault:
            return Turn("", ending="infra_engine", note=self.engine_fault)
        ending = "truncated_turns" if self._are_answers_used_up else "truncated_tokens"
        return await self._played.judge(ending, finished.reason)

    async def take(self, message: AssistantMessage) -> ToolResult:
        """Hand an answer to the environment, whole, and note in its chunk what came of it."""
        async with self._turns:
            if self._end is not None:  # a sub-agent beside this one ended the episode
                return ToolResult("", ends_turn=True)
            try:
                session = self._dialogue.session
                turn = await plain.take_turn(session, self._played, self._chat, message.chunk)
            except EnvironmentFault as error:
                self._fault = error
                raise
            if turn.ending:
                self._end = turn
        return ToolResult(
            turn.observation,
            status=STATUSES.get(turn.status, "error"),  # type: ignore[arg-type]
            exit_code=turn.exit_code,
            denials=turn.network_denials,
            ends_turn=bool(turn.ending),
        )

    # -- the agents

    def _make_agent(
        self, log: EventLog, system: str, tools: Sequence[Tool], *, is_main: bool, kind: str = ""
    ) -> Agent:
        share = self._agent.compaction
        return Agent(
            _EpisodeModel(self._dialogue, self),
            tools,
            log,
            cast(Workspace, _Place()),
            system=system,
            context=ContextManager(share) if share else None,
            environment=_Player(self, {tool.name for tool in tools}, is_main=is_main),
            limits=Limits(turns=self._agent.answers),
            agent=kind,
            parent="" if is_main else "main",
        )

    def _own_tools(self) -> list[Tool]:
        return [make() for name, make in OWN_TOOLS.items() if name in self._agent.tools]

    def _make_child(self, birth: Birth) -> Agent:
        """Return a sub-agent; it has the environment's tools too."""
        tools = tools_for(birth.spec, self._own_tools())
        system = birth.spec.prompt if self._is_told else ""
        return self._make_agent(birth.log, system, tools, is_main=False, kind=birth.spec.name)

    # -- what their models are shown

    def shown_tools(self, own: Schemas) -> list[dict[str, Any]]:
        """Return the schemas that the model is told: the environment's, and the agent's own."""
        return [*self._tools, *own] if self._is_told else []

    @property
    def _are_answers_used_up(self) -> bool:
        answers = self._agent.answers
        return bool(answers) and len(self._dialogue.session.chunks) >= answers

    def refuse_at_the_end(self) -> None:
        """Raise ModelError where nothing may follow: all is over, spoiled or used up."""
        if self._end is not None or self._fault is not None or self.engine_fault:
            raise ModelError("the episode is over")
        if self._are_answers_used_up:
            raise ModelError(f"the {self._agent.answers} answers of the episode are used up")


class _EpisodeModel(DialogueModel):
    """The policy as the agent's model, told of the environment's tools beside its own."""

    def __init__(self, dialogue: Dialogue, episode: _Episode) -> None:
        super().__init__(dialogue)
        self._episode = episode

    async def ask(self, messages: Messages, tools: Schemas, **how: Unpack[Ask]) -> AssistantMessage:
        """Answer a conversation; see `Model`."""
        self._episode.refuse_at_the_end()
        try:
            return await super().ask(messages, self._episode.shown_tools(tools), **how)
        except ModelError:
            # What comes after a fault of the engine says nothing about the policy.
            self._episode.engine_fault = self._episode.engine_fault or str(self.fault or "")
            raise

    def count_tokens(self, messages: Messages, tools: Schemas = ()) -> int:
        """Return the tokens of a conversation."""
        return super().count_tokens(messages, self._episode.shown_tools(tools) if tools else ())


class _Player:
    """Hands the answers of one agent to the environment (`rome.agent.iflow.parts.Environment`).

    The main agent's answers all go there, but those whose calls are all of its own tools. A
    sub-agent's go there where they make a call: its words are for its parent.
    """

    def __init__(self, episode: _Episode, own: set[str], *, is_main: bool) -> None:
        self._episode = episode
        self._own = own
        self._is_main = is_main

    async def answer(self, message: AssistantMessage) -> ToolResult | None:
        """Return what the environment answers; None leaves it to the agent."""
        calls = message.tool_calls
        if calls and all(call.name in self._own for call in calls):
            return None
        if not self._is_main:
            if message.finish == "length":
                return ToolResult("", status="error", ends_turn=True)
            if not calls:
                return None
        return await self._episode.take(message)


class _Place:
    """The workspace of an agent whose environment holds the files; its own tools need none."""

    root = "/"
    directory = "/"
    is_isolated = True

    def __getattr__(self, name: str) -> Any:
        raise WorkspaceError(f"the environment has the files of this task; no {name} here")
