"""A cache of built environments: later episodes of a task start from a snapshot of the first one.

A build leaves only files (no process outlives its command), so a copy-on-write snapshot is
equivalent to a new build. Episodes of one task that begin together wait for the first of them to
build. The newest MAX_KEPT environments of an event loop are kept on disk until the process ends.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import weakref
from collections.abc import Mapping

from envs.rock import Sandbox, SandboxConfig
from envs.rock.backend import Snapshot
from envs.tasks.harbor.build import build
from envs.tasks.harbor.environment import Built
from envs.tasks.harbor.preflight import refuse_tests_without_tools
from envs.tasks.harbor.task import HarborTask

MAX_KEPT = 8
Key = tuple[int, str, str]


@dataclasses.dataclass
class _Entry:
    task: HarborTask  # keeps the task alive while its id is a key
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    users: int = 0
    snapshot: Snapshot | None = None
    built: Built | None = None


_entries: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, collections.OrderedDict[Key, _Entry]
] = weakref.WeakKeyDictionary()


async def start_built(
    task: HarborTask,
    config: SandboxConfig,
    images: Mapping[str, tuple[str, ...]] | None,
    build_egress: tuple[str, ...] | None = None,
    verifier_egress: tuple[str, ...] = (),
) -> tuple[Sandbox, Built]:
    """Return a started sandbox in which the task's environment is built.

    Args:
      task: the task.
      config: the config of the sandbox.
      images: see `build`.
      build_egress: the hosts that the build may reach; None: those of the sandbox. A sandbox that
        was built under another network policy than the episode's is replaced before the episode
        begins.
      verifier_egress: see `build`.

    Raises:
      Exception: whatever `build` and Sandbox.start raise; no sandbox is left running then.
    """
    entries = _entries.setdefault(asyncio.get_running_loop(), collections.OrderedDict())
    key = (
        id(task),
        repr(dataclasses.replace(config, label="")),
        repr((images, build_egress, verifier_egress)),
    )
    entry = entries.setdefault(key, _Entry(task))
    entries.move_to_end(key)
    entry.users += 1
    try:
        async with entry.lock:
            if entry.snapshot is None:
                sandbox, built = await _build(
                    task, config, images, build_egress, verifier_egress, entry
                )
                if sandbox.config == config:
                    return sandbox, built
                await sandbox.stop()
        sandbox = Sandbox(config, entry.snapshot)
        await _start(sandbox)
        return sandbox, dataclasses.replace(entry.built, notes=list(entry.built.notes))
    finally:
        entry.users -= 1
        await _forget_oldest(entries)


async def _build(
    task: HarborTask,
    config: SandboxConfig,
    images: Mapping[str, tuple[str, ...]] | None,
    build_egress: tuple[str, ...] | None,
    verifier_egress: tuple[str, ...],
    entry: _Entry,
) -> tuple[Sandbox, Built]:
    if build_egress is not None:
        config_of_build = dataclasses.replace(config, egress=build_egress)
    else:
        config_of_build = config
    sandbox = Sandbox(config_of_build)
    await _start(sandbox)
    try:
        built = await build(sandbox, task, images, config.egress, verifier_egress)
        real_installs = bool(config.egress or verifier_egress)
        built.notes += await refuse_tests_without_tools(sandbox, task, built, real_installs)
        # In other tiers each sandbox has paths of its own, which a snapshot would not fit.
        if sandbox.tier == "namespaces":
            entry.snapshot = await sandbox.snapshot()
            entry.built = built
        return sandbox, built
    except BaseException:
        await asyncio.shield(sandbox.stop())
        raise


async def _start(sandbox: Sandbox) -> None:
    try:
        await sandbox.start()
    except BaseException:
        await asyncio.shield(sandbox.stop())
        raise


async def _forget_oldest(entries: collections.OrderedDict[Key, _Entry]) -> None:
    idle = [key for key, entry in entries.items() if not entry.users]
    surplus = max(0, len(entries) - MAX_KEPT)
    # Removed from the table at once, because others use it while a snapshot is deleted.
    oldest = [entries.pop(key) for key in idle[:surplus]]
    for entry in oldest:
        if entry.snapshot is not None:
            await entry.snapshot.delete()
