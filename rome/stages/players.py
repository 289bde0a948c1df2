"""The episodes of one stage: of the policy, and of the scripted demonstrators."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Awaitable, Callable, Sequence

import ml_collections

from envs.tasks.terminal.env import BASH_TOOL, TerminalEnv
from rome.agent.loop import Limits
from rome.data.trajectory import Trajectory
from rome.model.tokenizer import Chat, Tokenizer
from rome.rollout.demonstrations import collect_demonstrations
from rome.rollout.player import Accounting, Episode, EpisodePlayer
from rome.stages.config import sandbox_config
from rome.stages.engines import Engines
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

    @functools.cached_property
    def policy(self) -> EpisodePlayer:
        """The player of the policy's episodes."""
        config = self.config
        limits = Limits(config.max_context, config.max_new_tokens, config.episode_seconds)
        return EpisodePlayer(
            self._engines.pool,
            self.make_env,
            self._chat,
            limits,
            config.concurrency,
            self._team.wants_to_stop,
        )

    @property
    def attempts(self) -> int:
        """How often an episode that the infrastructure spoils is played at most."""
        return self.policy.attempts

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

        Raises:
          RolloutError: after the time that they may take at worst, one wave after the other.
        """
        waves = count_waves(len(episodes), self.config.concurrency)
        deadline = SLACK_SECONDS + waves * self.attempts * self.config.episode_seconds
        playing = self.policy.play(episodes, temperature=temperature)
        what = f"the policy's play of {len(episodes)} episodes"
        return wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)

    def demonstrate(
        self,
        tasks: Sequence[str],
        *,
        error_rate: float,
        record: Callable[[int], pathlib.Path],
        first_group: int = 0,
    ) -> list[Trajectory]:
        """Let the scripted demonstrators play tasks and wait for all of them.

        Args:
          tasks: names, one for each trajectory.
          error_rate: share of turns that a typical mistake precedes.
          record: (number) -> the file of that trajectory; one that is there is not played again.
          first_group: group number of the first trajectory; each is a group of its own.

        Raises:
          RolloutError: after the time that they may take at worst, one wave after the other.
        """
        waves = count_waves(len(tasks), DEMONSTRATION_CONCURRENCY)
        deadline = SLACK_SECONDS + waves * self.config.episode_seconds
        playing = collect_demonstrations(
            tasks,
            self.make_env,
            self._chat,
            error_rate=error_rate,
            concurrency=DEMONSTRATION_CONCURRENCY,
            record=record,
            first_group=first_group,
        )
        what = f"the demonstration of {len(tasks)} tasks"
        return wait_for_episodes(playing, deadline, what, self._team.wants_to_stop)


def make_chat(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Chat:
    """Return the chat template of a stage that plays episodes.

    The tiny model learns the form of a tool call from the demonstrations. Any other model is told
    the tools, as in its own chat template.
    """
    return Chat(tokenizer, tools=None if config.model == "tiny" else [BASH_TOOL])


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
