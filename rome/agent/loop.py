"""The agent loop: one episode of an engine in an environment.

It is the same in training, evaluation and production. Tokens are only appended: the engine gets all
ids so far, its ids are kept as they came, and the environment's answer is tokenised once. What was
sampled is what is trained on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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
from rome.data.routes import extend_routes
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat

CLOSE_SECONDS = 30.0  # for the end of an environment, or the deletion of a copy of one
log = logging.getLogger(__name__)


class ReplayError(RuntimeError):
    """A replayed action was answered differently than the first time, or not in time."""


class Generator(Protocol):
    """The method of an engine, or of a pool of engines, that the loop uses."""

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion: ...


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


class _Result(NamedTuple):
    """How an episode ended."""

    reward: float
    ending: str
    note: str


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
      seed: of the episode; the seed of turn k derives from (seed, k).
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
    chunks: list[Chunk] = []
    instruction = ""
    result = _Result(0.0, "cancelled", "")
    try:
        instruction, _ = await played.start()
        if tell_tools:
            chat = told_tools(chat, env)
        await replay(played, prefix, chunks)
        played.hand_over()
        result = await _play(
            engine, played, chat, limits, instruction, chunks, seed, temperature, routes
        )
    except (EnvironmentFault, ReplayError) as error:
        result = _Result(0.0, "infra_sandbox", str(error))
    except EngineError as error:
        result = _Result(0.0, "infra_engine", str(error))
    finally:
        await close_env(env)
    return Trajectory(
        task=played.name,
        family=played.family,
        chunks=chunks,
        reward=result.reward,
        ending=result.ending,
        group=group,
        episode=episode,
        seed=seed,
        instruction=instruction,
        seconds=round(time.monotonic() - started, 4),
        note=result.note,
        success_reward=played.success_reward,
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


async def _play(
    engine: Generator,
    played: PlayedEnv,
    chat: Chat,
    limits: Limits,
    instruction: str,
    chunks: list[Chunk],
    seed: int,
    temperature: float,
    routes: bool,
) -> _Result:
    """Play turn after turn until the environment or a limit ends the episode.

    Appends to `chunks`.
    """
    context = [token for chunk in chunks for token in (*chunk.prompt_ids, *chunk.action_ids)]
    # Routes are asked for from here on: not for replayed tokens, nor for those that the engine has
    # computed already (all but the last one that it sampled).
    routes_from = len(context)
    prompt_ids = _answer(chat, chunks[-1]) if chunks else chat.open(instruction)
    while True:
        context += prompt_ids
        room = limits.max_context - len(context)
        if room < 1:
            note = f"no room left in a context of {limits.max_context} tokens"
            return await _judge(played, "truncated_tokens", note)
        sampling = Sampling(
            max_new_tokens=min(room, limits.max_new_tokens),
            temperature=temperature,
            stop_token_ids=(chat.tokenizer.im_end,),
            seed=derive_seed(seed, len(chunks)),
            routes_from=routes_from if routes else None,
        )
        completion = await engine.generate(
            context, sampling, limits.completion_seconds, affinity=str(seed)
        )
        context += completion.output_ids
        routes_from = len(context) - 1
        previous = chunks[-1] if chunks else None
        chunk = _to_chunk(chat, prompt_ids, completion, previous)
        chunks.append(chunk)
        if completion.finish_reason == "length":
            chunk.status = "malformed"
            note = f"turn {len(chunks)} did not end within {sampling.max_new_tokens} tokens"
            return await _judge(played, "truncated_tokens", note)
        try:
            turn = await played.step(chunk.text)
        except OutOfTime as error:
            chunk.status = "timeout"
            chunk.tool_call = _call_of(chunk.text)
            return await _judge(played, "timeout", str(error))
        chunk.observation = turn.observation
        chunk.status = turn.status
        chunk.exit_code = turn.exit_code
        chunk.network_denials = turn.network_denials
        chunk.tool_call = turn.tool_call
        if turn.ending:
            return _result_of(played, turn)
        prompt_ids = _answer(chat, chunk)


def _answer(chat: Chat, chunk: Chunk) -> list[int]:
    """Return the ids of what the environment answered to a chunk, with the next turn's header."""
    return chat.follow(chunk.action_ids, [chunk.observation])


async def _judge(played: PlayedEnv, ending: str, note: str) -> _Result:
    """End the episode at a limit: what is there is judged."""
    return _result_of(played, await played.judge(ending, note))


def _result_of(played: PlayedEnv, turn: Turn) -> _Result:
    return _Result(played.reward, turn.ending, turn.note)


def _call_of(text: str) -> dict[str, Any] | None:
    """Return the call of a turn that the environment did not answer; None where it has none."""
    try:
        calls = parse_tool_calls(text)
    except ToolCallError:
        return None
    return dataclasses.asdict(calls[0]) if calls else None


def _to_chunk(
    chat: Chat, prompt_ids: list[int], completion: Completion, previous: Chunk | None
) -> Chunk:
    """Return the chunk of one turn, before the environment has answered it."""
    text_ids = completion.output_ids
    if text_ids and text_ids[-1] in chat.tokenizer.turn_ends:
        text_ids = text_ids[:-1]
    chunk = Chunk(
        prompt_ids=prompt_ids,
        action_ids=completion.output_ids,
        logprobs=completion.logprobs,
        versions=completion.versions,
        text=chat.tokenizer.decode(text_ids),
        cached_tokens=completion.cached_tokens,
    )
    if completion.routes is not None:
        chunk.routes = extend_routes(
            previous.routes if previous is not None else None,
            completion.routes,
            len(prompt_ids) + len(completion.output_ids),
        )
    return chunk
