"""Small task folders, and agents that need no sandbox."""

import asyncio

from envs.rock import SandboxConfig
from envs.sources import load_tasks
from rome.evals.agents import Outcome
from tests.envs.tasks.harbor.conftest import PASSES, write

CONFIG = SandboxConfig(isolation="best_available")
GUARDED = (
    '#!/bin/bash\nif [ "$(cat /app/out.txt)" = hello ]; then echo 1 > /logs/verifier/reward.txt;'
    " else echo 0 > /logs/verifier/reward.txt; fi\n"
)


def write_task(folder, name, **files):
    """A task that is passed by writing hello into /app/out.txt; files by key replace or add, None
    leaves one out.
    """
    plain = {
        "task_toml": (
            "task.toml",
            'version = "1.0"\n[metadata]\ndifficulty = "easy"\ncategory = "files"\n',
        ),
        "instruction": ("instruction.md", "Write hello into /app/out.txt.\n"),
        "dockerfile": ("environment/Dockerfile", "FROM ubuntu:24.04\nWORKDIR /app\n"),
        "test": ("tests/test.sh", GUARDED),
        "solve": ("solution/solve.sh", "echo hello > /app/out.txt\n"),
    }
    return write(
        folder / name,
        {
            path: files.get(key, content)
            for key, (path, content) in plain.items()
            if files.get(key, content) is not None
        },
    )


def terminal(count=4):
    return load_tasks(f"terminal:count,sum:{count}")


class Played:
    """An agent whose attempts end as told: a function of (task name, attempt, how often it was
    tried).

    Counts how many play at once.
    """

    def __init__(self, end, name="played", seconds=0.0):
        self.end, self.name, self.seconds = end, name, seconds
        self.calls, self.at_once, self.most_at_once, self.seeds = {}, 0, 0, []

    async def play(self, task, attempt, seed):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        self.seeds.append(seed)
        tries = self.calls[task.name, attempt] = self.calls.get((task.name, attempt), 0) + 1
        return self.end(task.name, attempt, tries)

    async def close(self):
        pass


def won(*_):
    return Outcome(1.0, "success")


__all__ = ["CONFIG", "GUARDED", "PASSES", "Played", "terminal", "won", "write", "write_task"]
