"""Environments that start at an anchor: copies of one replay of the source.

A source is replayed once for a group. Wherever an episode of the group starts, the environment is
copied: a copy-on-write snapshot of the sandbox's files, or a copy in memory
(`envs.gem.episode.snapshot_of`). If an environment cannot be copied (it has no copies, or a process
still runs), each episode replays the actions itself (`rome.agent.loop`), which takes as long as the
source's commands did.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from envs.gem.core import Env, StepResult, close_async, judge_async, step_async
from envs.gem.episode import (
    EnvironmentFault,
    PlayedEnv,
    Stored,
    Twin,
    snapshot_of,
    task_name,
)
from envs.rock import SandboxError
from rome.agent.loop import CLOSE_SECONDS, ReplayError, close_env, replay
from rome.data.trajectory import Chunk

REPLAY_SECONDS = 600.0  # of the one replay of a source


class Forks:
    """The copies of one source's environment, one for each anchor of a group.

    Args:
      make_env: makes a fresh environment of the task.
      prefixes: the first chunks of the source, once for each episode of the group.
    """

    def __init__(self, make_env: Callable[[], Env], prefixes: Sequence[Sequence[Chunk]]) -> None:
        self._make_env = make_env
        self._longest = max(prefixes, key=len)
        self._anchors = {len(prefix) for prefix in prefixes if prefix}
        # By anchor: a copy, and the reward that the turns before it have earned.
        self._snapshots: dict[int, tuple[Stored | Twin, float]] = {}
        self._replaying: asyncio.Task | None = None

    async def env_at(self, prefix: Sequence[Chunk]) -> Env:
        """Return an environment in which the turns of `prefix` were taken, where possible.

        Without a copy, a fresh environment is returned, in which the caller replays the prefix.
        """
        if not prefix:
            return self._make_env()
        if self._replaying is None:
            self._replaying = asyncio.get_running_loop().create_task(self._replay())
        # asyncio.wait, so that cancelling this episode does not cancel the replay of the others
        await asyncio.wait([self._replaying])
        was_closed_meanwhile = self._replaying.cancelled()
        if not was_closed_meanwhile:
            self._replaying.result()
        snapshot = self._snapshots.get(len(prefix))
        env = self._make_env()
        return env if snapshot is None else Forked(env, *snapshot, prefix)

    async def aclose(self) -> None:
        """Stop the replay and delete the copies."""
        if self._replaying is not None:
            self._replaying.cancel()
            await asyncio.gather(self._replaying, return_exceptions=True)
        snapshots = list(self._snapshots.values())
        self._snapshots = {}
        for snapshot, _ in snapshots:
            await _delete(snapshot)

    async def _replay(self) -> None:
        """Replay the source and copy the environment at each anchor."""
        env = self._make_env()
        played = PlayedEnv(env, REPLAY_SECONDS, REPLAY_SECONDS)
        try:
            async with asyncio.timeout(REPLAY_SECONDS):
                opening = await played.start()
                for anchor, chunk in enumerate(self._longest, start=1):
                    await replay(played, [chunk], [])
                    if anchor not in self._anchors:
                        continue
                    snapshot = await snapshot_of(env, opening)
                    if snapshot is None:
                        return
                    self._snapshots[anchor] = snapshot, played.reward
        except (EnvironmentFault, SandboxError, ReplayError, TimeoutError) as error:
            # Episodes at later anchors replay the actions themselves and report what they meet.
            copies = len(self._snapshots)
            reason = str(error) or f"the replay did not end within {REPLAY_SECONDS:g} s"
            logging.info("%s has %d copies and not all: %s", task_name(env), copies, reason)
        finally:
            await close_env(env)


async def _delete(snapshot: Stored | Twin) -> None:
    """Delete a copy within CLOSE_SECONDS; a fault is logged only, its manager removes the rest."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await snapshot.delete()
    except (SandboxError, OSError) as error:  # TimeoutError is an OSError
        reason = str(error) or f"it did not end within {CLOSE_SECONDS:g} s"
        logging.warning("a copy of a sandbox was not deleted: %s", reason)


class Forked(Env):
    """An environment that continues from a snapshot.

    The turns of the prefix are answered as they were in the source, without running them again.

    Args:
      env: a fresh environment of the task.
      snapshot: of the environment after the prefix.
      reward: that the turns of the prefix earned; the last of them brings it.
      prefix: the chunks that were replayed.
    """

    def __init__(
        self, env: Env, snapshot: Stored | Twin, reward: float, prefix: Sequence[Chunk]
    ) -> None:
        self._env = env
        self._snapshot = snapshot
        self._reward = reward
        self._prefix = prefix
        self._turn = 0

    @property
    def task(self) -> Any:
        """The task of the environment."""
        return getattr(self._env, "task", None)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools of the environment."""
        return getattr(self._env, "tools", [])

    @property
    def system(self) -> str | None:
        """The system text of the environment."""
        return getattr(self._env, "system", None)

    def reset(self, seed: int | None = None) -> Any:
        raise NotImplementedError("a forked environment is asynchronous; use areset")

    def step(self, action: str) -> Any:
        raise NotImplementedError("a forked environment is asynchronous; use astep")

    async def areset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self._env, opening = await self._snapshot.continue_in(self._env)
        return opening

    async def astep(self, action: str) -> StepResult:
        if self._turn == len(self._prefix):
            return await step_async(self._env, action)
        chunk = self._prefix[self._turn]
        self._turn += 1
        info = {"status": chunk.status, "use_tool": chunk.tool_call is not None}
        reward = self._reward if self._turn == len(self._prefix) else 0.0
        return chunk.observation, reward, False, False, info

    async def ajudge(self, ending: str) -> StepResult:
        return await judge_async(self._env, ending)

    @property
    def is_grading(self) -> bool:
        """Whether the environment's verifier runs."""
        return getattr(self._env, "is_grading", False)

    @property
    def grading_seconds(self) -> float:
        """Time limit of the environment's verifier."""
        return getattr(self._env, "grading_seconds", 0.0)

    async def aclose(self) -> None:
        await close_async(self._env)
