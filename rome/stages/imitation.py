"""The imitation term of Eq. 10: what a step shows for the tasks that it did not solve.

An unsolved task is played by its scripted demonstrator; where it has none, an earlier success of
the policy at this task is shown. A group that was resampled from a source trajectory imitates what
the source did from there on, if none of its episodes succeeded.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections

from rome.data.advantages import chunk_returns, loss_reward
from rome.data.costs import chunk_costs, discounted_costs
from rome.data.trajectory import Trajectory, load_trajectory, save_trajectory
from rome.rollout.anchors import fork_imitation, imitated
from rome.stages.players import Players

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TaskGroup:
    """The episodes of one task that a step took.

    Attributes:
      number: of the group.
      source: file of the trajectory that the group was resampled from; "" for none.
      members: trajectories.
    """

    number: int
    source: str
    members: list[Trajectory]

    @property
    def is_solved(self) -> bool:
        """Whether an episode of the group succeeded."""
        return any(trajectory.succeeded for trajectory in self.members)


class Shown(NamedTuple):
    """A trajectory that is imitated, and the name of its file."""

    file: str
    trajectory: Trajectory


def show_solutions(
    step: int,
    groups: Sequence[TaskGroup],
    *,
    config: ml_collections.ConfigDict,
    players: Players,
    files: pathlib.Path,
    solutions: Mapping[str, str],
) -> dict[int, Shown]:
    """Return a trajectory to imitate for each unsolved group, by group number.

    A task whose demonstrator fails has none. `solutions` names the files of earlier successes.

    Each trajectory is a group of its own, with a number beyond those of all sampled groups, so that
    it stays out of their statistics. Its file is NAME_STEP_KIND_N.json, of the kind expert, earlier
    or fork.
    """
    first_group = config.steps * config.groups

    def path(kind: str, number: int) -> pathlib.Path:
        return files / f"{config.experiment}_{step:06d}_{kind}_{number:03d}.json"

    def demonstration_path(number: int) -> pathlib.Path:
        return path("expert", number)

    unsolved = [group for group in groups if not group.source and not group.is_solved]
    played = players.demonstrate(
        [group.members[0].task for group in unsolved],
        error_rate=0.0,
        record=demonstration_path,
        first_group=first_group,
        of=config.groups,
    )
    shown = {}
    for place, (group, trajectory) in enumerate(zip(unsolved, played, strict=True)):
        if trajectory is not None:
            shown[group.number] = Shown(demonstration_path(place).name, trajectory)
            continue
        earlier = _load_earlier(files, solutions.get(group.members[0].task))
        if earlier is not None:
            again = dataclasses.replace(imitated(earlier), group=first_group + place)
            save_trajectory(again, path("earlier", place))
            shown[group.number] = Shown(path("earlier", place).name, again)
    forks = 0
    for group in groups:
        if not group.source:
            continue
        source = load_trajectory(files / group.source, routes=False)
        lesson = fork_imitation(source, group.members)
        if lesson is None:
            continue
        number = len(unsolved) + forks
        forks += 1
        lesson = dataclasses.replace(lesson, group=first_group + number)
        save_trajectory(lesson, path("fork", number))
        shown[group.number] = Shown(path("fork", number).name, lesson)
    return shown


def worth_imitating(
    trajectory: Trajectory, *, gamma: float, failure_reward: float, safety_cost: Mapping[str, float]
) -> Trajectory | None:
    """Return a demonstration whose turns of a return of 0 or less are only read.

    The return is their weight: one below 0 would make a turn less likely without a bound, where a
    failure of the policy fades out by its ratio. A solution has such turns where it did harm that
    costs more than it earned, or where own code (config.reward) gave it less than 0.

    Args:
      trajectory: a demonstration, or an episode of the policy, which stays as it is.
      gamma: discount a turn.
      failure_reward: of what earned 0 or less.
      safety_cost: of each kind of event.

    Returns:
      None where none of the turns that it was to show is left.
    """
    if all(chunk.kind != "imitation" for chunk in trajectory.chunks):
        return trajectory
    cost_K = chunk_costs(trajectory, safety_cost)
    reward = loss_reward(trajectory, failure_reward)
    return_K = chunk_returns(reward, len(cost_K), gamma) - discounted_costs(cost_K, gamma)
    returns = iter(return_K)
    chunks = []
    for chunk in trajectory.chunks:
        is_loss = bool(chunk.action_ids) and next(returns) <= 0
        is_left_out = is_loss and chunk.kind == "imitation"
        chunks.append(dataclasses.replace(chunk, kind="context") if is_left_out else chunk)
    if all(chunk.kind != "imitation" for chunk in chunks):
        return None
    return dataclasses.replace(trajectory, chunks=chunks)


def _load_earlier(files: pathlib.Path, name: str | None) -> Trajectory | None:
    """Return an earlier success; None where there is none, or its file is gone."""
    if name is None:
        return None
    try:
        return load_trajectory(files / name, routes=False)
    except (OSError, ValueError) as error:
        log.warning("an earlier success cannot be shown: %s", error)
        return None
