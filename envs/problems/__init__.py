r"""Problems of one turn: mathematics, programming with hidden inputs, instructions about a text.

Code runs in a sandbox. Importing this package registers all problems; their families are in
math_families.py, code_families.py and instructions.py.

env = make("rome:math/dice-hard", seed=3)
text, info = env.reset()
env.step("\\boxed{5/12}")
"""

from envs.gem import register
from envs.problems.base import LEVELS, ProblemEnv, ProblemTask
from envs.problems.code import CodeEnv
from envs.problems.instructions import InstructionEnv
from envs.problems.mathematics import MathEnv

KINDS = (MathEnv, CodeEnv, InstructionEnv)
PROBLEM_IDS: tuple[str, ...] = tuple(
    f"rome:{kind.subject}/{family}-{level}"
    for kind in KINDS
    for family in ("all", *kind.families)
    for level in LEVELS
)
for _kind in KINDS:
    for _family in ("all", *_kind.families):
        for _level in LEVELS:
            register(
                f"rome:{_kind.subject}/{_family}-{_level}",
                f"{_kind.__module__}:{_kind.__name__}",
                family=_family,
                level=_level,
            )

__all__ = [
    "LEVELS",
    "PROBLEM_IDS",
    "CodeEnv",
    "InstructionEnv",
    "MathEnv",
    "ProblemEnv",
    "ProblemTask",
]
