"""Problems of one turn: mathematics with exact answers, programming with hidden inputs in a
sandbox.

env = make("rome:math/dice-hard", seed=3)    # importing envs.problems registers them; families in math_families.py and code_families.py
text, info = env.reset()
env.step("\\\\boxed{5/12}")
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
for _name in PROBLEM_IDS:
    _family, _level = _name.split("/")[1].rsplit("-", 1)
    _kind = MathEnv if _name.startswith("rome:math/") else CodeEnv
    register(_name, f"{_kind.__module__}:{_kind.__name__}", family=_family, level=_level)

__all__ = ["LEVELS", "PROBLEM_IDS", "CodeEnv", "MathEnv", "ProblemEnv", "ProblemTask"]
