"""The agent loop: one episode of (Engine, Env), the same in training, evaluation and production.

Tokens are only ever appended: the engine is asked with all ids so far, its ids are kept as they
came, and the environment's answer is tokenised once and appended. What was sampled is what is
trained on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from envs.gem.core import Env
from envs.rock import SandboxError
from rome.data.routes import extend_routes
from rome.data.trajectory import Chunk, Trajectory
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat

log = logging.getLogger(__name__)


class ReplayError(RuntimeError):
    """An environment that was led along an earlier trajectory did not answer as it had."""


class Generator(Protocol):
    """What the loop needs of an engine or of a pool of them."""

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_s: float,
        *,
        affinity: str | None = None,
    ) -> Completion: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one episode.

    Tokens count prompt and action; seconds are wall clock for the whole episode.
    """

    max_context: int
    max_new_tokens: int
    episode_seconds: float = 120.0


@dataclasses.dataclass
class _Timed:
    """An engine that adds up how long it kept its caller waiting, a wait that was cut off included."""

    engine: Generator
    seconds: float = 0.0

    async def generate(self, *args: Any, **options: Any) -> Completion:
        began = time.monotonic()
        try:
            return await self.engine.generate(*args, **options)
        finally:
            self.seconds += time.monotonic() - began


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on all parts and on nothing else (no process-wide hash seed, no
    global state).
    """
    digest = hashlib.blake2s("\x1f".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


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
    """Plays one episode to its typed ending; returns what happened, never raises for what a policy,
    tool or server did.

    Args:
      env: a GEM environment with async twins (`areset`, `astep`, `aclose`); closed here.
      seed: of the episode; the seed of turn k derives from (seed, k).
      routes: the engine is asked for the experts of each token, and the chunks keep them.
      prefix: chunks of an earlier trajectory of this task. Their turns are taken again in the
        environment, which must answer as it did then, and stand in the trajectory as context; the
        policy plays from there. Where it answers otherwise the episode ends as infra_sandbox.
    """
    started, engine = time.monotonic(), _Timed(engine)
    chunks: list[Chunk] = []
    instruction, reward, ending, note = "", 0.0, "cancelled", ""
    try:
        async with asyncio.timeout(limits.episode_seconds):
            instruction, _ = await env.areset()
            await replay(env, prefix, chunks)
            reward, ending, note = await _play(
                engine, env, chat, limits, instruction, chunks, seed, temperature, routes
            )
    except ReplayError as error:
        ending, note = "infra_sandbox", str(error)
    except TimeoutError:
        # Slow commands are the policy's doing; a slow engine is not, and must not become a reward
        # of 0.
        ending = "infra_engine" if engine.seconds > limits.episode_seconds / 2 else "timeout"
        note = (
            f"the episode passed its {limits.episode_seconds:g} s, {engine.seconds:.1f} s of them"
            " waiting for the engine"
        )
    except EngineError as error:
        ending, note = "infra_engine", str(error)
    except (
        SandboxError
    ) as error:  # only from the start of the episode: later ones come as typed endings
        ending, note = "infra_sandbox", str(error)
    finally:
        try:
            await env.aclose()
        except (
            SandboxError
        ) as error:  # the episode has its result; what is left of the sandbox ends with its manager
            log.warning("the sandbox of %s was not closed: %s", env.task.name, error)
    return Trajectory(
        task=env.task.name,
        family=env.task.family,
        chunks=chunks,
        reward=reward,
        ending=ending,
        group=group,
        episode=episode,
        seed=seed,
        instruction=instruction,
        seconds=round(time.monotonic() - started, 4),
        note=note,
    )


async def replay(env: Env, prefix: Sequence[Chunk], chunks: list[Chunk]) -> None:
    """Takes the turns of `prefix` again and appends them to `chunks` as context.

    Raises ReplayError where the environment answers otherwise.
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
        chunks.append(
            dataclasses.replace(
                chunk,
                logprobs=[0.0] * len(chunk.action_ids),
                versions=[],
                kind="context",
                cached_tokens=0,
                routes=None,
            )
        )


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
) -> tuple[float, str, str]:
    """Turn after turn until the environment or a limit ends the episode.

    Appends to `chunks`; returns (reward, ending, note).
    """
    tokenizer = chat.tokenizer
    context = [token for chunk in chunks for token in (*chunk.prompt_ids, *chunk.action_ids)]
    ran = len(
        context
    )  # tokens whose routes are not asked for: those that were replayed, or that the engine has run (all but the last it drew)
    prompt_ids = chat.observe([chunks[-1].observation]) if chunks else chat.open(instruction)
    while True:
        context += prompt_ids
        room = limits.max_context - len(context)
        if room < 1:
            return (
                0.0,
                "truncated_tokens",
                f"no room left in a context of {limits.max_context} tokens",
            )
        sampling = Sampling(
            max_new_tokens=min(room, limits.max_new_tokens),
            temperature=temperature,
            stop_token_ids=(tokenizer.im_end,),
            seed=derive_seed(seed, len(chunks)),
            routes_from=ran if routes else None,
        )
        completion = await engine.generate(
            context, sampling, limits.episode_seconds, affinity=str(seed)
        )
        context += completion.output_ids
        ran = len(context) - 1
        spoken = (
            completion.output_ids[:-1]
            if completion.output_ids[-1:] == [tokenizer.im_end]
            else completion.output_ids
        )
        chunk = Chunk(
            prompt_ids=prompt_ids,
            action_ids=completion.output_ids,
            logprobs=completion.logprobs,
            versions=completion.versions,
            text=tokenizer.decode(spoken),
            cached_tokens=completion.cached_tokens,
        )
        if completion.routes is not None:
            chunk.routes = extend_routes(
                chunks[-1].routes if chunks else None,
                completion.routes,
                len(prompt_ids) + len(completion.output_ids),
            )
        chunks.append(chunk)
        if completion.finish_reason == "length":
            chunk.status = "malformed"
            return (
                0.0,
                "truncated_tokens",
                f"turn {len(chunks)} did not end within {sampling.max_new_tokens} tokens",
            )
        observation, reward, terminated, truncated, info = await env.astep(chunk.text)
        chunk.observation, chunk.status, chunk.network_denials = (
            observation,
            info["status"],
            info.get("network_denials", 0),
        )
        if info["use_tool"]:
            chunk.tool_call = {"name": info["tool_type"], "arguments": info["tool_arguments"]}
        if terminated or truncated:
            return float(reward), info["ending"], str(info.get("note", ""))
        prompt_ids = chat.observe([observation])
