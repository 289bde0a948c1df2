r"""Writes demonstrator episodes as JSON lines, the text from which a tokenizer for the curriculum is
trained.

python -m envs.tasks.terminal.corpus --out=corpus.jsonl --episodes=60      # 60 of each family
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random

from envs.rock import SandboxConfig
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES
from envs.tasks.terminal.demonstrator import DemonstrationEpisode, play_demonstration
from envs.tasks.terminal.env import TerminalEnv

ERROR_RATE = 0.3


async def demonstration_episodes(
    families: tuple[str, ...], episodes: int
) -> list[DemonstrationEpisode]:
    """`episodes` demonstrator episodes of each family on training seeds, some with mistakes."""
    config = SandboxConfig(isolation="best_available")
    return [
        await play_demonstration(
            TerminalEnv(f"{family}/{seed}", config),
            random.Random(f"corpus/{family}/{seed}"),
            ERROR_RATE,
        )
        for family in families
        for seed in range(episodes)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--episodes", type=int, default=60)
    arguments = parser.parse_args()
    episodes = asyncio.run(demonstration_episodes(FAMILIES + HELD_OUT_FAMILIES, arguments.episodes))
    arguments.out.write_text(
        "".join(json.dumps(dataclasses.asdict(episode)) + "\n" for episode in episodes)
    )
    print(
        f"{len(episodes)} episodes, mean reward"
        f" {sum(episode.reward for episode in episodes) / len(episodes):.3f}, in {arguments.out}"
    )


if __name__ == "__main__":
    main()
