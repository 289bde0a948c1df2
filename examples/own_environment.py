"""Train on an environment of your own (python -m examples.own_environment).

python -m launch.train --config=experiments/ipa.py:smoke \
    --config.task=examples/own_environment.py:Reverse --config.max_context=256 \
    --config.row_length=256
"""

import asyncio
import random

from envs.gem.episode import play_demonstration
from envs.rock import SandboxConfig
from envs.sources import open_source


class Reverse:
    """Say a word backwards; one correction is allowed."""

    max_turns = 2

    def reset(self, seed: int | None = None):
        self.word = "".join(random.Random(seed).sample("abcdef", 3))
        return f"Reverse {self.word}.", {}

    def step(self, action: str):
        is_right = action.strip() == self.word[::-1]
        return "no, again", float(is_right), is_right, False, {}

    def demonstrator_action(self) -> str:  # optional: SFT and the imitation term show it
        return self.word[::-1]


if __name__ == "__main__":
    source = open_source("0.8*examples/own_environment.py:Reverse + 0.2*games:wordle")
    print("families:", *source.families)
    task = source.train(source.families[0], index=17)
    print(task.name, "-", task.content.opening)
    env = task.make_env(SandboxConfig())
    print("reward:", asyncio.run(play_demonstration(env, random.Random(0))).reward)
    print("evaluated:", *(one.name for one in source.evaluation(per_family=1)))
