"""Environments that begin at an anchor: a source is replayed once for a group, and its episodes go
on from copies of what that left.

A copy is a copy-on-write snapshot of the sandbox's files. Where an environment cannot be kept (no
snapshots, a process still running), each episode replays the actions itself (`rome.agent.loop`),
which takes as long as the source's commands do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from envs.gem.core import Env
from envs.rock import SandboxError
from rome.agent.loop import ReplayError, replay
from rome.data.trajectory import Chunk

SECONDS = 600.0  # for the one replay


class Forks:
    """The anchors of one source.

    `env_at(prefix)` is an environment whose first turns, those of `prefix`, are taken already.
    """

    def __init__(self, make_env: Callable[[], Env], prefixes: Sequence[Sequence[Chunk]]) -> None:
        self._make_env = make_env
        self._longest = max(prefixes, key=len)
        self._wanted = {len(prefix) for prefix in prefixes} - {0}
        self._kept: dict[int, Any] = {}
        self._replayed: asyncio.Task | None = None

    async def env_at(self, prefix: Sequence[Chunk]) -> Env:
        if not prefix:
            return self._make_env()
        self._replayed = self._replayed or asyncio.get_running_loop().create_task(self._replay())
        await asyncio.wait(
            [self._replayed]
        )  # an episode that is cancelled here leaves the replay to the others
        if (
            not self._replayed.cancelled()
        ):  # else these forks were closed meanwhile: who still comes replays for itself
            self._replayed.result()
        env = self._make_env()
        return Forked(env, self._kept[len(prefix)], prefix) if len(prefix) in self._kept else env

    async def aclose(self) -> None:
        if self._replayed is not None:
            self._replayed.cancel()
            await asyncio.gather(self._replayed, return_exceptions=True)
        kept, self._kept = list(self._kept.values()), {}
        for snapshot in kept:
            await snapshot.delete()

    async def _replay(self) -> None:
        env = self._make_env()
        if not hasattr(env, "asnapshot"):
            return
        try:
            async with asyncio.timeout(SECONDS):
                await env.areset()
                for place in range(1, len(self._longest) + 1):
                    await replay(env, self._longest[place - 1 : place], [])
                    if place in self._wanted:
                        self._kept[place] = await env.asnapshot()
        except (
            SandboxError,
            ReplayError,
            TimeoutError,
        ) as error:  # episodes beyond it replay for themselves, and say what they meet
            logging.info("no copy of %s after turn %d: %s", env.task.name, len(self._kept), error)
        finally:
            await env.aclose()


class Forked(Env):
    """An environment that goes on where a snapshot was taken.

    The turns before it are answered as they were then.
    """

    def __init__(self, env: Env, snapshot: Any, prefix: Sequence[Chunk]) -> None:
        self._env, self._snapshot, self._prefix, self._turn = env, snapshot, prefix, 0

    @property
    def task(self) -> Any:
        return self._env.task

    def reset(self, seed: int | None = None) -> Any:
        raise NotImplementedError("a forked environment is asynchronous")

    def step(self, action: str) -> Any:
        raise NotImplementedError("a forked environment is asynchronous")

    async def areset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return await self._env.arestore(self._snapshot)

    async def astep(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._turn < len(self._prefix):
            chunk = self._prefix[self._turn]
            self._turn += 1
            return (
                chunk.observation,
                0.0,
                False,
                False,
                {"status": chunk.status, "use_tool": chunk.tool_call is not None},
            )
        return await self._env.astep(action)

    async def aclose(self) -> None:
        await self._env.aclose()
