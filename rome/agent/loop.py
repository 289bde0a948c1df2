"""The agent loop: one episode of an engine in an environment.

It is the same in training, evaluation and production. Tokens are only appended, and the session
(`rome.agent.session`) owns them: the environment's answer is tokenised once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from envs.gem import ToolCallError, parse_tool_calls
from envs.gem.core import Env, close_async
from envs.gem.episode import (
    GRADING_MARGIN_SECONDS,
    EnvironmentFault,
    OutOfTime,
    PlayedEnv,
    Turn,
    task_name,
)
from envs.rock import SandboxError
from rome.agent.session import ContextFull, Generator, Session
from rome.data.trajectory import Chunk, Trajectory
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat

CLOSE_SECONDS = 30.0  # for the end of an environment, or the deletion of a copy of one
log = logging.getLogger(__name__)


class ReplayError(RuntimeError):
    """A replayed action was answered differently than the first time, or not in time."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one episode.

    Attributes:
      max_context: tokens of all prompts and actions together.
      max_new_tokens: tokens of one action.
      episode_seconds: for which the environment may work for the agent, over all turns; the time
        of engines, of the start and of grading does not count.
      start_seconds: for the start of the environment. The replay of a prefix then has
        episode_seconds of its own.
      completion_seconds: for one answer of an engine, its queue included. The time in which weights
        are published does not count.
    """

    max_context: int
    max_new_tokens: int
    episode_seconds: float = 120.0
    start_seconds: float = 120.0
    completion_seconds: float = 600.0

    def worst_seconds(self, turns: int, grading_seconds: float) -> float:
        """Return how long an episode of so many turns may last at worst, publications apart."""
        begin = self.start_seconds + self.episode_seconds  # with the replay of a prefix
        turns_seconds = turns * self.completion_seconds + self.episode_seconds
        end = 2 * (grading_seconds + GRADING_MARGIN_SECONDS) + CLOSE_SECONDS
        return begin + turns_seconds + end


async def run_episode(
    engine: Generator,
    env: Env,
    chat: Chat,
    limits: Limits,
    *,
    seed: int,
    temperature: float = 1.0,
    group: int = 0,
    episode: int = 0,
    routes: bool = False,
    prefix: Sequence[Chunk] = (),
    tell_tools: bool = False,
) -> Trajectory:
    """Play one episode to its typed ending.

    Faults of the policy, a tool or a server become an ending; they are not raised. Where a limit
    of tokens or time ends the episode, the environment judges what is there: the ending names the
    limit, and the reward is the verifier's.

    Args:
      engine: samples the actions.
      env: any GEM environment, gem-llm's own included; closed here.
      chat: writes instructions and observations as tokens.
      limits: bounds of tokens and time.
      seed: of the episode; the seeds of its turns derive from it.
      temperature: of sampling.
      group: recorded in the trajectory.
      episode: recorded in the trajectory.
      routes: whether to ask the engine for the experts of each token, and to keep them.
      prefix: chunks of an earlier trajectory of this task. Their actions are repeated in the
        environment, which must answer as it did then, and they stand in the trajectory as context;
        the policy plays from there. A different answer ends the episode as infra_sandbox.
      tell_tools: whether the first prompt has the environment's own tools and system text; False
        leaves it to `chat`.

    Returns:
      The trajectory of the episode.
    """
    started = time.monotonic()
    played = PlayedEnv(env, limits.episode_seconds, limits.start_seconds)
    chunks: list[Chunk] = []  # grows as the episode does, so that a fault leaves what was played
    instruction = ""
    end = Turn("", ending="cancelled")
    try:
        instruction, _ = await played.start()
        if tell_tools:
            chat = told_tools(chat, env)
        await replay(played, prefix, chunks)
        played.hand_over()
        session = Session(
            engine,
            chat.tokenizer,
            seed=seed,
            max_context=limits.max_context,
            max_new_tokens=limits.max_new_tokens,
            completion_seconds=limits.completion_seconds,
            temperature=temperature,
            routes=routes,
            chunks=chunks,
        )
        end = await _play(session, played, chat, instruction)
    except (EnvironmentFault, ReplayError) as error:
        end = Turn("", ending="infra_sandbox", note=str(error))
    except EngineError as error:
        end = Turn("", ending="infra_engine", note=str(error))
    finally:
        await close_env(env)
    return record(
        played, chunks, end, started, seed=seed, group=group, episode=episode, told=instruction
    )


def record(
    played: PlayedEnv,
    chunks: list[Chunk],
    end: Turn,
    started: float,
    *,
    seed: int,
    group: int,
    episode: int,
    told: str,
) -> Trajectory:
    """Return the trajectory of an episode that began at a monotonic time and has ended.

    `told` is its instruction; the others are as in `run_episode`.
    """
    return Trajectory(
        task=played.name,
        family=played.family,
        chunks=chunks,
        reward=0.0 if end.ending.startswith("infra_") else played.reward,
        ending=end.ending,
        group=group,
        episode=episode,
        seed=seed,
        instruction=told,
        seconds=round(time.monotonic() - started, 4),
        note=end.note,
        success_reward=played.success_reward,
        safety=played.safety,
    )


def told_tools(chat: Chat, env: Any) -> Chat:
    """Return the chat whose first prompt has the tools and the system text of an environment.

    Args:
      chat: its tokenizer is kept.
      env: an environment or a task; both are optional there.
    """
    tools = list(getattr(env, "tools", None) or ()) or None
    return Chat(chat.tokenizer, tools, getattr(env, "system", None) or None)


async def close_env(env: Env) -> None:
    """Close an environment within CLOSE_SECONDS; a fault is logged only.

    Whoever used it has its result, and what is left of a sandbox ends with its manager.
    """
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await close_async(env)
    except (SandboxError, OSError) as error:  # TimeoutError is an OSError
        reason = str(error) or f"it did not end within {CLOSE_SECONDS:g} s"
        log.warning("the sandbox of %s was not closed: %s", task_name(env), reason)


async def replay(played: PlayedEnv, prefix: Sequence[Chunk], chunks: list[Chunk]) -> None:
    """Repeat the actions of `prefix` and append its chunks to `chunks` as context.

    Args:
      played: started, at the beginning of its task.
      prefix: chunks of an earlier trajectory of the task.
      chunks: the trajectory so far; appended to.

    Raises:
      ReplayError: the environment answered differently, or not in time.
      EnvironmentFault: it failed.
    """
    for number, chunk in enumerate(prefix, 1):
        try:
            turn = await played.step(chunk.text)
        except OutOfTime as error:
            where = f"turn {number} of {len(prefix)}"
            raise ReplayError(f"the replay stopped in {where}: {error}") from error
        if turn.ending:
            raise ReplayError(
                f"the replay ended in turn {number} of {len(prefix)} as {turn.ending}:"
                f" {turn.note or 'no detail'}"
            )
        if turn.observation != chunk.observation:
            raise ReplayError(
                f"turn {number} of {len(prefix)} was replayed, and {played.name} answered"
                f" {turn.observation[:100]!r} where it had answered {chunk.observation[:100]!r}; a"
                " task that is not deterministic cannot be resampled from its middle"
            )
        context = dataclasses.replace(
            chunk,
            logprobs=[0.0] * len(chunk.action_ids),
            versions=[],
            kind="context",
            cached_tokens=0,
            routes=None,
        )
        chunks.append(context)


async def _play(session: Session, played: PlayedEnv, chat: Chat, instruction: str) -> Turn:
    """Play turn after turn until the environment or a limit ends the episode."""
    chunks = session.chunks
    prompt_ids = _answer(chat, chunks[-1]) if chunks else chat.open(instruction)
    while True:
        try:
            number = await session.sample(session.last, prompt_ids)
        except ContextFull as full:
            return await played.judge("truncated_tokens", str(full))
        turn = await take_turn(session, played, chat, number)
        if turn.ending:
            return turn
        prompt_ids = _answer(chat, chunks[number])


async def take_turn(session: Session, played: PlayedEnv, chat: Chat, number: int) -> Turn:
    """Hand an answer of the policy to the environment, and note in its chunk what came of it.

    Where it was cut, or the time is over, the environment judges what is there.
    """
    chunk = session.chunks[number]
    if session.is_truncated(number):
        turns = len(session.chunks)
        note = f"turn {turns} did not end within {len(chunk.action_ids)} tokens"
        return await played.judge("truncated_tokens", note)
    try:
        turn = await played.step(chat.opened + chunk.text)
    except OutOfTime as error:
        chunk.status = "timeout"
        chunk.tool_call = _call_of(chunk.text)
        return await played.judge("timeout", str(error))
    chunk.observation = turn.observation
    chunk.status = turn.status
    chunk.exit_code = turn.exit_code
    chunk.network_denials = turn.network_denials
    chunk.events = list(turn.events)
    chunk.tool_call = turn.tool_call
    return turn


def _answer(chat: Chat, chunk: Chunk) -> list[int]:
    """Return the ids of what the environment answered to a chunk, with the next turn's header."""
    return chat.follow(chunk.action_ids, [chunk.observation])


def _call_of(text: str) -> dict[str, Any] | None:
    """Return the call of a turn that the environment did not answer; None where it has none."""
    try:
        calls = parse_tool_calls(text)
    except ToolCallError:
        return None
    return dataclasses.asdict(calls[0]) if calls else None
