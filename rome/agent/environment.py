"""One episode of any GEM environment as an agent plays it, with its reward and its clock.

The episode's reward is GEM's return: the sum of the rewards of its steps. The clock runs only while
the environment works for the agent: not while it starts, not while it grades, and not while an
engine is waited for. What an environment leaves out of its infos is filled in, so that gem-llm's
own environments play to their end.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, NamedTuple

from envs.gem.core import (
    Env,
    Info,
    StepResult,
    UnplayableTaskError,
    judge_async,
    reset_async,
    step_async,
)
from envs.rock import AgentFault, SandboxError
from rome.data.trajectory import ENDINGS, STATUSES, is_success

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
    """

    observation: str
    ending: str = ""
    status: str = "ok"
    tool_call: dict[str, Any] | None = None
    exit_code: int | None = None
    network_denials: int = 0
    note: str = ""


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
    """

    def __init__(self, env: Env, seconds: float, start_seconds: float) -> None:
        self.env = env
        self.reward = 0.0
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

    async def start(self) -> tuple[str, Info]:
        """Start the environment; return what the agent is shown first, and the info.

        Raises:
          EnvironmentFault: it did not start. No agent has acted yet, so whatever the reason is,
            it is the environment's.
        """
        try:
            async with asyncio.timeout(self._start_seconds) as limit:
                observation, info = await reset_async(self.env)
        except Exception as error:
            if limit.expired():
                note = f"the environment did not start within {self._start_seconds:g} s"
                raise EnvironmentFault(note) from error
            raise EnvironmentFault(_describe(error)) from error
        return _shown(observation, info), info

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
        status = info.get("status", "ok")
        tool_call = None
        if info.get("use_tool") and info.get("tool_type"):
            arguments = info.get("tool_arguments", {})
            tool_call = {"name": info["tool_type"], "arguments": arguments}
        return Turn(
            observation=_shown(observation, info),
            ending=ending,
            status=status if status in STATUSES else "ok",
            tool_call=tool_call,
            exit_code=info.get("exit_code"),
            network_denials=info.get("network_denials", 0),
            note=str(info.get("note", "")),
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
        return "success" if is_success(self.reward, self.success_reward) else "failure"

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


def _shown(observation: str, info: Info) -> str:
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
