"""An episode that anybody's agent plays: a command in the task's sandbox, asking at a door.

The command is an unmodified program. It finds the model where the usual variables say, and the
model is the policy: the proxy records every call as chunks of the episode. What the command leaves
is graded as after a turn without a call. A task of several steps runs it once a step.

The clock of the episode runs while no call is open: the agent's own work, not the engine's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from envs.gem.core import Env
from envs.gem.episode import EnvironmentFault, OutOfTime, PlayedEnv, Turn
from envs.rock import AgentFault, Job, SandboxError
from envs.rock.config import MAX_SECONDS
from envs.rock.doors import Door
from rome.agent.dialogue import Dialogue
from rome.agent.loop import Limits, close_env, record
from rome.agent.messages import readable
from rome.agent.proxy import Budget, ModelProxy, ProxiedEpisode
from rome.agent.session import Generator, Session
from rome.data.trajectory import Trajectory
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat

DOOR = "model:80"
CHECK_SECONDS = 0.1  # between two looks at a running command
ARRIVAL = ".agent"  # in the workspace, where the agent's files are put before it begins
FILES = "/tmp/.agent"  # and where they are then: the workspace is the task's
INSTRUCTION = "instruction.md"
HAND_IN = ""  # a turn without a call
# As JSON, of which a sandbox's variables may have 100,000 bytes in all.
MAX_INSTRUCTION_BYTES = 65_536
MAX_NOTE = 500  # characters of the command's output in the episode's note

MakeEnv = Callable[[Mapping[str, Door]], Env]


class CommandError(ValueError):
    """An agent that cannot play the task; the message says why."""


@dataclasses.dataclass(frozen=True)
class CommandAgent:
    """A command that plays episodes.

    Attributes:
      command: for the shell of the sandbox, in the task's working directory. The instruction is in
        the variable INSTRUCTION, where it is not too long for one, and in the file that
        INSTRUCTION_FILE names.
      files: a folder of this machine, copied into the sandbox; "" for none. AGENT_FILES names the
        copy.
      idle_seconds: without an open call, after which a command that still runs is ended.
      budget: of one episode.
    """

    command: str
    files: str = ""
    idle_seconds: float = 120.0
    budget: Budget = dataclasses.field(default_factory=Budget)

    def __post_init__(self) -> None:
        if not self.command.strip():
            raise CommandError('agent="command:" names no command; write it after the colon')
        if self.files and not pathlib.Path(self.files).is_dir():
            raise CommandError(f"agent_files={self.files!r} is no folder")


class ShellLike(Protocol):
    """An environment whose sandbox runs commands of an agent (`envs.tasks.terminal.shell`)."""

    workspace: str

    async def aspawn(self, command: str, env: Mapping[str, str], timeout: float) -> Job: ...
    async def aupload(self, folder: str, place: str) -> None: ...
    async def awrite(self, path: str, text: str) -> None: ...


class CommandEpisode:
    """One episode that a command plays. It is made before its environment, which needs its door.

    Args:
      dialogue: answers the agent's calls; new, and ended here.
      limits: of time; `episode_seconds` is the agent's own work.
      agent: what plays.
      seed: of the episode, which its trajectory names.

    Attributes:
      doors: for the sandbox of the environment.
    """

    def __init__(
        self, dialogue: Dialogue, limits: Limits, agent: CommandAgent, *, seed: int
    ) -> None:
        self._dialogue = dialogue
        self._limits = limits
        self._agent = agent
        self._seed = seed
        self._proxied = ProxiedEpisode(dialogue, budget=agent.budget)
        self.doors: Mapping[str, Door] = {DOOR: ModelProxy().door(self._proxied)}

    @property
    def fault(self) -> EngineError | None:
        """Return the first error of the engine or the endpoint; None where there was none."""
        return self._proxied.fault

    async def play(
        self, env: Env, *, shell: Env | None = None, group: int = 0, episode: int = 0
    ) -> Trajectory:
        """Play the episode to its typed ending.

        Faults of the agent, a tool or a server become an ending; they are not raised.

        Args:
          env: the task's environment, with `doors` in its sandbox; closed here.
          shell: the environment whose sandbox runs the command; None: `env` itself.
          group: recorded in the trajectory.
          episode: recorded in the trajectory.
        """
        started = time.monotonic()
        limits = self._limits
        played = PlayedEnv(env, limits.episode_seconds, limits.start_seconds)
        instruction = ""
        result = Turn("", ending="cancelled")
        try:
            instruction, _ = await played.start()
            played.hand_over()
            shell = env if shell is None else shell
            seconds = limits.episode_seconds
            result = await _play(played, shell, self._proxied, self._agent, instruction, seconds)
        except EnvironmentFault as error:
            result = Turn("", ending="infra_sandbox", note=str(error))
        finally:
            await self._dialogue.aclose()
            await close_env(env)
        if not self._dialogue.session.chunks and not result.note:  # nothing can be trained on it
            result = result._replace(note="the agent asked nothing")
        if self.fault is not None:  # what came after it says nothing about the agent
            result = Turn("", ending="infra_engine", note=str(self.fault))
        chunks = self._dialogue.session.chunks
        return record(
            played,
            chunks,
            result,
            started,
            seed=self._seed,
            group=group,
            episode=episode,
            told=instruction,
        )


async def run_command_episode(
    engine: Generator,
    make_env: MakeEnv,
    chat: Chat,
    limits: Limits,
    agent: CommandAgent,
    *,
    seed: int,
    temperature: float = 1.0,
    group: int = 0,
    episode: int = 0,
    routes: bool = False,
) -> Trajectory:
    """Play one episode in a new environment; see `CommandEpisode`.

    Args:
      engine: samples the answers.
      make_env: the doors of a sandbox -> the task's environment, which is closed here.
      chat: of the model.
      limits: of tokens and time.
      agent: what plays.
      seed: of the episode.
      temperature: of sampling.
      group: recorded in the trajectory.
      episode: recorded in the trajectory.
      routes: whether to keep the experts of each token.
    """
    dialogue = sampling_dialogue(
        engine, chat, limits, seed=seed, temperature=temperature, routes=routes
    )
    playing = CommandEpisode(dialogue, limits, agent, seed=seed)
    return await playing.play(make_env(playing.doors), group=group, episode=episode)


def sampling_dialogue(
    engine: Generator,
    chat: Chat,
    limits: Limits,
    *,
    seed: int,
    temperature: float = 1.0,
    routes: bool = False,
) -> Dialogue:
    """Return a new dialogue whose answers an engine samples; see `Session`."""
    session = Session(
        engine,
        chat.tokenizer,
        seed=seed,
        max_context=limits.max_context,
        max_new_tokens=limits.max_new_tokens,
        completion_seconds=limits.completion_seconds,
        temperature=temperature,
        routes=routes,
    )
    return Dialogue(session, chat)


def runs_commands(env: Env) -> bool:
    """Return whether an environment has a sandbox in which a command can play."""
    return hasattr(env, "aspawn")


async def _play(
    played: PlayedEnv,
    env: Env,
    proxied: ProxiedEpisode,
    agent: CommandAgent,
    instruction: str,
    seconds: float,
) -> Turn:
    """Run the command for each step of the task, until the environment ends the episode."""
    if not runs_commands(env):
        raise EnvironmentFault(
            f"{played.name} has no sandbox in which a command can run; agent=command needs a task"
            " of terminal, harbor, repair or SWE-bench"
        )
    shell: Any = env
    clock = _Clock(seconds)
    while True:
        try:
            note = await _run(shell, proxied, agent, instruction, clock)
        except SandboxError as error:
            said = f"{type(error).__name__}: {error}"
            # Before the command has begun, its own files did not fit, which is not its doing.
            if clock.has_begun and isinstance(error, AgentFault):
                return Turn("", ending="failure", status="tool_error", note=said)
            raise EnvironmentFault(said) from error
        try:
            if clock.is_over:
                return await played.judge("timeout", note)
            turn = await played.step(HAND_IN)
        except OutOfTime as error:
            return await played.judge("timeout", str(error))
        if turn.ending:
            return turn._replace(note="; ".join(filter(None, [note, turn.note])))
        instruction = turn.observation


class _Clock:
    """The seconds in which the agent worked on its own.

    Args:
      seconds: that it may.

    Attributes:
      has_begun: whether a command of the agent was started.
    """

    def __init__(self, seconds: float) -> None:
        self.has_begun = False
        self._left = seconds
        self._last = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether they are used up."""
        return self._left <= 0

    def pass_time(self, counts: bool) -> None:
        """Note the time since the last call; `counts` says whether the agent used it."""
        now = time.monotonic()
        if counts:
            self._left -= now - self._last
        self._last = now


async def _run(
    shell: ShellLike,
    proxied: ProxiedEpisode,
    agent: CommandAgent,
    instruction: str,
    clock: _Clock,
) -> str:
    """Run the command until it ends or is ended; return a note where it is worth one."""
    instruction = readable(instruction)
    if agent.files:
        await shell.aupload(agent.files, ARRIVAL)
    await shell.awrite(f"{ARRIVAL}/{INSTRUCTION}", instruction)
    arrival = shlex.quote(f"{shell.workspace}/{ARRIVAL}")
    command = f"rm -rf {FILES} && mv -T {arrival} {FILES} || exit 125\n{agent.command}"
    job = await shell.aspawn(command, _variables(instruction), MAX_SECONDS)
    clock.has_begun = True
    clock.pass_time(counts=False)
    ending = asyncio.ensure_future(job.wait())
    reason = ""
    try:
        while not reason:
            await asyncio.wait({ending}, timeout=CHECK_SECONDS)
            clock.pass_time(counts=not proxied.is_working)
            if ending.done():
                break
            reason = _reason_to_end(proxied, agent, clock)
        if reason:
            await job.kill()
        result = await ending
    finally:
        ending.cancel()
    if reason:
        return f"the agent was ended: {reason}"
    if result.exit_code:
        said = (result.stderr or result.stdout)[-MAX_NOTE:].strip()
        return f"the agent ended with status {result.exit_code}: {said}"
    return ""


def _reason_to_end(proxied: ProxiedEpisode, agent: CommandAgent, clock: _Clock) -> str:
    if proxied.fault is not None:
        return f"the engine failed: {proxied.fault}"
    if clock.is_over:
        return "its time is over"
    if proxied.idle_seconds > agent.idle_seconds:
        return f"it has asked nothing for {agent.idle_seconds:g} s"
    if proxied.is_exhausted and proxied.refusals:
        return "its calls or tokens are used up"
    return ""


def _variables(instruction: str) -> dict[str, str]:
    """Return the variables by which agents find the model, and their task."""
    key = "sk-none"  # the door knows the caller
    fits = len(json.dumps(instruction)) <= MAX_INSTRUCTION_BYTES and "\0" not in instruction
    told = {"INSTRUCTION": instruction} if fits else {}
    return told | {
        "OPENAI_BASE_URL": "http://model/v1",
        "OPENAI_API_BASE": "http://model/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": "http://model",
        "ANTHROPIC_API_KEY": key,
        "INSTRUCTION_FILE": f"{FILES}/{INSTRUCTION}",
        "AGENT_FILES": FILES,
    }
