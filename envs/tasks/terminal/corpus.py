r"""Write demonstrations as JSON lines: the corpus that the curriculum's tokenizer is trained on.

python -m envs.tasks.terminal.corpus --out=corpus.jsonl --episodes=60      # 60 of each family
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random

from envs.gem.episode import DemonstrationEpisode, play_demonstration
from envs.rock import SandboxConfig
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES
from envs.tasks.terminal.env import TerminalEnv

ERROR_RATE = 0.3


async def demonstration_episodes(
    families: tuple[str, ...], episodes: int
) -> list[DemonstrationEpisode]:
    """Play `episodes` demonstrations of each family on training seeds, some with mistakes."""
    config = SandboxConfig(isolation="best_available")
    played = []
    for family in families:
        for seed in range(episodes):
            env = TerminalEnv(f"{family}/{seed}", config)
            rng = random.Random(f"corpus/{family}/{seed}")
            played.append(await play_demonstration(env, rng, ERROR_RATE))
    return played


def main() -> None:
    """Parse the arguments, play the demonstrations and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--episodes", type=int, default=60)
    arguments = parser.parse_args()
    episodes = asyncio.run(demonstration_episodes(FAMILIES + HELD_OUT_FAMILIES, arguments.episodes))
    rows = [json.dumps(dataclasses.asdict(episode)) for episode in episodes]
    arguments.out.write_text("".join(f"{row}\n" for row in rows))
    mean_reward = sum(episode.reward for episode in episodes) / len(episodes)
    print(f"{len(episodes)} episodes, mean reward {mean_reward:.3f}, in {arguments.out}")


if __name__ == "__main__":
    main()
