"""A task's reference solution: what form it has, how long it may take, and its turns as text."""

from __future__ import annotations

from envs.gem import format_tool_call
from envs.gem.episode import Line, Script
from envs.rock import SandboxConfig
from envs.tasks.harbor.task import HarborTask
from envs.tasks.terminal.shell import MAX_COMMAND_BYTES

SOLVE_TIMEOUT_SECONDS = 600.0  # of a reference solution where the agent has no time limit
FINAL_TURN = "done"


def is_one_command(task: HarborTask) -> bool:
    """Return whether each step's reference solution is one script that needs no other file."""
    for step in task.steps:
        if step.solve_script is None or set(step.solution) != {step.solve_script}:
            return False
        script = step.solution[step.solve_script][0]
        is_short = len(script) <= MAX_COMMAND_BYTES and b"\0" not in script
        if step.solution_env or step.parser != "reward" or not is_short:
            return False
    return True


def say_solution(task: HarborTask) -> Script:
    """Yield the reference solution as turns: each step's script as one command, then its end."""
    for step in task.steps:
        script = step.solution[step.solve_script][0].decode(errors="replace").strip()
        yield Line(format_tool_call("bash", {"command": script}))
        yield Line(FINAL_TURN)


def reference_seconds(task: HarborTask) -> float:
    """Return the time that a reference solution may take: its environment, its work, its tests."""
    seconds = task.environment.build_timeout + SandboxConfig().start_timeout
    for step in task.steps:
        seconds += step.agent_timeout or SOLVE_TIMEOUT_SECONDS
        seconds += step.verifier_timeout
        if step.verifier_environment:
            seconds += step.verifier_environment.build_timeout
    return seconds
