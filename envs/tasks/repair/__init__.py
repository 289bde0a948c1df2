"""Program repair tasks, generated from Python packages: one small bug each.

The package's own tests prove each bug.
"""

from envs.tasks.repair.mutate import OPERATORS, Edit, candidates_of, is_another_program
from envs.tasks.repair.package import Package, load_package, shipped
from envs.tasks.repair.task import draw, repair_tasks

__all__ = [
    "OPERATORS",
    "Edit",
    "Package",
    "candidates_of",
    "draw",
    "is_another_program",
    "load_package",
    "repair_tasks",
    "shipped",
]
