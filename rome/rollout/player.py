"""The player of episodes: plays one until it counts.

The scheduler (`scheduler.py`) decides which episodes training plays and when. Episodes move
independently: generation, commands and grading of different episodes overlap. A finished
trajectory is on disk before it is counted, so a run that was killed does not play it again. An
episode that the infrastructure spoiled is played again from the same initial state with another
seed; it never becomes a reward of 0. A task that is spoiled each time is set aside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable

from envs.gem.core import Env
from rome.agent.command import CommandAgent, run_command_episode
from rome.agent.iflow.episode import IFlowAgent, run_iflow_episode
from rome.agent.loop import Limits, run_episode
from rome.agent.session import Generator
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.files import to_thread_until_done
from rome.model.tokenizer import Chat
from rome.rollout.accounting import Accounting
from rome.rollout.anchors import anchor_of
from rome.rollout.episode import Episode, RolloutError, SpoiledTaskError
from rome.rollout.reward import Reward, ask

ATTEMPTS = 3  # at an episode that the infrastructure spoils
# Before an episode is played again; doubled each time, so that a fault of a moment may pass.
RETRY_SECONDS = 0.5


@dataclasses.dataclass
class EpisodePlayer:
    """Plays episodes with one engine (or pool of engines).

    Args:
      engine: samples the turns.
      make_env: makes a fresh environment for one episode of the named task; the doors of its
        sandbox are a second argument, given where a command plays.
      chat: the chat template.
      limits: tokens and seconds of an episode.
      attempts: how often an episode is played in all if infrastructure keeps spoiling it.
      model: name of the model that the engine serves, for the files of trajectories.
      family_of: returns the family of a task; None leaves it to the environment.
      tell_tools: whether the first prompt has each environment's own tools and system text.
      command: plays in the place of the loop.
      iflow: the iFlow agent, which plays in the place of the loop.
    """

    engine: Generator
    make_env: Callable[..., Env]
    chat: Chat
    limits: Limits
    attempts: int = ATTEMPTS
    model: str = ""
    family_of: Callable[[str], str] | None = None
    tell_tools: bool = False
    command: CommandAgent | None = None
    iflow: IFlowAgent | None = None

    async def play_one(
        self,
        episode: Episode,
        *,
        temperature: float,
        accounting: Accounting,
        path: pathlib.Path | None = None,
        routes: bool = False,
        reward: Reward | None = None,
    ) -> Trajectory:
        """Play one episode until its trajectory is trainable.

        Args:
          episode: what to play.
          temperature: of sampling.
          accounting: counts replacements. The caller has counted the start of the episode.
          path: file of the trajectory. If it exists already, it is returned instead of playing the
            episode.
          routes: ask the engine for the experts of each token and keep them in the chunks.
          reward: what training learns from, instead of the environment's reward; it is asked once,
            before the file is written.

        Raises:
          SpoiledTaskError: the episode was spoiled `attempts` times. Its last attempt counts as
            dropped for "spoiled_task".
          RolloutError: it was, and its last attempt by the engines, which says nothing about the
            task.
        """
        # Files are read and written in threads: the loop times the commands of all episodes.
        if path is not None:
            kept = await asyncio.to_thread(_load_finished, path, episode, routes)
            if kept is not None:
                return kept
        for attempt in range(self.attempts):
            if attempt:
                accounting.begin()
                await asyncio.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
            trajectory = await self.play_attempt(episode, attempt, temperature, routes)
            if trajectory.trainable:
                if reward is not None:
                    trajectory.training_reward = await ask(reward, trajectory)
                if path is not None:
                    await to_thread_until_done(save_trajectory, trajectory, path)
                return trajectory
            if attempt + 1 < self.attempts:
                accounting.drop(trajectory.ending)
        fault = SpoiledTaskError(
            episode.task, trajectory.ending, trajectory.note, attempts=self.attempts
        )
        if trajectory.ending == "infra_engine":
            accounting.drop(trajectory.ending)
            raise RolloutError(str(fault))
        accounting.drop("spoiled_task")
        raise fault

    async def play_attempt(
        self, episode: Episode, attempt: int, temperature: float, routes: bool = False
    ) -> Trajectory:
        """Play one episode once, whatever its ending; see `play_one`."""
        # A command may answer differently each time (the date, a process id), and then its turns
        # cannot be replayed. The last attempt therefore starts at the beginning of the task.
        is_last_resort = attempt > 0 and attempt + 1 == self.attempts
        prefix = () if is_last_resort else episode.prefix
        seed = derive_seed(episode.seed, "attempt", attempt) if attempt else episode.seed
        if self.command is not None:
            trajectory = await self._play_command(self.command, episode, seed, temperature, routes)
            return self._labelled(trajectory, episode)
        try:
            env = await self._make_env(episode, attempt, prefix)
        except Exception as error:  # nobody has acted yet: whatever it is, it is the task's
            return Trajectory(
                episode.task,
                family="",
                chunks=[],
                reward=0.0,
                ending="infra_sandbox",
                group=episode.group,
                episode=episode.episode,
                seed=seed,
                note=f"{type(error).__name__}: {error}",
            )
        if self.iflow is not None:
            play = functools.partial(run_iflow_episode, agent=self.iflow)
        else:
            play = functools.partial(run_episode, prefix=prefix)
        trajectory = await play(
            self.engine,
            env,
            self.chat,
            self.limits,
            temperature=temperature,
            seed=seed,
            group=episode.group,
            episode=episode.episode,
            routes=routes,
            tell_tools=self.tell_tools,
        )
        return self._labelled(trajectory, episode)

    async def _play_command(
        self,
        command: CommandAgent,
        episode: Episode,
        seed: int,
        temperature: float,
        routes: bool,
    ) -> Trajectory:
        return await run_command_episode(
            self.engine,
            functools.partial(self.make_env, episode.task),
            self.chat,
            self.limits,
            command,
            temperature=temperature,
            seed=seed,
            group=episode.group,
            episode=episode.episode,
            routes=routes,
        )

    def _labelled(self, trajectory: Trajectory, episode: Episode) -> Trajectory:
        trajectory.task = episode.task  # an environment may name it otherwise
        trajectory.model = self.model
        if self.family_of is not None:
            trajectory.family = self.family_of(episode.task)
        return trajectory

    async def _make_env(self, episode: Episode, attempt: int, prefix: tuple[Chunk, ...]) -> Env:
        if episode.forks is not None and attempt == 0:
            return await episode.forks.env_at(prefix)
        return self.make_env(episode.task)


def _load_finished(path: pathlib.Path, episode: Episode, routes: bool) -> Trajectory | None:
    """Load the episode's trajectory; None if it must be played.

    Which task comes next depends on what finished when. A resumed run may therefore give the file
    name to another task, or to another anchor of it, than the run before it did.
    """
    if not path.exists():
        return None
    try:
        trajectory = load_trajectory(path, routes=routes)
    except ValueError as error:  # a power failure cut the file off
        logging.warning("%s cannot be read, so its episode is played again: %s", path, error)
        return None
    if trajectory.task != episode.task or not _follows(trajectory, episode.prefix):
        return None
    return trajectory


def _follows(trajectory: Trajectory, prefix: tuple[Chunk, ...]) -> bool:
    """Whether the trajectory starts with the prefix, or from the beginning.

    An episode starts from the beginning, too, if its prefix could not be replayed.
    """
    anchor = anchor_of(trajectory)
    if anchor not in (0, len(prefix)):
        return False
    replayed = zip(trajectory.chunks[:anchor], prefix, strict=False)
    return all(chunk.action_ids == original.action_ids for chunk, original in replayed)
