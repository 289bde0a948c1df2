r"""Problems of one turn: mathematics with exact answers, and programming with hidden inputs.

Code runs in a sandbox. Importing this package registers all problems; their families are in
math_families.py and code_families.py.

env = make("rome:math/dice-hard", seed=3)
text, info = env.reset()
env.step("\\boxed{5/12}")
"""

from envs.gem import register
from envs.problems.base import LEVELS, ProblemEnv, ProblemTask
from envs.problems.code import CodeEnv
from envs.problems.mathematics import MathEnv

PROBLEM_IDS: tuple[str, ...] = tuple(
    f"rome:{kind.subject}/{family}-{level}"
    for kind in (MathEnv, CodeEnv)
    for family in ("all", *kind.families)
    for level in LEVELS
)
for _kind in (MathEnv, CodeEnv):
    for _family in ("all", *_kind.families):
        for _level in LEVELS:
            register(
                f"rome:{_kind.subject}/{_family}-{_level}",
                f"{_kind.__module__}:{_kind.__name__}",
                family=_family,
                level=_level,
            )

__all__ = ["LEVELS", "PROBLEM_IDS", "CodeEnv", "MathEnv", "ProblemEnv", "ProblemTask"]
