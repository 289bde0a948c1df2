"""Evaluations during training: held-out tasks that the policy plays, held-out text that it scores.

The tasks, their sampling seeds and the documents are the same at every evaluation of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES, eval_seed
from rome.data.packing import microbatches
from rome.data.seeds import derive_seed
from rome.data.text import text_rows
from rome.model.tokenizer import Tokenizer
from rome.rollout.player import Episode
from rome.stages.players import Players
from rome.train.state import TrainState
from rome.train.step import Learner

SEED_STRIDE = (
    10_000  # tasks of different run seeds differ, so results of several runs can be pooled
)


def play_held_out(players: Players, *, seed: int, tasks_of_family: int, temperature: float) -> dict:
    """Play held-out tasks of every family, and tasks of the families that training never sees.

    Args:
      players: play them, at the weights that were published last.
      seed: of the run.
      tasks_of_family: number of tasks of each family.
      temperature: of the sampling.

    Returns:
      {"tasks": one outcome a task}, as rome.train.report reads it.
    """
    episodes = [
        held_out_episode(family, index, seed)
        for family in (*FAMILIES, *HELD_OUT_FAMILIES)
        for index in range(tasks_of_family)
    ]
    tasks = [
        {
            "task": trajectory.task,
            "family": trajectory.family,
            "success": int(trajectory.succeeded),
            "unseen_family": trajectory.family in HELD_OUT_FAMILIES,
        }
        for trajectory in players.play_all(episodes, temperature)
    ]
    return {"tasks": tasks}


def held_out_episode(family: str, index: int, seed: int) -> Episode:
    """Return the episode of one held-out task in a run with this seed."""
    task_seed = eval_seed(index)
    task = f"{family}/{task_seed + SEED_STRIDE * seed}"
    return Episode(task, 0, 0, derive_seed(seed, "eval", f"{family}/{task_seed}"))


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
