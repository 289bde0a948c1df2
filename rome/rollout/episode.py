"""What the scheduler hands to the player: one episode to play, and the error that ends its play."""

from __future__ import annotations

import dataclasses

from rome.data.trajectory import Chunk
from rome.rollout.forks import Forks


class RolloutError(RuntimeError):
    """An episode failed for a reason that playing it again does not cure."""


class SpoiledTaskError(RolloutError):
    """A task cannot be played: each attempt at it ended as infrastructure.

    Args:
      task: its name.
      ending: of the last attempt.
      note: why.
      attempts: how often it was tried.
    """

    def __init__(self, task: str, ending: str, note: str, attempts: int) -> None:
        times = "once" if attempts == 1 else f"{attempts} times in a row"
        super().__init__(
            f"{task} was spoiled {times}, last as {ending}: {note or 'no detail'}. Finished"
            " trajectories are kept; remove the cause and run the same command again."
        )
        self.task = task
        self.ending = ending
        self.note = note


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to play.

    Args:
      task: name of the task, from which its environment is made.
      group: number of the group that it is compared with.
      episode: its number within the group.
      seed: seed of everything that is sampled in it.
      name: stem of the file that keeps its trajectory.
      prefix: chunks of an earlier trajectory of the task. They are replayed in the environment
        before the policy takes over.
      forks: environments in which the prefix was replayed already.
    """

    task: str
    group: int
    episode: int
    seed: int
    name: str = ""
    prefix: tuple[Chunk, ...] = ()
    forks: Forks | None = dataclasses.field(default=None, compare=False)
