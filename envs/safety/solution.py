"""The scripted solution of a base task as turns."""

from __future__ import annotations

import base64
import random
import shlex

from envs.gem import format_tool_call
from envs.gem.episode import Line, Script, has_script, script_of
from envs.tasks.harbor.env import HarborEnv
from envs.tasks.harbor.solution import FINAL_TURN, is_one_command
from envs.tasks.harbor.task import HarborTask
from envs.tasks.terminal.shell import MAX_COMMAND_BYTES, ShellEnv

FOLDER = "/solution"


def base_script(base: ShellEnv, rng: random.Random, error_rate: float = 0.0) -> Script:
    """Return the script that solves a base task; its last turn is the hand-in.

    Raises:
      NotImplementedError: the task has no solution that could be said as turns.
    """
    if isinstance(base, HarborEnv) and not is_one_command(base.task):
        command = unpacking_command(base.task)
        if command is None:
            raise NotImplementedError(f"the solution of {base.name} is no script of turns")
        return _say(command)
    if not has_script(base):
        raise NotImplementedError(f"{type(base).__name__} has no scripted solution")
    return script_of(base, rng, error_rate)


def unpacking_command(task: HarborTask) -> str | None:
    """Return a command that lays a task's solution out, runs it and removes it.

    None where the task has several steps, or a solution that is too long or needs variables.
    """
    step = task.steps[0]
    if len(task.steps) > 1 or step.solve_script is None or step.solution_env:
        return None
    lines = [f"mkdir -p {FOLDER}"]
    for name, (content, _) in step.solution.items():
        path = shlex.quote(f"{FOLDER}/{name}")
        folder = shlex.quote(f"{FOLDER}/{name}".rpartition("/")[0])
        lines.append(f"mkdir -p {folder}\n{_writing(path, content)}")
    lines.append(f"bash {FOLDER}/{shlex.quote(step.solve_script)}\nrm -rf {FOLDER}")
    command = "\n".join(lines)
    return command if len(command.encode()) <= MAX_COMMAND_BYTES else None


def _writing(path: str, content: bytes) -> str:
    """Return a command that writes a file: as text where it is some, so that paths are mapped."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or "END_OF_FILE" in text:
        encoded = base64.b64encode(content).decode()
        return f"base64 -d > {path} <<'END_OF_FILE'\n{encoded}\nEND_OF_FILE"
    return f"cat > {path} <<'END_OF_FILE'\n{text.rstrip()}\nEND_OF_FILE"


def _say(command: str) -> Script:
    yield Line(format_tool_call("bash", {"command": command}))
    yield Line(FINAL_TURN)
