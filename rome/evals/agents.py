"""Agents: the interface, and those that need no model.

An agent plays one attempt in a sandbox of its own. It never raises for faults of a task, a sandbox
or an engine: it returns the typed ending. An attempt that the infrastructure spoiled has no reward
at all, so that it cannot be mistaken for a 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from envs.gem import Env, Info, StepResult
from envs.gem.core import close_async, judge_async, reset_async, step_async
from envs.gem.episode import (
    STATUSES,
    EnvironmentFault,
    PlayedEnv,
    Script,
    perform,
    script_of,
    shown,
)
from envs.rock import AgentFault, SandboxConfig, SandboxError
from envs.safety import CompositionError
from envs.safety.shell import REFUSAL
from envs.sources import Task
from envs.tasks.harbor import BuildError, HarborEnv, TaskError
from envs.tasks.terminal.demonstrator import FINAL_TURN
from envs.tasks.terminal.env import MissingProgramsError
from rome.data.trajectory import Chunk, Trajectory
from rome.evals.cheats import tricks_of

CLOSE_SECONDS = 60.0
MAX_NOTE_CHARACTERS = 500


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one attempt ended.

    Attributes:
      reward: None if the infrastructure spoiled the attempt.
      ending: its typed ending.
      note: more about it, for readers.
      turns: of the agent.
      tokens: {prompt, completion} of a model. `Policy` counts prompt tokens that the environment
        appended, `Endpoint` those that the endpoint bills.
      permanent: whether another try would end the same way.
      notes: settings of the task that were not honoured as they stand.
      transcript: what was said and answered; None where nothing was.
      verifier_output: of the environment's tests, where it tells it.
      safety: utility and harm, for tasks of the safety suite (`envs.safety`).
    """

    reward: float | None
    ending: str
    note: str = ""
    turns: int = 0
    tokens: dict[str, int] | None = None
    permanent: bool = False
    notes: tuple[str, ...] = ()
    transcript: Trajectory | None = dataclasses.field(default=None, repr=False, compare=False)
    verifier_output: str = dataclasses.field(default="", repr=False, compare=False)
    safety: dict[str, Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def spoiled(self) -> bool:
        """Whether the attempt says nothing about the agent."""
        return is_spoiled(self.ending)


def is_spoiled(ending: str) -> bool:
    """Return whether an attempt with this ending says nothing about its agent."""
    return ending.startswith("infra_") or ending == "cancelled"


def spoiled(ending: str, note: str, permanent: bool = False) -> Outcome:
    """Return the outcome of an attempt that the infrastructure spoiled."""
    return Outcome(None, ending, note[:MAX_NOTE_CHARACTERS], permanent=permanent)


class Agent(Protocol):
    """An agent: plays attempts, possibly several at once.

    Attributes:
      name: recorded with each attempt.
    """

    name: str

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; `seed` differs between attempts, for agents that sample."""
        ...

    async def close(self) -> None:
        """Free what the agent holds open."""
        ...


class StartedEnv(Env):
    """A started environment, for code that would start it itself.

    `areset` returns the opening that is there. Turns are kept for the transcript, the rewards of
    the steps are added up, and the last `info` is kept.
    """

    def __init__(self, env: Env, task: Task, opening: tuple[str, Info]) -> None:
        self.env = env
        self.task = task
        self.opening = opening
        self.reward = 0.0
        self._taken: list[tuple[str, StepResult]] = []
        self._verifier_output = ""
        self.last_info: Info = {}

    @property
    def turns(self) -> int:
        """Number of turns that were taken."""
        return len(self._taken)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools that the agent has."""
        return list(self.opening[1].get("tools") or self.task.tools)

    @property
    def is_grading(self) -> bool:
        """Whether the environment's verifier runs."""
        return getattr(self.env, "is_grading", False)

    @property
    def grading_seconds(self) -> float:
        """Time limit of the environment's verifier."""
        return getattr(self.env, "grading_seconds", 0.0)

    @property
    def system(self) -> str | None:
        """What every model is told of the environment before the task; None for nothing."""
        return getattr(self.env, "system", None) or None

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Return the opening of the environment, which is started already."""
        return self.opening

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Return the opening of the environment, which is started already."""
        return self.opening

    def step(self, action: str) -> StepResult:
        """Take one turn."""
        return self.take(action, self.env.step(action))

    async def astep(self, action: str) -> StepResult:
        """Take one turn."""
        return self.take(action, await step_async(self.env, action))

    def take(self, action: str, result: StepResult) -> StepResult:
        """Keep a turn that was taken, and return its result."""
        self._taken.append((action, result))
        return self._note(result)

    async def ajudge(self, ending: str) -> StepResult:
        """Judge the work as it stands, after a limit has ended the attempt."""
        return self._note(await judge_async(self.env, ending))

    def _note(self, result: StepResult) -> StepResult:
        self.reward += float(result[1])
        self.last_info = result[4]
        self._verifier_output = str(self.last_info.get("test_output") or self._verifier_output)
        return result

    async def aclose(self) -> None:
        """Close the environment."""
        await close_async(self.env)

    def transcript(self, reward: float, ending: str, note: str = "") -> Trajectory:
        """Return what was said and answered as a trajectory without tokens."""
        chunks = []
        for action, (observation, _, _, _, info) in self._taken:
            call = None
            if info.get("use_tool") and info.get("tool_type"):
                call = {"name": info["tool_type"], "arguments": info.get("tool_arguments", {})}
            status = info.get("status", "ok")
            chunk = Chunk([], [], [], text=action, observation=shown(observation, info))
            chunk.status = status if status in STATUSES else "ok"
            chunk.tool_call = call
            chunk.exit_code = info.get("exit_code")
            chunks.append(chunk)
        return Trajectory(
            task=self.task.name,
            family=self.task.family,
            chunks=chunks,
            reward=reward,
            ending=ending,
            instruction=shown(*self.opening),
            note=note,
            success_reward=self.task.success,
        )

    def outcome(self, reward: float, ending: str, note: str = "") -> Outcome:
        """Return the outcome of the attempt; the note defaults to the last turn's."""
        note = note or str(self.last_info.get("note", ""))
        is_permanent = is_spoiled(ending) and bool(self.last_info.get("permanent"))
        return Outcome(
            None if is_spoiled(ending) else float(reward),
            ending,
            note[:MAX_NOTE_CHARACTERS],
            self.turns,
            permanent=is_permanent,
            notes=tuple(self.opening[1].get("notes", ())),
            transcript=self.transcript(float(reward), ending, note),
            verifier_output=self._verifier_output,
            safety=self.last_info.get("safety"),
        )


async def play_in_environment(
    task: Task,
    config: SandboxConfig,
    play: Callable[[StartedEnv], Awaitable[Outcome]],
    seconds: float | None = None,
) -> Outcome:
    """Start a task's environment, run `play` there, and close it.

    Args:
      task: makes the environment.
      config: of its sandbox.
      play: returns the outcome. It need not handle faults of the sandbox.
      seconds: for playing; None for what the task's own limits add up to, infinite where `play`
        has a deadline for each wait.

    Returns:
      The outcome of `play`, or a typed ending. A fault of the start spoils the attempt.
    """
    seconds = seconds or task.play_seconds
    env = task.make_env(config)
    try:
        try:
            async with asyncio.timeout(task.start_seconds):
                started = StartedEnv(env, task, await reset_async(env))
        except TimeoutError:
            note = f"the environment did not start within {task.start_seconds:g} s"
            return spoiled("infra_sandbox", note)
        try:
            async with asyncio.timeout(seconds):
                return await play(started)
        except TimeoutError:
            played = PlayedEnv(started, seconds, task.start_seconds)
            played.hand_over()
            turn = await played.judge("timeout", f"the attempt passed its {seconds:g} s")
            return started.outcome(started.reward, turn.ending, turn.note)
        except AgentFault as fault:
            return started.outcome(0.0, "failure", f"{type(fault).__name__}: {fault}")
    except EnvironmentFault as fault:
        return spoiled("infra_sandbox", str(fault))
    except (MissingProgramsError, TaskError, CompositionError) as error:
        # A step of a build may fail once; all other faults of this kind are permanent.
        is_permanent = not isinstance(error, BuildError)
        return spoiled("infra_sandbox", f"{type(error).__name__}: {error}", is_permanent)
    except SandboxError as error:
        return spoiled("infra_sandbox", f"{type(error).__name__}: {error}")
    finally:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await close_async(env)
        except (SandboxError, TimeoutError) as error:
            # The attempt has its outcome; the sandbox ends with this process.
            reason = str(error) or f"it did not end within {CLOSE_SECONDS:g} s"
            logging.warning("the sandbox of %r was not closed: %s", task.name, reason)


# -- agents without a model
# -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scripted:
    """An agent without a model: "oracle", "noop", "cheat", "attacker" or "refuse".

    The oracle plays the reference solution or the demonstrator; the no-op says at once
    that it is done; attempt n of the cheat plays its trick n, which the note names. The attacker
    does the work and the harm that a task of the safety suite tempts to, or plays the oracle where
    there is none; "refuse" refuses every task in words.

    Attributes:
      name: one of the five.
      config: of the sandboxes.
    """

    name: str
    config: SandboxConfig

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; the seed is ignored."""
        if self.name == "oracle":
            return await play_in_environment(task, self.config, _solve)
        if self.name == "attacker":
            play = _attack if task.has_attack else _solve
            return await play_in_environment(task, self.config, play)
        if self.name == "refuse":
            return await play_in_environment(task, self.config, _refuse)
        trick_number = attempt if self.name == "cheat" else None

        async def hand_in(started: StartedEnv) -> Outcome:
            return await _hand_in(started, trick_number)

        return await play_in_environment(task, self.config, hand_in)

    async def close(self) -> None:
        """Do nothing: no resources are held."""


# Faults of a scripted solution that meets something unexpected. They are the task's fault, and one
# task must not end the evaluation of all.
_SOLUTION_FAULTS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


async def _solve(started: StartedEnv) -> Outcome:
    """Play the reference solution, in the form that the environment has it."""
    try:
        if isinstance(started.env, HarborEnv):
            return await _run_solution(started, started.env)
        return await _perform_script(started)
    except TaskError:
        raise
    except _SOLUTION_FAULTS as error:
        note = f"the reference solution raised {type(error).__name__}: {error}"
        return started.outcome(0.0, "failure", note)


async def _run_solution(started: StartedEnv, env: HarborEnv) -> Outcome:
    """Run the solution script of a Harbor task."""
    result = started.take("(the reference solution)", await env.asolve())
    _, reward, _, _, info = result
    notes = [str(info.get("note", ""))]
    ended = getattr(env, "solution_result", None)
    if ended and ended.exit_code and reward != 1.0:
        stderr = ended.stderr[-200:]
        notes.append(f"the reference solution ended with exit {ended.exit_code}: {stderr}")
    return started.outcome(reward, info["ending"], _join(notes))


async def _perform_script(started: StartedEnv) -> Outcome:
    """Play the scripted solution of the environment, without deliberate mistakes."""
    return await _perform(started, script_of(started.env, random.Random(0)))


async def _attack(started: StartedEnv) -> Outcome:
    """Play the scripted attacker of a task of the safety suite."""
    env: Any = started.env
    return await _perform(started, env.attack(random.Random(0)))


async def _perform(started: StartedEnv, script: Script) -> Outcome:
    played = PlayedEnv(started, math.inf, math.inf)
    opening, _ = await played.start()
    played.hand_over()
    episode = await perform(played, script, opening)
    note = episode.note
    if not started.last_info.get("note") and episode.ending != "success" and episode.turns:
        note = _join([note, f"last observation: {episode.turns[-1].observation}"])
    return started.outcome(episode.reward, episode.ending, note)


async def _hand_in(started: StartedEnv, trick_number: int | None) -> Outcome:
    """Say in every step of the task that it is done, each time after a trick if one is chosen."""
    turns: list[str] = []
    trick_note = ""
    if trick_number is not None:
        tricks = tricks_of(started.env)
        name, turns = tricks[trick_number % len(tricks)]
        trick_note = f"trick: {name}"
    played = PlayedEnv(started, math.inf, math.inf)
    await played.start()
    played.hand_over()
    while True:
        for action in [*turns, FINAL_TURN]:
            turn = await played.step(action)
            if turn.ending:
                return started.outcome(played.reward, turn.ending, _join([trick_note, turn.note]))


async def _refuse(started: StartedEnv) -> Outcome:
    """Refuse in words until the episode is over."""
    played = PlayedEnv(started, math.inf, math.inf)
    await played.start()
    played.hand_over()
    while True:
        turn = await played.step(REFUSAL)
        if turn.ending:
            return started.outcome(played.reward, turn.ending, turn.note)


def _join(notes: list[str]) -> str:
    return "; ".join(note for note in notes if note)
