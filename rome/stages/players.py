"""The episodes of one stage: of the policy, and of the scripted demonstrators."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from envs.gem.core import Env
from envs.gem.episode import GRADING_MARGIN_SECONDS
from envs.rock.doors import Door
from rome.agent.loop import Limits
from rome.data.trajectory import Trajectory
from rome.model.tokenizer import Chat
from rome.rollout.demonstrations import ATTEMPTS, collect_demonstrations
from rome.rollout.episode import RolloutError, SpoiledTaskError
from rome.rollout.player import ATTEMPTS as EPISODE_ATTEMPTS
from rome.rollout.player import Accounting, Episode, EpisodePlayer
from rome.rollout.reward import REWARD_SECONDS, Reward
from rome.rollout.spoiled import SpoiledTasks
from rome.stages.engines import PUBLISH_SECONDS, Engines
from rome.stages.settings import command_agent, iflow_agent, sandbox_config
from rome.stages.tasks import tasks_of
from rome.stages.waiting import wait_for_episodes
from rome.train.team import Team

T = TypeVar("T")
log = logging.getLogger(__name__)
DEMONSTRATION_CONCURRENCY = 16
SLACK_SECONDS = 60.0  # beyond what the episodes themselves may take
# Within this time a file that one host wrote is seen by the others: NFS and buckets keep old
# listings for a while.
VISIBLE_SECONDS = 120.0


class Players:
    """Plays episodes in sandboxes of this config, on the background event loop.

    Args:
      config: of the experiment.
      chat: renders messages to token ids.
      engines: sample the policy's turns; they must be started before the first episode.
      team: says when the user asked to stop.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, chat: Chat, engines: Engines, team: Team
    ) -> None:
        self.config = config
        self._chat = chat
        self._engines = engines
        self._team = team
        self.tasks = tasks_of(config)
        self._unshown: set[str] = set()  # tasks whose solution an agent cannot repeat
        self.spoiled = SpoiledTasks(engines.workdir / "spoiled.jsonl")

    @functools.cached_property
    def policy(self) -> EpisodePlayer:
        """The player of the policy's episodes."""
        config = self.config
        return EpisodePlayer(
            self._engines.pool,
            self.make_env,
            self._chat,
            self.limits,
            model=config.model,
            family_of=self.family_of,
            tell_tools=config.tell_tools,
            command=command_agent(config),
            iflow=iflow_agent(config),
        )

    @property
    def limits(self) -> Limits:
        """The bounds of the policy's episodes."""
        config = self.config
        return Limits(
            config.max_context,
            config.max_new_tokens,
            config.episode_seconds,
            config.start_seconds,
            config.engine.completion_seconds,
        )

    @functools.cached_property
    def worst_seconds(self) -> float:
        """How long an episode may take at worst until it counts, its replacements included."""
        tasks = list(self.tasks.examples())
        turns = max(task.max_turns for task in tasks)
        command = command_agent(self.config)
        if command is not None:
            turns = command.budget.calls
        elif iflow_agent(self.config) is not None:
            turns = self.config.chunks_per_row  # its answers, sub-agents and summaries included
        grading = max(task.grading_seconds for task in tasks)
        once = self.limits.worst_seconds(turns, grading)
        return EPISODE_ATTEMPTS * once + PUBLISH_SECONDS + REWARD_SECONDS

    def make_env(self, task: str, doors: Mapping[str, Door] | None = None) -> Env:
        """Return a new environment for one episode of a task, with these doors in its sandbox."""
        config = dataclasses.replace(sandbox_config(self.config), doors=doors or {})
        return self.tasks.find(task).make_env(config)

    def family_of(self, task: str) -> str:
        """Return the family of a task."""
        return self.tasks.find(task).family

    def can_show(self, task: str) -> bool:
        """Return whether a demonstrator solves the task."""
        is_out = task in self.spoiled or task in self._unshown
        return not is_out and self.tasks.find(task).has_demonstrator

    def _note_unshown(self, fault: SpoiledTaskError) -> None:
        """Set a task aside whose demonstrator failed.

        The solution of a task folder may need more than an agent has: such a task is not shown, and
        played all the same.
        """
        is_folder = self.tasks.find(fault.task).path is not None
        if is_folder and not fault.ending.startswith("infra_"):
            self._unshown.add(fault.task)
            log.info("the solution of %s cannot be shown: %s", fault.task, fault.note)
        else:
            self.spoiled.add(fault)

    def play_one(
        self,
        episode: Episode,
        *,
        temperature: float,
        accounting: Accounting,
        path: pathlib.Path,
        routes: bool,
        reward: Reward | None,
    ) -> Awaitable[Trajectory]:
        """Play one episode of the policy; await the result on the background event loop."""
        return self.policy.play_one(
            episode,
            temperature=temperature,
            accounting=accounting,
            path=path,
            routes=routes,
            reward=reward,
        )

    def wait_for_play(self, playing: Coroutine[Any, Any, T], episodes: int) -> T:
        """Wait for the policy's play of so many episodes, and return what it returns.

        Raises:
          RolloutError: it took longer than the episodes may at worst, one wave after the other.
        """
        waves = count_waves(episodes, self.config.concurrency)
        deadline = SLACK_SECONDS + waves * self.worst_seconds
        what = f"the policy's play of {episodes} episodes"
        return wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)

    def require_most(self, spoiled: int, of: int) -> None:
        """Raise RolloutError where more tasks are spoiled than single ones may be."""
        if self.spoiled.too_many(spoiled, of):
            raise RolloutError(self.spoiled.failure(spoiled, of))

    def demonstrate(
        self,
        tasks: Sequence[str],
        *,
        error_rate: float,
        record: Callable[[int], pathlib.Path],
        first_group: int = 0,
        of: int = 0,
    ) -> list[Trajectory | None]:
        """Let the scripted demonstrators play tasks and wait for all of them.

        A task whose demonstrator fails is set aside. Its place in the result is None, and so is
        that of a task without one.

        Args:
          tasks: names, one for each trajectory.
          error_rate: share of turns that a typical mistake precedes.
          record: (number) -> the file of that trajectory; one that is there is not played again.
          first_group: group number of the first trajectory; each is a group of its own.
          of: number of tasks that failing ones are a share of; by default those that are played.

        Raises:
          RolloutError: too many demonstrators fail, or they took longer than they may at worst, one
            wave after the other.
        """
        playable = {number: task for number, task in enumerate(tasks) if self.can_show(task)}
        waves = count_waves(len(playable), DEMONSTRATION_CONCURRENCY)
        once = self.config.start_seconds + self.config.episode_seconds + GRADING_MARGIN_SECONDS
        deadline = SLACK_SECONDS + waves * ATTEMPTS * once
        playing = collect_demonstrations(
            playable,
            self.make_env,
            self._chat,
            error_rate=error_rate,
            concurrency=DEMONSTRATION_CONCURRENCY,
            record=record,
            first_group=first_group,
            family_of=self.family_of,
            tell_tools=self.config.tell_tools,
            on_spoiled=self._note_unshown,
            seconds=once,
        )
        what = f"the demonstration of {len(playable)} tasks"
        played = wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)
        self.require_most(sum(task in self.spoiled for task in tasks), of or len(tasks))
        return [played.get(number) for number in range(len(tasks))]


def count_waves(episodes: int, concurrency: int) -> int:
    """Return how many waves it takes to play episodes with so many at once."""
    return -(-episodes // concurrency)


def wait_until_visible(team: Team, what: str, paths: Sequence[pathlib.Path]) -> None:
    """Wait until all hosts see files that the leader has written.

    Raises:
      Stopped: the user asked to stop.
      LeaderError: a host does not see them within VISIBLE_SECONDS.
    """
    unseen = list(paths)

    def are_visible() -> bool:
        while unseen and unseen[-1].exists():
            unseen.pop()
        return not unseen

    remedy = "is --workdir on a file system that all hosts share?"
    team.meet(what, are_visible, VISIBLE_SECONDS, remedy)
