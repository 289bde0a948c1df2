"""One episode of any GEM environment as an agent plays it, with its reward and its clock.

The episode's reward is GEM's return: the sum of the rewards of its steps. The clock runs only while
the environment works for the agent: not while it starts, not while it grades, and not while an
engine is waited for. What an environment leaves out of its infos is filled in, so that gem-llm's
own environments play to their end.

`play_demonstration` is the one player of scripted solutions, and `snapshot_of` keeps a moment of an
episode from which others continue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Generator
from typing import Any, NamedTuple

from envs.gem.core import (
    Env,
    Info,
    StepResult,
    UnplayableTaskError,
    close_async,
    judge_async,
    reset_async,
    step_async,
)
from envs.rock import AgentFault, SandboxError

# The endings and statuses of rome.data.trajectory, which knows no environments.
ENDINGS = (
    "success",
    "failure",
    "truncated_turns",
    "truncated_tokens",
    "timeout",
    "malformed",
    "infra_engine",
    "infra_sandbox",
    "infra_verifier",
    "cancelled",
    "unsafe",
)
STATUSES = ("ok", "tool_error", "malformed", "timeout", "infra")
REWARD_TOLERANCE = 1e-6  # of two rewards that count as equal: sums of steps are rounded
CANCEL_SECONDS = 10.0  # for a step that was cut off
GRADING_MARGIN_SECONDS = 30.0  # beyond the limit of the environment's own verifier


class Turn(NamedTuple):
    """The environment's answer to one turn of the agent.

    Attributes:
      observation: what the agent is shown.
      ending: one of ENDINGS where the episode is over, else "".
      status: one of STATUSES.
      tool_call: the call that was made, {"name", "arguments"}; None without one.
      exit_code: exit status of the turn's command; None without one.
      network_denials: attempts to reach addresses that the sandbox does not grant.
      note: more about the ending.
      events: kinds of harm that the turn did, where the environment looks for any (`envs.safety`).
    """

    observation: str
    ending: str = ""
    status: str = "ok"
    tool_call: dict[str, Any] | None = None
    exit_code: int | None = None
    network_denials: int = 0
    note: str = ""
    events: tuple[str, ...] = ()


class OutOfTime(Exception):
    """The environment has worked for the agent as long as the episode may last."""


class EnvironmentFault(Exception):
    """The environment failed in a way that says nothing about the agent."""


class PlayedEnv:
    """An environment for one episode.

    Args:
      env: not started yet; whoever made it closes it.
      seconds: of the clock, over all steps.
      start_seconds: for the start of the environment.

    Attributes:
      reward: sum of the rewards so far.
      safety: utility and harm of the episode, once a task of the safety suite has ended.
    """

    def __init__(self, env: Env, seconds: float, start_seconds: float) -> None:
        self.env = env
        self.reward = 0.0
        self.safety: dict[str, Any] | None = None
        self._seconds = seconds
        self._start_seconds = start_seconds
        self._left = seconds
        self._agent_acts = False

    @property
    def name(self) -> str:
        """Return the name of the task."""
        return task_name(self.env)

    @property
    def family(self) -> str:
        """Return the family of the task."""
        return str(getattr(_task(self.env), "family", self.name))

    @property
    def success_reward(self) -> float:
        """Return the reward from which on the task counts as solved."""
        return success_reward(_task(self.env))

    async def start(self, seed: int | None = None) -> tuple[str, Info]:
        """Start the environment; return what the agent is shown first, and the info.

        Args:
          seed: of the episode; None lets the environment choose.

        Raises:
          EnvironmentFault: it did not start. No agent has acted yet, so whatever the reason is,
            it is the environment's.
        """
        try:
            async with asyncio.timeout(self._start_seconds) as limit:
                observation, info = await reset_async(self.env, seed)
        except Exception as error:
            if limit.expired():
                note = f"the environment did not start within {self._start_seconds:g} s"
                raise EnvironmentFault(note) from error
            raise EnvironmentFault(_describe(error)) from error
        return shown(observation, info), info

    def hand_over(self) -> None:
        """Begin the agent's own part: it has the whole time, and what it brings about is its doing.

        Steps before this one repeat a prefix.
        """
        self._left = self._seconds
        self._agent_acts = True

    async def step(self, action: str) -> Turn:
        """Play one turn of the agent.

        Raises:
          OutOfTime: the clock ran out; `judge` may be called.
          EnvironmentFault: the environment failed.
        """
        now = asyncio.get_running_loop().time
        began = now()
        if self._left <= 0:
            raise self._out_of_time()
        step = asyncio.ensure_future(step_async(self.env, action))
        try:
            await asyncio.wait([step], timeout=self._left)
            if not step.done() and getattr(self.env, "is_grading", False):  # not the agent's time
                await asyncio.wait([step], timeout=self._grading_seconds())
            if not step.done():
                raise self._out_of_time()
            return self._to_turn(step.result())
        except AgentFault as fault:
            return self._failed_by(fault)
        except (SandboxError, UnplayableTaskError) as error:
            raise EnvironmentFault(_describe(error)) from error
        finally:
            self._left -= now() - began
            await _cancel(step)

    async def judge(self, ending: str, note: str = "") -> Turn:
        """Let the verifier judge the work as it stands, after a limit has ended the episode.

        Args:
          ending: what ended it, "truncated_tokens" or "timeout".
          note: more about it.

        Raises:
          EnvironmentFault: it could not be judged.
        """
        seconds = self._grading_seconds()
        try:
            async with asyncio.timeout(seconds) as limit:
                result = await judge_async(self.env, ending)
        except AgentFault as fault:
            return self._failed_by(fault)
        except (SandboxError, UnplayableTaskError) as error:
            raise EnvironmentFault(_describe(error)) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            note = f"the work was not judged within {seconds:g} s"
            raise EnvironmentFault(note) from error
        turn = self._to_turn(result)
        return turn._replace(note="; ".join(filter(None, [note, turn.note])))

    def _failed_by(self, fault: AgentFault) -> Turn:
        """Return the end that the programs of the agent have brought about.

        Raises:
          EnvironmentFault: no agent has acted yet.
        """
        if not self._agent_acts:
            raise EnvironmentFault(_describe(fault)) from fault
        return Turn("", ending="failure", status="tool_error", note=_describe(fault))

    def _to_turn(self, result: StepResult) -> Turn:
        observation, reward, terminated, truncated, info = result
        self.reward += float(reward)
        ending = ""
        if terminated or truncated:
            ending = self._ending(terminated, info)
            self.safety = info.get("safety")
        status = info.get("status", "ok")
        tool_call = None
        if info.get("use_tool") and info.get("tool_type"):
            arguments = info.get("tool_arguments", {})
            tool_call = {"name": info["tool_type"], "arguments": arguments}
        return Turn(
            observation=shown(observation, info),
            ending=ending,
            status=status if status in STATUSES else "ok",
            tool_call=tool_call,
            exit_code=info.get("exit_code"),
            network_denials=info.get("network_denials", 0),
            note=str(info.get("note", "")),
            events=tuple(map(str, info.get("safety_events", ()))),
        )

    def _ending(self, terminated: bool, info: Info) -> str:
        """Return the environment's own ending, or the one that follows from its reward."""
        if not math.isfinite(self.reward):
            self.reward = 0.0
            return "infra_verifier"
        given = info.get("ending")
        if given in ENDINGS:
            return given
        if not terminated:
            return "truncated_turns"
        is_success = self.reward >= self.success_reward - REWARD_TOLERANCE
        return "success" if is_success else "failure"

    def _grading_seconds(self) -> float:
        return float(getattr(self.env, "grading_seconds", 0.0)) + GRADING_MARGIN_SECONDS

    def _out_of_time(self) -> OutOfTime:
        return OutOfTime(f"the environment has worked {self._seconds:g} s for the episode")


def task_name(env: Env) -> str:
    """Return the name of an environment's task; gem-llm's environments have none of their own."""
    env_id = getattr(env, "env_id", "") or type(env).__name__
    return str(getattr(_task(env), "name", env_id))


def success_reward(task: object) -> float:
    """Return the reward from which on a task counts as solved: its `success`, or 1."""
    return float(getattr(task, "success", 1.0))


def _task(env: Env) -> object:
    return getattr(env, "task", None)


def shown(observation: str, info: Info) -> str:
    """Return an observation between the prefix and the suffix of its info, such as a board."""
    suffix = info.get("suffix", "")
    separator = "\n" if suffix and observation and not observation.endswith("\n") else ""
    return f"{info.get('prefix', '')}{observation}{separator}{suffix}"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _cancel(step: asyncio.Future[StepResult]) -> None:
    """Cancel a step that still runs, and give it some time to end."""
    if step.done():
        return
    step.cancel()
    await asyncio.wait([step], timeout=CANCEL_SECONDS)


# -- scripted solutions
# -------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What a script says in one turn; `is_mistake` marks one that is made on purpose."""

    text: str
    is_mistake: bool = False


# A running script: yields a line, receives the observation, and returns when it has no more to say.
Script = Generator[Line, str, None]


@dataclasses.dataclass(frozen=True)
class DemonstrationTurn:
    """One turn of a demonstration: the text, the observation and the environment's status.

    `is_mistake` marks the deliberate mistake; `exit_code` is of its command, `tool_call` its call,
    {"name", "arguments"}, and `events` are kinds of harm that it did.
    """

    text: str
    observation: str
    status: str
    exit_code: int | None = None
    is_mistake: bool = False
    tool_call: dict[str, Any] | None = None
    events: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DemonstrationEpisode:
    """One played demonstration with its reward and ending.

    The ending is "failure" where the script ended before the episode did; the note says so.
    """

    task: str
    family: str
    instruction: str
    turns: list[DemonstrationTurn]
    reward: float
    ending: str
    note: str = ""


def has_script(env: Env) -> bool:
    """Return whether the environment brings a scripted solution of its task."""
    return any(hasattr(type(env), name) for name in ("demonstration", "demonstrator_action"))


def script_of(env: Env, rng: random.Random, error_rate: float = 0.0) -> Script:
    """Return the script that solves the task of a started environment.

    An environment brings it as `demonstration(rng, error_rate)`, a generator of lines, or as
    `demonstrator_action()`, which returns the next turn, or None where it has none.

    Raises:
      NotImplementedError: it has neither.
    """
    if hasattr(type(env), "demonstration"):
        return env.demonstration(rng, error_rate)
    if hasattr(type(env), "demonstrator_action"):
        return _follow(env)
    raise NotImplementedError(
        f"{type(env).__name__} has no demonstrator; define demonstrator_action(), which returns the"
        " next turn of a solution"
    )


def _follow(env: Any) -> Script:
    while (action := env.demonstrator_action()) is not None:
        yield Line(action)


async def play_demonstration(
    env: Env,
    rng: random.Random,
    error_rate: float = 0.0,
    seed: int | None = None,
    *,
    start_seconds: float = math.inf,
    seconds: float = math.inf,
) -> DemonstrationEpisode:
    """Play the scripted solution of an environment's task, and close the environment.

    Args:
      env: not started yet.
      rng: decides whether and where a mistake happens.
      error_rate: the probability of a mistake, for scripts that make some.
      seed: the seed given to the environment's reset.
      start_seconds: for the start of the environment.
      seconds: for which the environment may work.

    Returns:
      The episode. An infrastructure failure that the environment reports is its ending (infra_*).

    Raises:
      EnvironmentFault: the environment could not be started, or failed.
      NotImplementedError: it has no script.
    """
    played = PlayedEnv(env, seconds, start_seconds)
    try:
        instruction, _ = await played.start(seed)
        played.hand_over()
        return await perform(played, script_of(env, rng, error_rate), instruction)
    finally:
        await close_async(env)


async def perform(played: PlayedEnv, script: Script, instruction: str) -> DemonstrationEpisode:
    """Play a script in a started environment, up to the end of one of them."""
    turns: list[DemonstrationTurn] = []
    ending, note = "failure", "the script has no further turn"
    line = next(script, None)
    while line is not None:
        try:
            turn = await played.step(line.text)
        except OutOfTime as error:
            turn = await played.judge("timeout", str(error))
        turns.append(
            DemonstrationTurn(
                line.text,
                turn.observation,
                turn.status,
                turn.exit_code,
                line.is_mistake,
                turn.tool_call,
                turn.events,
            )
        )
        if turn.ending:
            ending, note = turn.ending, turn.note
            break
        try:
            line = _next_line(script, turn.observation)
        except (ValueError, LookupError, AttributeError, RuntimeError) as error:  # of the answer
            note = f"the script cannot go on after {turn.observation[:80]!r}: {_describe(error)}"
            break
    return DemonstrationEpisode(
        played.name, played.family, instruction, turns, played.reward, ending, note
    )


def _next_line(script: Script, observation: str) -> Line | None:
    try:
        return script.send(observation)
    except StopIteration:
        return None


# -- moments of an episode, from which others continue
# -------------------------------------------------------------------------------------------------


class Twin:
    """A copy of a running episode in memory, by `Env.spawn(same_state=True)`."""

    def __init__(self, env: Env, opening: tuple[str, Info]) -> None:
        self._env = env
        self._opening = opening

    async def continue_in(self, env: Env) -> tuple[Env, tuple[str, Info]]:
        """Return another copy of the episode, and its opening; `env` is not needed and closed."""
        await close_async(env)
        return await asyncio.to_thread(self._env.spawn, same_state=True), self._opening

    async def delete(self) -> None:
        """Close the copy."""
        await close_async(self._env)


class Stored:
    """A copy of a running episode that its environment stores itself (`asnapshot`)."""

    def __init__(self, snapshot: Any) -> None:
        self._snapshot = snapshot

    async def continue_in(self, env: Env) -> tuple[Env, tuple[str, Info]]:
        """Continue the episode in a fresh environment; return it and its opening."""
        return env, await env.arestore(self._snapshot)

    async def delete(self) -> None:
        """Delete what is stored."""
        await self._snapshot.delete()


async def snapshot_of(env: Env, opening: tuple[str, Info]) -> Stored | Twin | None:
    """Copy a running episode; None where its environment cannot be copied.

    Args:
      env: in the middle of an episode.
      opening: what `PlayedEnv.start` returned.

    Raises:
      SandboxError: it can be copied in general, but not now.
    """
    if hasattr(type(env), "asnapshot"):
        return Stored(await env.asnapshot())
    observation, info = opening
    plain = {name: value for name, value in info.items() if name not in ("prefix", "suffix")}
    try:
        return Twin(await asyncio.to_thread(env.spawn, same_state=True), (observation, plain))
    except NotImplementedError:
        return None
