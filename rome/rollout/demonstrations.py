"""Expert trajectories: scripted experts play their tasks in real sandboxes, and what they said
becomes token ids.

For SFT the experts sometimes err and recover. Such turns keep their status (`tool_error`) and are
context only: the recovery is learnt, the mistake is not. For IPA they show the tasks that no
sampled episode of a step solved: the imitation term of Eq. 10.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
from collections.abc import Callable, Sequence

from envs.rock import SandboxError
from envs.tasks.terminal.demonstrator import play_demonstration
from envs.tasks.terminal.env import TerminalEnv
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.model.tokenizer import Chat
from rome.rollout.player import RolloutError

ATTEMPTS = 3  # at an expert episode that infrastructure spoils


class Spoiled(RolloutError):
    """The infrastructure lost an expert's episode, which says nothing about the task."""


async def collect_experts(
    tasks: Sequence[str],
    make_env: Callable[[str], TerminalEnv],
    chat: Chat,
    *,
    error_rate: float,
    concurrency: int,
    record: Callable[[int], pathlib.Path],
    first_group: int = 0,
) -> list[Trajectory]:
    """One solved trajectory for each task, in the order asked for.

    `record` says where the n-th is kept: one of its task that is there already is taken.

    Each is a group of its own, from `first_group` on, so that it stays out of the statistics of
    groups that were sampled.

    Raises: RolloutError where an expert fails its own task: then the task is wrong, or the sandbox
    is.
    """
    gate = asyncio.Semaphore(concurrency)

    async def play(number: int, task: str) -> Trajectory:
        path = record(number)
        if (
            path.exists() and (kept := load_trajectory(path)).task == task
        ):  # a step that a resumed run repeats may have to show other tasks
            return kept
        async with gate:
            for left in reversed(range(ATTEMPTS)):
                try:
                    trajectory = await expert_trajectory(
                        make_env(task), chat, random.Random(f"expert {task}"), error_rate
                    )
                    break
                except (Spoiled, SandboxError):
                    if not left:
                        raise
        trajectory.group = first_group + number
        save_trajectory(trajectory, path)
        return trajectory

    return await asyncio.gather(*(play(number, task) for number, task in enumerate(tasks)))


async def expert_trajectory(
    env: TerminalEnv, chat: Chat, rng: random.Random, error_rate: float
) -> Trajectory:
    """Plays one expert episode; its turns become tokens exactly as a policy's would stand in the
    context.
    """
    played = await play_demonstration(env, rng, error_rate)
    if played.ending != "success":
        raise (Spoiled if played.ending.startswith("infra_") else RolloutError)(
            f"the expert of {played.task} ended as {played.ending}, not as a success; its last"
            f" observation: {played.turns[-1].observation!r}"
        )
    chunks, prompt_ids = [], chat.open(played.instruction)
    for turn in played.turns:
        action_ids = chat.turn(turn.text)
        kind = "imitation" if turn.status == "ok" else "context"
        chunks.append(
            Chunk(
                prompt_ids,
                action_ids,
                [0.0] * len(action_ids),
                text=turn.text,
                observation=turn.observation,
                status=turn.status,
                kind=kind,
            )
        )
        prompt_ids = chat.observe([turn.observation])
    return Trajectory(
        task=played.task,
        family=played.family,
        chunks=chunks,
        reward=played.reward,
        ending=played.ending,
        instruction=played.instruction,
    )
