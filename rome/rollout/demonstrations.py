"""Demonstrations: scripted players solve their tasks in real sandboxes, as token trajectories.

For SFT the demonstrators sometimes make a mistake and recover. Such turns are context only: the
recovery is learnt, the mistake is not. So are turns whose call failed (Err(k) of Eq. 1-2); a
command that ended with another exit status than 0 did not fail as a call. For IPA they show
how to solve the tasks that no sampled episode of a step solved: the imitation term of Eq. 10.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import pathlib
import random
from collections.abc import Callable, Mapping

from envs.gem import UnplayableTaskError
from envs.gem.core import Env
from envs.gem.episode import DemonstrationEpisode, EnvironmentFault, play_demonstration
from envs.rock import SandboxError
from rome.agent.loop import told_tools
from rome.agent.messages import read_answer
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.files import to_thread_until_done
from rome.model.tokenizer import Chat
from rome.rollout.episode import RolloutError, SpoiledTaskError

log = logging.getLogger(__name__)
ATTEMPTS = 3  # at a demonstration that the infrastructure spoils


class SpoiledDemonstration(RolloutError):
    """The infrastructure lost a demonstration, which says nothing about the task."""


class FailedDemonstration(RolloutError):
    """A demonstrator failed its own task, so the task or its demonstrator is broken.

    Attributes:
      ending: of its episode.
    """

    def __init__(self, ending: str, message: str) -> None:
        super().__init__(message)
        self.ending = ending


async def collect_demonstrations(
    tasks: Mapping[int, str],
    make_env: Callable[[str], Env],
    chat: Chat,
    *,
    error_rate: float,
    concurrency: int,
    record: Callable[[int], pathlib.Path],
    first_group: int = 0,
    family_of: Callable[[str], str] | None = None,
    tell_tools: bool = False,
    on_spoiled: Callable[[SpoiledTaskError], None] | None = None,
    seconds: float | None = None,
) -> dict[int, Trajectory]:
    """Play one demonstration of each task and return them by number.

    Args:
      tasks: names of the tasks by number.
      make_env: makes a fresh environment of a task.
      chat: the chat template.
      error_rate: probability that a demonstrator makes a mistake, and recovers.
      concurrency: demonstrations at once.
      record: returns the file of the n-th trajectory. If it exists already and is of the same
        task, it is returned instead of playing.
      first_group: group number of trajectory 0. Each is a group of its own, which keeps it out of
        the statistics of groups that were sampled.
      family_of: returns the family of a task; None leaves it to the environment.
      tell_tools: whether the first prompt has each environment's tools and system text.
      on_spoiled: called for each task that cannot be shown; it is left out of the result. None: it
        is an error.
      seconds: for one attempt at a demonstration; None for no limit.

    Raises:
      SpoiledTaskError: without `on_spoiled`: a demonstrator failed its own task, so the task or its
        demonstrator is broken, or the infrastructure failed ATTEMPTS times.
    """
    places = asyncio.Semaphore(concurrency)
    rngs = _rngs_of(tasks)

    async def collect_one(number: int, task: str) -> Trajectory | None:
        path = record(number)
        if path.exists():
            kept = await asyncio.to_thread(_load_kept, path)
            # A resumed run may show other tasks when it repeats a step.
            if kept is not None and kept.task == task:
                return kept
        async with places:
            try:
                trajectory = await _demonstrate_until_played(
                    make_env, task, rngs[number], chat, error_rate, seconds, tell_tools
                )
            except SpoiledTaskError as fault:
                if on_spoiled is None:
                    raise
                on_spoiled(fault)
                return None
        trajectory.group = first_group + number
        trajectory.task = task
        if family_of is not None:
            trajectory.family = family_of(task)
        await to_thread_until_done(save_trajectory, trajectory, path)
        return trajectory

    try:
        # Not gather: the others would go on behind an error, and fail as the program ends.
        async with asyncio.TaskGroup() as group:
            playing = {
                number: group.create_task(collect_one(number, task))
                for number, task in tasks.items()
            }
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    played = {number: task.result() for number, task in playing.items()}
    return {number: one for number, one in played.items() if one is not None}


def _load_kept(path: pathlib.Path) -> Trajectory | None:
    """Load a demonstration; None where a power failure cut the file off: it is played again."""
    try:
        return load_trajectory(path)
    except ValueError as error:
        log.warning("%s", error)
        return None


async def _demonstrate_until_played(
    make_env: Callable[[str], Env],
    task: str,
    rng_key: str,
    chat: Chat,
    error_rate: float,
    seconds: float | None,
    tell_tools: bool,
) -> Trajectory:
    """Play a demonstration, again if the infrastructure spoils it.

    Raises:
      SpoiledTaskError: the demonstrator failed its task, or each attempt was spoiled.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with asyncio.timeout(seconds):
                return await demonstrate(
                    make_env(task),
                    chat,
                    random.Random(rng_key),
                    error_rate,
                    tell_tools=tell_tools,
                )
        except FailedDemonstration as failure:
            raise SpoiledTaskError(task, failure.ending, str(failure), attempt) from failure
        except (SpoiledDemonstration, EnvironmentFault) as error:
            note = str(error)
            last = SpoiledTaskError(task, "infra_sandbox", note, attempt)
        except (SandboxError, UnplayableTaskError, TimeoutError) as error:
            reason = str(error) or f"it did not end within {seconds} s"
            note = f"{type(error).__name__}: {reason}"
            last = SpoiledTaskError(task, "infra_sandbox", note, attempt)
    raise last


def _rngs_of(tasks: Mapping[int, str]) -> dict[int, str]:
    """Return the seed of each demonstration; a task that is shown again is shown otherwise."""
    keys = {}
    counts: collections.Counter[str] = collections.Counter()
    for number in sorted(tasks):
        task = tasks[number]
        keys[number] = f"expert {task} {counts[task]}" if counts[task] else f"expert {task}"
        counts[task] += 1
    return keys


async def demonstrate(
    env: Env, chat: Chat, rng: random.Random, error_rate: float, *, tell_tools: bool = False
) -> Trajectory:
    """Play one demonstration. Its turns become the tokens that a policy would have sampled.

    Args:
      env: an environment of the task, not started yet; it is closed.
      chat: the chat template.
      rng: decides where the demonstrator makes a mistake.
      error_rate: probability of a mistake.
      tell_tools: whether the first prompt has the environment's tools and system text.

    Raises:
      SpoiledDemonstration: the infrastructure failed.
      FailedDemonstration: the demonstrator did not solve its task.
    """
    played = await play_demonstration(env, rng, error_rate)
    if played.ending != "success":
        _raise_failed(played)
    if tell_tools:
        chat = told_tools(chat, env)
    chunks = []
    prompt_ids = chat.open(played.instruction)
    for turn in played.turns:
        text = in_own_form(turn.text, chat)
        action_ids = chat.turn(text)
        chunks.append(
            Chunk(
                prompt_ids,
                action_ids,
                logprobs=[0.0] * len(action_ids),
                text=text,
                observation=turn.observation,
                status=turn.status,
                exit_code=turn.exit_code,
                tool_call=turn.tool_call,
                kind="context" if turn.is_mistake or turn.status != "ok" else "imitation",
                events=list(turn.events),
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


def in_own_form(text: str, chat: Chat) -> str:
    """Return a demonstrator's turn with its calls in the form that the model was trained on.

    Demonstrators write Qwen3's JSON form. A turn whose call is malformed, on purpose, stays as it
    is.
    """
    answer, is_malformed = read_answer(text, 0)
    calls = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    if is_malformed or not calls or chat.say("", calls) in text:
        return text
    return chat.say(answer.content, calls)


def _raise_failed(played: DemonstrationEpisode) -> None:
    """Raise for a demonstration that did not end as a success.

    A demonstrator does not read what it sees, so a command that a busy machine cut off leaves its
    task unsolved: that is the infrastructure's failure, and is played again.
    """
    slow = [turn.text for turn in played.turns if turn.status == "timeout"]
    last = played.turns[-1].observation if played.turns else ""
    message = (
        f"the demonstration of {played.task} ended as {played.ending}, not as a success"
        f" ({played.note or 'no note'}); its last observation: {last!r}"
    )
    if slow:
        message += f"; a command ran into its time limit: {slow[0]!r}"
    if slow or played.ending.startswith("infra_"):
        raise SpoiledDemonstration(message)
    raise FailedDemonstration(played.ending, message)
