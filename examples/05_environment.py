"""Write an environment and step many of it (python -m examples.05_environment)."""

import random

from envs.gem import Env, Info, StepResult, make_vec, register


class Countdown(Env):
    """Say the numbers from `start` down to 1, one a turn; a wrong number ends the episode."""

    def __init__(self, seed: int = 0, start: int = 3) -> None:
        self.start = start
        self.left = start

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        super().reset(seed)
        self.left = self.start
        return f"Count down from {self.start}.", {}

    def step(self, action: str) -> StepResult:
        if action.strip() != str(self.left):
            return f"wrong: it was {self.left}", 0.0, True, False, {"ending": "failure"}
        self.left -= 1
        if self.left == 0:
            return "done", 1.0, True, False, {"ending": "success"}
        return "go on", 0.0, False, False, {}


register("mine/countdown", Countdown, start=3)

if __name__ == "__main__":
    envs = make_vec(["mine/countdown"] * 4, seed=0)
    observations, _ = envs.reset()
    print(observations)
    draws = random.Random(0)
    for number in (3, 2, 1):
        actions = [str(number) if draws.random() < 0.8 else "?" for _ in observations]
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        print(actions, rewards, terminated)
    envs.close()
