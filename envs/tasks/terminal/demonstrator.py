"""Demonstrations: the scripted solution of a task, played in its environment.

A demonstration may contain a deliberate mistake and the recovery from it.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

from envs.gem import format_tool_call
from envs.tasks.terminal.env import TerminalEnv
from envs.tasks.terminal.task import Demonstration

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
# A file that the command reads; "*.txt" and "> out.txt" do not match.
_READ_FILE = re.compile(r"(?<!> )\b(?P<name>[a-z]+)\.(?:txt|log|sh|conf)\b")
# A pipeline, a list of commands, a here-document or a command substitution.
_COMPOUND = re.compile(r"[|;\n]|<<|\$\((?!\()")


@dataclasses.dataclass(frozen=True)
class DemonstrationTurn:
    """One turn of a demonstration: the text, the observation and the environment's status.

    `is_mistake` marks the deliberate mistake; `exit_code` is of its command, and `tool_call` its
    call, {"name", "arguments"}.
    """

    text: str
    observation: str
    status: str
    exit_code: int | None = None
    is_mistake: bool = False
    tool_call: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class DemonstrationEpisode:
    """One played demonstration with its reward and ending."""

    task: str
    family: str
    instruction: str
    turns: list[DemonstrationTurn]
    reward: float
    ending: str


def mistaken(command: str, rng: random.Random) -> str:
    """Return a command with a typical mistake: a misspelt program, or a missing file extension.

    The mistaken command fails and does no damage.
    """
    program = command.split()[0]
    if program not in MISSPELT or _COMPOUND.search(command):
        # Keep only the beginning of a compound command: the rest of it would still run.
        beginning = re.split(r"[|;&<>\n]", command)[0]
        arguments = beginning.split()[1:]
        doubled_letter = program + program[-1]
        return " ".join([doubled_letter, *arguments])
    candidates = [command.replace(program, MISSPELT[program], 1)]
    file = _READ_FILE.search(command)
    if file and program != "echo":
        without_extension = command[: file.start()] + file["name"] + command[file.end() :]
        candidates.append(without_extension)
    return rng.choice(candidates)


async def play_demonstration(
    env: TerminalEnv, rng: random.Random, error_rate: float = 0.0, seed: int | None = None
) -> DemonstrationEpisode:
    """Play the scripted solution of the environment's task.

    Args:
      env: the environment; it is closed at the end.
      rng: decides whether and where a mistake happens.
      error_rate: the probability that one of the first two commands is preceded by a mistaken one.
      seed: the seed given to the environment's reset.

    Returns:
      The episode. An infrastructure failure during the episode is returned as its ending (infra_*).

    Raises:
      SandboxError: the environment could not start a sandbox.
    """
    instruction, _ = await env.areset(seed=seed)
    wrong_command = 0
    if rng.random() < error_rate:
        wrong_command = rng.choice([1, 2])  # every demonstrator has two commands or more
    turns: list[DemonstrationTurn] = []

    async def take_turn(text: str, is_mistake: bool = False) -> tuple[str, float, bool, str]:
        observation, reward, terminated, truncated, info = await env.astep(text)
        tool_call = None
        if info["use_tool"]:
            tool_call = {"name": info["tool_type"], "arguments": info["tool_arguments"]}
        turn = DemonstrationTurn(
            text, observation, info["status"], info.get("exit_code"), is_mistake, tool_call
        )
        turns.append(turn)
        return observation, reward, terminated or truncated, info.get("ending", "")

    async def run_command(command: str, is_mistake: bool = False) -> tuple[str, float, bool, str]:
        return await take_turn(format_tool_call("bash", {"command": command}), is_mistake)

    try:
        demonstration = env.task.demonstrator()
        command = next(demonstration, None)
        number = 0
        ended = False
        while command is not None:
            number += 1
            if number == wrong_command:
                wrong = mistaken(command, rng)
                _, reward, ended, ending = await run_command(wrong, is_mistake=True)
                if ended:
                    break
            observation, reward, ended, ending = await run_command(command)
            if ended:
                break
            command = _next_command(demonstration, observation)
        if not ended:
            _, reward, _, ending = await take_turn(FINAL_TURN)
    finally:
        await env.aclose()
    return DemonstrationEpisode(env.task.name, env.task.family, instruction, turns, reward, ending)


def _next_command(demonstration: Demonstration, observation: str) -> str | None:
    """Return the command that follows an observation, or None at the demonstration's end."""
    try:
        return demonstration.send(observation)
    except StopIteration:
        return None
