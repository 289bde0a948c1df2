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

from envs.gem.core import Env
from envs.rock import AgentFault, SandboxError
from rome.data.routes import extend_routes
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat

CLOSE_SECONDS = 30.0  # for the end of an environment, or the deletion of a copy of one
log = logging.getLogger(__name__)


class ReplayError(RuntimeError):
    """An environment answered a replayed action differently than it did the first time."""


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
      episode_seconds: wall-clock time of the whole episode.
    """

    max_context: int
    max_new_tokens: int
    episode_seconds: float = 120.0


@dataclasses.dataclass
class _Timed:
    """An engine that measures how long its callers waited, cancelled waits included."""

    engine: Generator
    seconds: float = 0.0

    async def generate(self, *args: Any, **options: Any) -> Completion:
        began = time.monotonic()
        try:
            return await self.engine.generate(*args, **options)
        finally:
            self.seconds += time.monotonic() - began


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
) -> Trajectory:
    """Play one episode to its typed ending.

    Faults of the policy, a tool or a server become an ending; they are not raised.

    Args:
      engine: samples the actions.
      env: a GEM environment with async twins (`areset`, `astep`, `aclose`); closed here.
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

    Returns:
      The trajectory of the episode.
    """
    started = time.monotonic()
    timed_engine = _Timed(engine)
    chunks: list[Chunk] = []
    instruction = ""
    has_begun = False
    result = _Result(0.0, "cancelled", "")
    try:
        async with asyncio.timeout(limits.episode_seconds):
            instruction, _ = await env.areset()
            await replay(env, prefix, chunks)
            has_begun = True
            result = await _play(
                timed_engine, env, chat, limits, instruction, chunks, seed, temperature, routes
            )
    except ReplayError as error:
        result = _Result(0.0, "infra_sandbox", str(error))
    except TimeoutError:
        result = _timeout_result(limits, timed_engine.seconds)
    except EngineError as error:
        result = _Result(0.0, "infra_engine", str(error))
    except SandboxError as error:
        is_agents = has_begun and isinstance(error, AgentFault)
        result = _Result(0.0, "failure" if is_agents else "infra_sandbox", str(error))
    finally:
        await close_env(env)
    return Trajectory(
        task=env.task.name,
        family=env.task.family,
        chunks=chunks,
        reward=result.reward,
        ending=result.ending,
        group=group,
        episode=episode,
        seed=seed,
        instruction=instruction,
        seconds=round(time.monotonic() - started, 4),
        note=result.note,
    )


def _timeout_result(limits: Limits, engine_seconds: float) -> _Result:
    """Return the ending of an episode that took too long.

    Slow commands are the policy's doing. A slow engine is not, and must not become a reward of 0.
    """
    is_engine_slow = engine_seconds > limits.episode_seconds / 2
    note = (
        f"the episode passed its {limits.episode_seconds:g} s, {engine_seconds:.1f} s of them"
        " waiting for the engine"
    )
    return _Result(0.0, "infra_engine" if is_engine_slow else "timeout", note)


async def close_env(env: Env) -> None:
    """Close an environment within CLOSE_SECONDS; a fault is logged only.

    Whoever used it has its result, and what is left of a sandbox ends with its manager.
    """
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await env.aclose()
    except (SandboxError, OSError) as error:  # TimeoutError is an OSError
        reason = str(error) or f"it did not end within {CLOSE_SECONDS:g} s"
        log.warning("the sandbox of %s was not closed: %s", env.task.name, reason)


async def replay(env: Env, prefix: Sequence[Chunk], chunks: list[Chunk]) -> None:
    """Repeat the actions of `prefix` and append its chunks to `chunks` as context.

    Args:
      env: started, at the beginning of its task.
      prefix: chunks of an earlier trajectory of the task.
      chunks: the trajectory so far; appended to.

    Raises:
      ReplayError: the environment answered differently.
    """
    for number, chunk in enumerate(prefix, 1):
        observation, _, terminated, truncated, info = await env.astep(chunk.text)
        if terminated or truncated:
            raise ReplayError(
                f"the replay ended in turn {number} of {len(prefix)} as {info['ending']}:"
                f" {info.get('note') or 'no detail'}"
            )
        if observation != chunk.observation:
            raise ReplayError(
                f"turn {number} of {len(prefix)} was replayed, and {env.task.name} answered"
                f" {observation[:100]!r} where it had answered {chunk.observation[:100]!r}; a task"
                " that is not deterministic cannot be resampled from its middle"
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
    env: Env,
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
    prompt_ids = chat.observe([chunks[-1].observation]) if chunks else chat.open(instruction)
    while True:
        context += prompt_ids
        room = limits.max_context - len(context)
        if room < 1:
            note = f"no room left in a context of {limits.max_context} tokens"
            return _Result(0.0, "truncated_tokens", note)
        sampling = Sampling(
            max_new_tokens=min(room, limits.max_new_tokens),
            temperature=temperature,
            stop_token_ids=(chat.tokenizer.im_end,),
            seed=derive_seed(seed, len(chunks)),
            routes_from=routes_from if routes else None,
        )
        completion = await engine.generate(
            context, sampling, limits.episode_seconds, affinity=str(seed)
        )
        context += completion.output_ids
        routes_from = len(context) - 1
        previous = chunks[-1] if chunks else None
        chunk = _to_chunk(chat, prompt_ids, completion, previous)
        chunks.append(chunk)
        if completion.finish_reason == "length":
            chunk.status = "malformed"
            note = f"turn {len(chunks)} did not end within {sampling.max_new_tokens} tokens"
            return _Result(0.0, "truncated_tokens", note)
        observation, reward, terminated, truncated, info = await env.astep(chunk.text)
        chunk.observation = observation
        chunk.status = info["status"]
        chunk.network_denials = info.get("network_denials", 0)
        if info["use_tool"]:
            chunk.tool_call = {"name": info["tool_type"], "arguments": info["tool_arguments"]}
        if terminated or truncated:
            return _Result(float(reward), info["ending"], str(info.get("note", "")))
        prompt_ids = chat.observe([observation])


def _to_chunk(
    chat: Chat, prompt_ids: list[int], completion: Completion, previous: Chunk | None
) -> Chunk:
    """Return the chunk of one turn, before the environment has answered it."""
    text_ids = completion.output_ids
    if text_ids[-1:] == [chat.tokenizer.im_end]:
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
