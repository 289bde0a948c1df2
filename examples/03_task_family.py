"""Write a family of terminal tasks.

python -m examples.03_task_family

A family draws an instruction, files, checks of the final state and a demonstrator. Put the function
into envs/tasks/terminal/families/base, and the curriculum trains on it.
"""

import asyncio
import random

from envs.gem.episode import play_demonstration
from envs.rock import SandboxConfig
from envs.tasks.terminal.env import TerminalEnv
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, family, holds, lines


@family("longest_line")
def longest_line(draw: Draw) -> TaskDraft:
    """Draw three lines of one, two and three words; the longest is to be written to a file."""
    source = draw.input()
    rows = [" ".join(draw.words(count)) for count in (1, 2, 3)]
    longest = max(rows, key=len)

    def demonstrator() -> Demonstration:
        text = yield f"cat {source}"
        yield f"echo {max(text.splitlines(), key=len)} > out.txt"

    instruction = f"Write the longest line of {source} to out.txt."
    files = {source: lines(*draw.shuffled(rows))}
    return TaskDraft(instruction, files, [holds("out.txt", longest)], demonstrator)


if __name__ == "__main__":
    env = TerminalEnv("longest_line/7", SandboxConfig(isolation="best_available"))
    episode = asyncio.run(play_demonstration(env, random.Random(0)))
    print(episode.instruction)
    for turn in episode.turns:
        print("  ", turn.text.replace("\n", " "), "->", turn.observation)
    print("reward:", episode.reward)
