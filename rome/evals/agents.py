"""Who plays: the reference solution, nobody, a cheat, or a policy behind engines.

Each plays one attempt in a sandbox of its own.

An agent never raises for what a task, a sandbox or an engine did: it returns the typed ending. An
attempt that the infrastructure spoiled has no reward at all, so that nobody can take it for a 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from envs.gem import Env, Info, StepResult
from envs.rock import SandboxConfig, SandboxError
from envs.tasks.harbor import BuildError, HarborEnv, TaskError
from envs.tasks.terminal.demonstrator import FINAL_TURN, play_demonstration
from envs.tasks.terminal.env import MissingProgramsError
from rome.agent.loop import Generator, Limits, run_episode
from rome.evals.cheats import tricks_of
from rome.evals.tasks import EvalTask
from rome.model.tokenizer import Chat

CLOSE_SECONDS = 60.0
NOTE_CHARS = 500


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one attempt ended.

    `reward` is None where the infrastructure spoiled it; `permanent`: trying again would end the
    same way.

    tokens: {prompt, completion}, where a model played. Prompt tokens are counted as they were
    billed or read anew: see the agent.
    """

    reward: float | None
    ending: str
    note: str = ""
    turns: int = 0
    tokens: dict[str, int] | None = None
    permanent: bool = False

    @property
    def spoiled(self) -> bool:
        return is_spoiled(self.ending)


def is_spoiled(ending: str) -> bool:
    """Whether an attempt that ended so says nothing about its agent."""
    return ending.startswith("infra_") or ending == "cancelled"


class Agent(Protocol):
    """Plays one attempt. `seed` is different for each attempt; what does not sample ignores it."""

    name: str

    async def play(self, task: EvalTask, attempt: int, seed: int) -> Outcome: ...

    async def close(self) -> None: ...


class Started:
    """A started environment for code that would start it itself: `areset` gives the opening that is
    there.

    Remembers turns and the last answer.
    """

    def __init__(self, env: Env, task: EvalTask, opening: tuple[str, Info]) -> None:
        self.env, self.task, self.opening = env, task, opening
        self.turns, self.last = 0, {}

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        return self.opening

    async def astep(self, action: str) -> StepResult:
        result = await self.env.astep(action)
        self.turns, self.last = self.turns + 1, result[4]
        return result

    async def aclose(self) -> None:
        await self.env.aclose()

    def outcome(self, reward: float, ending: str, note: str = "") -> Outcome:
        note = note or str(self.last.get("note", ""))
        return Outcome(
            None if is_spoiled(ending) else float(reward), ending, note[:NOTE_CHARS], self.turns
        )


async def with_environment(
    task: EvalTask,
    config: SandboxConfig,
    play: Callable[[Started], Awaitable[Outcome]],
    seconds: float | None = None,
) -> Outcome:
    """Starts the task's environment, lets `play` play there and closes it.

    Faults of starting are the infrastructure's, whoever plays.

    Args:
      seconds: for playing; None: what the task's own limits add up to.
    """
    env, seconds = task.make_env(config), seconds or task.play_seconds
    try:
        try:
            async with asyncio.timeout(task.start_seconds):
                started = Started(env, task, await env.areset())
        except TimeoutError:
            return spoiled(
                "infra_sandbox", f"the environment did not start within {task.start_seconds:g} s"
            )
        try:
            async with asyncio.timeout(seconds):
                return await play(started)
        except TimeoutError:
            return started.outcome(0.0, "timeout", f"the attempt passed its {seconds:g} s")
    except (
        MissingProgramsError,
        TaskError,
    ) as error:  # a build step may fail once; all else of these is as it is
        return spoiled(
            "infra_sandbox",
            f"{type(error).__name__}: {error}",
            permanent=not isinstance(error, BuildError),
        )
    except SandboxError as error:
        return spoiled("infra_sandbox", f"{type(error).__name__}: {error}")
    finally:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await env.aclose()
        except (
            TimeoutError
        ):  # the attempt has its result; what is left of the sandbox ends with this process
            logging.warning("the sandbox of %r did not end within %g s", task.name, CLOSE_SECONDS)


def spoiled(ending: str, note: str, permanent: bool = False) -> Outcome:
    return Outcome(None, ending, note[:NOTE_CHARS], permanent=permanent)


@dataclasses.dataclass
class Scripted:
    """oracle (the reference solution or the environment's demonstrator), noop or cheat.

    The n-th attempt of the cheat is its n-th trick; the note says which.
    """

    name: str
    config: SandboxConfig

    async def play(self, task: EvalTask, attempt: int, seed: int) -> Outcome:
        if self.name == "oracle":
            return await with_environment(task, self.config, _solve)
        return await with_environment(
            task,
            self.config,
            lambda started: _hand_in(started, attempt if self.name == "cheat" else None),
        )

    async def close(self) -> None:
        pass


async def _solve(started: Started) -> Outcome:
    try:
        if isinstance(started.env, HarborEnv):
            _, reward, _, _, info = await started.env.asolve()
            ended = getattr(started.env, "solution_result", None)
            why = (
                f"; the reference solution ended with exit {ended.exit_code}: {ended.stderr[-200:]}"
                if ended and ended.exit_code and reward != 1.0
                else ""
            )
            started.last = info
            return started.outcome(
                reward, info["ending"], f"{info.get('note', '')}{why}".lstrip("; ")
            )
        if hasattr(type(started.env), "demonstrator_action"):
            return await _follow(started, started.env)
        episode = await play_demonstration(started, random.Random(0))
        why = (
            f"last observation: {episode.turns[-1].observation}"
            if episode.reward != 1.0 and episode.turns
            else ""
        )
        return started.outcome(
            episode.reward, episode.ending, str(started.last.get("note", "")) or why
        )
    except TaskError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        # a demonstrator that meets what it did not expect: the task's fault, and one task must not end
        # the evaluation of all
        return started.outcome(
            0.0, "failure", f"the reference solution raised {type(error).__name__}: {error}"
        )


async def _follow(started: Started, env: Any) -> Outcome:
    """Play the environment's own demonstrator, turn by turn."""
    observation = started.opening[0]
    while (action := env.demonstrator_action()) is not None:
        observation, reward, terminated, truncated, info = await started.astep(action)
        if terminated or truncated:
            return started.outcome(reward, info["ending"])
    return started.outcome(
        0.0, "failure", f"the demonstrator has no further turn; last observation: {observation}"
    )


async def _hand_in(started: Started, attempt: int | None) -> Outcome:
    """Says that it is done, in every step of the task, after a trick where an attempt's number
    chooses one.
    """
    trick, turns = (
        (None, [])
        if attempt is None
        else tricks_of(started.env)[attempt % len(tricks_of(started.env))]
    )
    told = f"trick: {trick}" if trick else ""
    while True:
        for action in [*turns, FINAL_TURN]:
            _, reward, terminated, truncated, info = await started.astep(action)
            if terminated or truncated:
                return started.outcome(
                    reward,
                    info["ending"],
                    "; ".join(filter(None, [told, str(info.get("note", ""))])),
                )


@dataclasses.dataclass
class Policy:
    """A model behind our engines, played by `rome.agent.loop`.

    Of its tokens, `prompt` are those that the environment appended.

    tell_tools: the model is told the tools and the system text of the environment that it plays;
    False: what `chat` says, and nothing else.
    """

    engine: Generator
    chat: Chat
    limits: Limits
    config: SandboxConfig
    temperature: float = 1.0
    tell_tools: bool = False
    name: str = "policy"

    async def play(self, task: EvalTask, attempt: int, seed: int) -> Outcome:
        async def episode(started: Started) -> Outcome:
            chat = self.chat
            if self.tell_tools:
                chat = Chat(
                    chat.tokenizer,
                    started.opening[1]["tools"],
                    getattr(started.env, "system", None),
                )
            played = await run_episode(
                self.engine,
                started,
                chat,
                self.limits,
                seed=seed,
                temperature=self.temperature,
                episode=attempt,
            )
            tokens = {
                "prompt": sum(len(chunk.prompt_ids) for chunk in played.chunks),
                "completion": played.num_action_tokens,
            }
            return dataclasses.replace(
                started.outcome(played.reward, played.ending, played.note),
                tokens=tokens,
                turns=len(played.chunks),
            )

        return await with_environment(
            task, self.config, episode, self.limits.episode_seconds + CLOSE_SECONDS
        )

    async def close(self) -> None:
        await self.engine.close()
