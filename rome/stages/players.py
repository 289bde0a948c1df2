"""The episodes of one stage: of the policy, and of the scripted demonstrators."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Awaitable, Callable, Sequence

import ml_collections

from envs.tasks.terminal.env import BASH_TOOL, TerminalEnv
from rome.agent.environment import GRADING_MARGIN_SECONDS
from rome.agent.loop import Limits
from rome.data.trajectory import Trajectory
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.rollout.demonstrations import ATTEMPTS, collect_demonstrations
from rome.rollout.episode import RolloutError
from rome.rollout.player import ATTEMPTS as EPISODE_ATTEMPTS
from rome.rollout.player import Accounting, Episode, EpisodePlayer
from rome.rollout.spoiled import SpoiledTasks
from rome.stages.config import sandbox_config
from rome.stages.engines import PUBLISH_SECONDS, Engines
from rome.stages.waiting import wait_for_episodes
from rome.train.team import Team

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
            config.concurrency,
            self._team.wants_to_stop,
            model=config.model,
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

    @property
    def worst_seconds(self) -> float:
        """How long an episode may take at worst until it counts, its replacements included."""
        once = self.limits.worst_seconds(self.config.max_turns, TerminalEnv.grading_seconds)
        return EPISODE_ATTEMPTS * once + PUBLISH_SECONDS

    def make_env(self, task: str) -> TerminalEnv:
        """Return a new environment for one episode of a task."""
        return TerminalEnv(
            task,
            sandbox_config(self.config),
            max_turns=self.config.max_turns,
            command_timeout=self.config.sandbox.command_timeout,
        )

    def play_one(
        self,
        episode: Episode,
        *,
        temperature: float,
        accounting: Accounting,
        path: pathlib.Path,
        routes: bool,
    ) -> Awaitable[Trajectory]:
        """Play one episode of the policy; await the result on the background event loop."""
        return self.policy.play_one(
            episode,
            temperature=temperature,
            accounting=accounting,
            path=path,
            routes=routes,
        )

    def play_all(self, episodes: Sequence[Episode], temperature: float) -> list[Trajectory]:
        """Play episodes of the policy and wait for all of them.

        Tasks that cannot be played are set aside and left out, now and the next time.

        Raises:
          RolloutError: too many of them are, or they took longer than the episodes may at worst,
            one wave after the other.
        """
        playable = [episode for episode in episodes if episode.task not in self.spoiled]
        waves = count_waves(len(playable), self.config.concurrency)
        deadline = SLACK_SECONDS + waves * self.worst_seconds
        playing = self.policy.play(playable, temperature=temperature, on_spoiled=self.spoiled.add)
        what = f"the policy's play of {len(playable)} episodes"
        played = wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)
        self._require_most(len(episodes) - len(played), len(episodes))
        return played

    def _require_most(self, spoiled: int, of: int) -> None:
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

        A task whose demonstrator fails is set aside; its place in the result is None.

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
        playable = {number: task for number, task in enumerate(tasks) if task not in self.spoiled}
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
            on_spoiled=self.spoiled.add,
            seconds=once,
        )
        what = f"the demonstration of {len(playable)} tasks"
        played = wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)
        self._require_most(len(tasks) - len(played), of or len(tasks))
        return [played.get(number) for number in range(len(tasks))]


def make_chat(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Chat:
    """Return the chat template of a stage that plays episodes.

    A model with the tiny tokenizer learns the form of a tool call from the demonstrations. Any
    other is told the tools, as in its own chat template, and what an evaluation tells it of the
    environment.
    """
    if tokenizer.vocab_size == Tokenizer.load(TINY).vocab_size:
        return Chat(tokenizer)
    return Chat(tokenizer, [BASH_TOOL], TerminalEnv.system)


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
