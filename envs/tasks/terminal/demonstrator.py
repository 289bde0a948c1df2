"""The script of a demonstration: a task's scripted solution as turns of an agent.

It may contain a deliberate mistake and the recovery from it.
"""

from __future__ import annotations

import random
import re

from envs.gem import format_tool_call
from envs.gem.episode import Line, Script
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


def play_script(demonstration: Demonstration, rng: random.Random, error_rate: float) -> Script:
    """Play a task's scripted solution, and hand in the work.

    Args:
      demonstration: yields commands and receives their observations.
      rng: decides whether and where a mistake happens.
      error_rate: the probability that one of the first two commands is preceded by a mistaken one.
    """
    wrong_command = 0
    if rng.random() < error_rate:
        wrong_command = rng.choice([1, 2])  # every demonstrator has two commands or more
    command = next(demonstration, None)
    number = 0
    while command is not None:
        number += 1
        if number == wrong_command:
            yield Line(_call(mistaken(command, rng)), is_mistake=True)
        observation = yield Line(_call(command))
        command = _next_command(demonstration, observation)
    yield Line(FINAL_TURN)


def _call(command: str) -> str:
    return format_tool_call("bash", {"command": command})


def _next_command(demonstration: Demonstration, observation: str) -> str | None:
    """Return the command that follows an observation, or None at the demonstration's end."""
    try:
        return demonstration.send(observation)
    except StopIteration:
        return None
