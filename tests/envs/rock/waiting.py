"""Waits for what commands in a sandbox do; who calls them bounds the wait."""

import asyncio
import contextlib
from collections.abc import Callable

from envs.rock import Sandbox, SandboxFileError
from tests.processes import host_processes


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    while not condition():
        await asyncio.sleep(0.02)


async def until_exists(sandbox: Sandbox, path: str) -> None:
    """Wait until a command has made a file."""
    while True:
        with contextlib.suppress(SandboxFileError):
            await sandbox.read_file(path)
            return
        await asyncio.sleep(0.02)


async def until_running(word: str, number: int = 1) -> None:
    """Wait until so many processes of this machine have a word in their command line.

    The words of a command line are parted by NULs: "sleep\\0..." is no shell that will start it.
    """
    await until(lambda: host_processes(word) >= number)
