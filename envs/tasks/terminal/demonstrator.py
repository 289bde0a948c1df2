"""Demonstration episodes: the scripted solution of a task, played in its environment, sometimes with a
mistake and its recovery.
"""

from __future__ import annotations

import dataclasses
import random
import re

from envs.gem import format_tool_call
from envs.tasks.terminal.env import TerminalEnv

FINAL_TURN = "done"
MISSPELT = {
    "cat": "cta",
    "grep": "gerp",
    "echo": "ehco",
    "sort": "srot",
    "sed": "sde",
    "find": "fidn",
    "chmod": "chomd",
    "mkdir": "mkidr",
    "ls": "lls",
    "mv": "mvv",
    "rm": "rmm",
    "cp": "ccp",
}
_READ_FILE = re.compile(
    r"(?<!> )\b(?P<name>[a-z]+)\.(?:txt|log|sh|conf)\b"
)  # a file that the command reads; "*.txt" and "> out.txt" are none


@dataclasses.dataclass(frozen=True)
class DemonstrationTurn:
    """What the model would have said, what came back, and the environment's status for it."""

    text: str
    observation: str
    status: str


@dataclasses.dataclass(frozen=True)
class DemonstrationEpisode:
    task: str
    family: str
    instruction: str
    turns: list[DemonstrationTurn]
    reward: float
    ending: str


def mistaken(command: str, rng: random.Random) -> str:
    """The command as a hurried person types it: the program misspelt, or the extension of a file
    forgotten.

    It fails and harms nothing.
    """
    program = command.split()[0]
    if program not in MISSPELT or re.search(
        r"[|;\n]|<<|\$\((?!\()", command
    ):  # of a longer command just its beginning: the rest would still run
        begin = re.split(r"[|;&<>\n]", command)[0].split()
        return " ".join([program + program[-1], *begin[1:]])
    candidates = [command.replace(program, MISSPELT[program], 1)]
    named = _READ_FILE.search(command)
    if named and program != "echo":
        candidates.append(command[: named.start()] + named["name"] + command[named.end() :])
    return rng.choice(candidates)


async def play_demonstration(
    env: TerminalEnv, rng: random.Random, error_rate: float = 0.0, seed: int | None = None
) -> DemonstrationEpisode:
    """Plays one episode.

    With probability `error_rate` one command, drawn at random, is first sent with a mistake.

    Raises SandboxError when the environment gives no sandbox; an episode that ends as infra_* comes
    back with this ending.
    """
    instruction, _ = await env.areset(seed=seed)
    wrong_turn = (
        rng.choice([1, 2]) if rng.random() < error_rate else 0
    )  # every demonstrator has two commands or more
    turns: list[DemonstrationTurn] = []

    async def say(text: str) -> tuple[str, float, bool, str]:
        observation, reward, terminated, truncated, info = await env.astep(text)
        turns.append(DemonstrationTurn(text, observation, info["status"]))
        return observation, reward, terminated or truncated, info.get("ending", "")

    try:
        demonstrator, observation, number, ended, reward, ending = (
            env.task.demonstrator(),
            None,
            0,
            False,
            0.0,
            "",
        )
        while not ended:
            try:
                command = (
                    next(demonstrator) if observation is None else demonstrator.send(observation)
                )
            except StopIteration:
                _, reward, ended, ending = await say(FINAL_TURN)
                break
            number += 1
            if number == wrong_turn:
                _, reward, ended, ending = await say(
                    format_tool_call("bash", {"command": mistaken(command, rng)})
                )
            if not ended:
                observation, reward, ended, ending = await say(
                    format_tool_call("bash", {"command": command})
                )
    finally:
        await env.aclose()
    return DemonstrationEpisode(env.task.name, env.task.family, instruction, turns, reward, ending)
