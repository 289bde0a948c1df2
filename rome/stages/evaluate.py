"""Evaluations during training: held-out tasks that the policy plays, held-out text that it scores.

The tasks, their sampling seeds and the documents are the same at every evaluation of a run.
"""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.sources import Task
from envs.tasks.terminal import eval_seed
from rome.data.packing import microbatches
from rome.data.seeds import derive_seed
from rome.data.text import text_rows
from rome.evals.agents import Outcome
from rome.evals.runner import MAX_TRIES, Job, Record, open_results, run_jobs
from rome.evals.safety import summarise_safety
from rome.evals.statistics import is_counted
from rome.model.tokenizer import Tokenizer
from rome.rollout.episode import Episode, RolloutError, SpoiledTaskError
from rome.rollout.player import EpisodePlayer
from rome.stages.players import Players
from rome.train.state import TrainState
from rome.train.step import Learner


class HeldOut:
    """The policy that is trained, as an agent of `rome.evals`.

    Attributes:
      name: of the agent, in records.
    """

    name = "policy"

    def __init__(self, player: EpisodePlayer, temperature: float) -> None:
        self._player = player
        self._temperature = temperature
        self._engine_failures: collections.Counter[str] = collections.Counter()

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt.

        Raises:
          RolloutError: the engines failed for the same task MAX_TRIES times.
        """
        episode = Episode(task.name, 0, attempt, seed)
        trajectory = await self._player.play_attempt(episode, 0, self._temperature)
        if trajectory.ending == "infra_engine":
            self._engine_failures[task.name] += 1
            if self._engine_failures[task.name] == MAX_TRIES:
                raise RolloutError(
                    f"the engines failed {MAX_TRIES} times at {task.name}: {trajectory.note}."
                    " Finished evaluations are kept; run the same command again."
                )
        reward = trajectory.reward if trajectory.trainable else None
        return Outcome(
            reward,
            trajectory.ending,
            trajectory.note,
            len(trajectory.chunks),
            safety=trajectory.safety,
        )

    async def close(self) -> None:
        """Do nothing: the engines are the stage's."""


def play_held_out(
    players: Players, out: pathlib.Path, *, seed: int, tasks_of_family: int, temperature: float
) -> dict[str, Any]:
    """Play the tasks that are kept for evaluations, at the weights that were published last.

    Attempts that `out` records already are not played again.

    Args:
      players: play them.
      out: folder of the records of this evaluation.
      seed: of the run.
      tasks_of_family: number of tasks of each family.
      temperature: of the sampling.

    Returns:
      {"tasks": one outcome a task}, as rome.train.report reads it, and the measures of the safety
      suite ("safety") where tasks of it are among them.
    """
    source = players.tasks.evaluation
    # Seeds of all tasks come first: a task that is set aside during a run changes no other's.
    playable = [
        (task, key)
        for task, key in keyed(source.evaluation(tasks_of_family))
        if task.name not in players.spoiled
    ]
    tasks = [task for task, _ in playable]
    agent = HeldOut(players.policy, temperature)
    jobs = [Job(agent, task, 0, derive_seed(seed, "eval", key)) for task, key in playable]
    with open_results(out, {"evaluation": out.name}) as results:
        playing = run_jobs(jobs, results, concurrency=players.config.concurrency, seed=seed)
        players.wait_for_play(_alone(playing), len(jobs))
        records = {record["task"]: record for record in results.find(jobs)}
    _set_aside(players, [records[task.name] for task in tasks], len(tasks))
    unseen = players.tasks.unseen_families()
    outcomes = [
        {
            "task": task.name,
            "family": task.family,
            "difficulty": task.difficulty,
            "source": task.source or source.spec,
            "success": int(records[task.name]["success"]),
            "unseen_family": task.family in unseen,
        }
        for task in tasks
        if is_counted(records[task.name])
    ]
    found: dict[str, Any] = {"tasks": outcomes}
    if (summary := summarise_safety([records[task.name] for task in tasks])) is not None:
        found["safety"] = summary["measures"]
    return found


def keyed(tasks: Sequence[Task]) -> list[tuple[Task, str]]:
    """Return each task with what its sampling seed derives from: its place within its family."""
    counts: collections.Counter[str] = collections.Counter()
    found = []
    for task in tasks:
        found.append((task, f"{task.family}/{eval_seed(counts[task.family])}"))
        counts[task.family] += 1
    return found


async def _alone(playing: Any) -> Any:
    """Wait, and raise the first error of a group of tasks by itself."""
    try:
        return await playing
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _set_aside(players: Players, records: Sequence[Record], of: int) -> None:
    """Set tasks aside that could not be played; raise RolloutError where these are too many."""
    spoiled = [record for record in records if not is_counted(record)]
    for record in spoiled:
        fault = SpoiledTaskError(record["task"], record["ending"], record["note"], record["tries"])
        players.spoiled.add(fault)
    players.require_most(len(spoiled), of)


def score_held_out_text(
    learner: Learner,
    state: TrainState,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    row_length: int,
    chunks_per_row: int,
    rows_per_microbatch: int,
) -> dict[str, Any]:
    """Measure how many bits the model needs for a byte of held-out documents.

    Returns:
      {"bits_per_byte": float, "bytes": size of the documents in UTF-8}.
    """
    rows = text_rows(texts, tokenizer, row_length=row_length, chunks_per_row=chunks_per_row)
    batches = microbatches(rows, rows_per_microbatch)
    logprobs = learner.score(state.params, batches)
    nats = -sum(
        float(np.sum(logp_BT, where=batch.action_mask_BT, dtype=np.float64))
        for batch, logp_BT in zip(batches, logprobs, strict=True)
    )
    size = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": nats / math.log(2) / size, "bytes": size}
