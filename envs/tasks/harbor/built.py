"""Environments that were built already: later episodes of a task start from a snapshot of the first
one, copy-on-write.

What a build leaves is files alone (no process outlives a command of its own), so a snapshot of it
is the same as building anew. Episodes of one task that begin together wait for the first of them to
build. The newest KEPT environments of an event loop are kept, on disk, until the process ends.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import weakref
from collections.abc import Mapping

from envs.rock import Sandbox, SandboxConfig
from envs.rock.backend import Snapshot
from envs.tasks.harbor.build import Built, build
from envs.tasks.harbor.task import HarborTask

KEPT = 8
Key = tuple[int, str, str]


@dataclasses.dataclass
class _Entry:
    task: HarborTask  # alive as long as its id is a key
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
) -> tuple[Sandbox, Built]:
    """A started sandbox in which the task's environment is built.

    Raises what `build` and Sandbox.start raise, and leaves no sandbox then.

    build_egress: what the build reaches; None: what the sandbox does. What is built by another
    policy than that of the episode is left before it begins.
    """
    entries = _entries.setdefault(asyncio.get_running_loop(), collections.OrderedDict())
    key = (id(task), repr(dataclasses.replace(config, label="")), repr((images, build_egress)))
    entry = entries.setdefault(key, _Entry(task))
    entries.move_to_end(key)
    entry.users += 1
    try:
        async with entry.lock:
            if entry.snapshot is None:
                sandbox, built = await _build(task, config, images, build_egress, entry)
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
    entry: _Entry,
) -> tuple[Sandbox, Built]:
    sandbox = Sandbox(
        config if build_egress is None else dataclasses.replace(config, egress=build_egress)
    )
    await _start(sandbox)
    try:
        built = await build(sandbox, task, images, config.egress)
        if (
            sandbox.tier == "namespaces"
        ):  # elsewhere a sandbox's paths are its own, and a snapshot's would be another's
            entry.snapshot, entry.built = await sandbox.snapshot(), built
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
    for entry in [
        entries.pop(key) for key in idle[: max(0, len(entries) - KEPT)]
    ]:  # taken out at once: others come by while one is deleted
        if entry.snapshot is not None:
            await entry.snapshot.delete()
