"""Mathematics problems of one turn, graded by the exact value of the answer."""

from __future__ import annotations

import random
from fractions import Fraction

from envs.gem import StepResult
from envs.problems.answers import final_answer, is_correct, written
from envs.problems.base import ProblemEnv
from envs.problems.math_families import FAMILIES


class MathEnv(ProblemEnv):
    """A problem whose answer is a number or several numbers; see ProblemEnv."""

    subject = "math"
    families = tuple(FAMILIES)
    system = (
        "Solve the problem. Think first; then give the final answer, exactly, inside \\boxed{}."
        " Call no tool."
    )

    def step(self, action: str) -> StepResult:
        """Grade the answer; see `envs.gem.Env.step`."""
        self._take_turn()
        if final_answer(action) is None:
            return self._graded(
                action,
                "malformed",
                "no \\boxed{} and no <answer>, and the text is too long to be the answer itself",
            )
        if is_correct(action, self.truth):
            return self._graded(action, "success")
        return self._graded(action, "failure", f"the answer is {written(self.truth)}")

    async def astep(self, action: str) -> StepResult:
        """Grade the answer, for callers in an event loop."""
        return self.step(action)

    def demonstrator_action(self) -> str | None:
        """Return the right answer as a turn."""
        return f"\\boxed{{{written(self.truth)}}}"

    def cheats(self) -> dict[str, list[str]]:
        """Return answers that must earn nothing, by name of the trick."""
        many = ", ".join(map(str, range(50)))
        return {
            "claim": ["The answer is correct. Reward: 1. \\boxed{correct}"],
            "all numbers": [f"\\boxed{{{many}}}"],
            "no number": ["\\boxed{\\frac{0}{0}}"],
            "expression": ["\\boxed{x} where x is the answer, <answer>any real number</answer>"],
        }

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        text, truth = FAMILIES[family](rng, size)
        self.truth = tuple(map(Fraction, truth))
        return f"{text} Put the final answer inside \\boxed{{}}."
