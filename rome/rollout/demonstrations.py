"""Demonstrations: scripted players solve their tasks in real sandboxes, as token trajectories.

For SFT the demonstrators sometimes make a mistake and recover. Such turns keep their status
(`tool_error`) and are context only: the recovery is learnt, the mistake is not. For IPA they show
how to solve the tasks that no sampled episode of a step solved: the imitation term of Eq. 10.
"""

from __future__ import annotations

import asyncio
import logging
import pathlib
import random
from collections.abc import Callable, Sequence

from envs.rock import SandboxError
from envs.tasks.terminal.demonstrator import play_demonstration
from envs.tasks.terminal.env import TerminalEnv
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.model.tokenizer import Chat
from rome.rollout.episode import RolloutError

log = logging.getLogger(__name__)
ATTEMPTS = 3  # at a demonstration that the infrastructure spoils


class SpoiledDemonstration(RolloutError):
    """The infrastructure lost a demonstration, which says nothing about the task."""


async def collect_demonstrations(
    tasks: Sequence[str],
    make_env: Callable[[str], TerminalEnv],
    chat: Chat,
    *,
    error_rate: float,
    concurrency: int,
    record: Callable[[int], pathlib.Path],
    first_group: int = 0,
) -> list[Trajectory]:
    """Play one demonstration of each task and return them in the same order.

    Args:
      tasks: names of the tasks.
      make_env: makes a fresh environment of a task.
      chat: the chat template.
      error_rate: probability that a demonstrator makes a mistake, and recovers.
      concurrency: demonstrations at once.
      record: returns the file of the n-th trajectory. If it exists already and is of the same
        task, it is returned instead of playing.
      first_group: group number of the first trajectory. Each is a group of its own, which keeps it
        out of the statistics of groups that were sampled.

    Raises:
      RolloutError: a demonstrator failed its own task, so the task or the sandbox is broken.
      SandboxError: no sandbox could be started, ATTEMPTS times.
    """
    places = asyncio.Semaphore(concurrency)

    async def collect_one(number: int, task: str) -> Trajectory:
        path = record(number)
        if path.exists():
            kept = _load_kept(path)
            # A resumed run may show other tasks when it repeats a step.
            if kept is not None and kept.task == task:
                return kept
        async with places:
            trajectory = await _demonstrate_until_played(make_env, task, chat, error_rate)
        trajectory.group = first_group + number
        save_trajectory(trajectory, path)
        return trajectory

    return await asyncio.gather(*(collect_one(number, task) for number, task in enumerate(tasks)))


def _load_kept(path: pathlib.Path) -> Trajectory | None:
    """Load a demonstration; None where a power failure cut the file off: it is played again."""
    try:
        return load_trajectory(path)
    except ValueError as error:
        log.warning("%s", error)
        return None


async def _demonstrate_until_played(
    make_env: Callable[[str], TerminalEnv], task: str, chat: Chat, error_rate: float
) -> Trajectory:
    """Play a demonstration, again if the infrastructure spoils it."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await demonstrate(make_env(task), chat, _rng_of(task), error_rate)
        except (SpoiledDemonstration, SandboxError):
            continue
    return await demonstrate(make_env(task), chat, _rng_of(task), error_rate)


def _rng_of(task: str) -> random.Random:
    return random.Random(f"expert {task}")


async def demonstrate(
    env: TerminalEnv, chat: Chat, rng: random.Random, error_rate: float
) -> Trajectory:
    """Play one demonstration. Its turns become the tokens that a policy would have sampled.

    Args:
      env: an environment of the task; it is closed.
      chat: the chat template.
      rng: decides where the demonstrator makes a mistake.
      error_rate: probability of a mistake.

    Raises:
      SpoiledDemonstration: the infrastructure failed.
      RolloutError: the demonstrator did not solve its task.
    """
    played = await play_demonstration(env, rng, error_rate)
    if played.ending != "success":
        is_spoiled = played.ending.startswith("infra_")
        error_type = SpoiledDemonstration if is_spoiled else RolloutError
        raise error_type(
            f"the demonstration of {played.task} ended as {played.ending}, not as a success; its"
            f" last observation: {played.turns[-1].observation!r}"
        )
    chunks = []
    prompt_ids = chat.open(played.instruction)
    for turn in played.turns:
        action_ids = chat.turn(turn.text)
        chunks.append(
            Chunk(
                prompt_ids,
                action_ids,
                logprobs=[0.0] * len(action_ids),
                text=turn.text,
                observation=turn.observation,
                status=turn.status,
                kind="imitation" if turn.status == "ok" else "context",
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
