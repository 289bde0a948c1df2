"""SWE-bench and SWE-bench Verified, graded by pytest in embedded sandboxes.

Instances come from JSON Lines, JSON or parquet, repositories from local clones.
"""

from envs.tasks.git import RepositoryError
from envs.tasks.swebench.instance import Instance, is_instance, load_instances, parse_instance
from envs.tasks.swebench.repository import Cut, cut, patched
from envs.tasks.swebench.task import find_repository, load_swebench, make_task

__all__ = [
    "Cut",
    "Instance",
    "RepositoryError",
    "cut",
    "find_repository",
    "is_instance",
    "load_instances",
    "load_swebench",
    "make_task",
    "parse_instance",
    "patched",
]
