"""Task folders of Harbor (Terminal-Bench 2.x) and Terminal-Bench 1, played in sandboxes.

env = HarborEnv("path/to/task")                 # GEM: reset, step, close
env = make("harbor/word-report")                # one of the examples in this package
tasks = load_dataset("path/to/folder")
"""

import pathlib

from envs.gem import register
from envs.tasks.harbor.env import HarborEnv, combine
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.grade import RewardError
from envs.tasks.harbor.load import load_dataset, load_task
from envs.tasks.harbor.task import HarborTask

EXAMPLES = pathlib.Path(__file__).parent / "examples"

for _folder in sorted(EXAMPLES.iterdir()) if EXAMPLES.is_dir() else ():
    register(f"harbor/{_folder.name}", "envs.tasks.harbor.env:HarborEnv", task=_folder)

__all__ = [
    "EXAMPLES",
    "BuildError",
    "HarborEnv",
    "HarborTask",
    "RewardError",
    "TaskError",
    "UnsupportedError",
    "combine",
    "load_dataset",
    "load_task",
]
