"""A task of the terminal curriculum as a GEM environment over a sandbox; what a turn is, `shell.py`
says.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from typing import Any

from envs.gem import Info, StepResult, format_tool_call
from envs.rock import Sandbox, SandboxConfig, SandboxError, Snapshot
from envs.rock.sync import run
from envs.tasks.terminal.reward import VerifierError, parse_reward
from envs.tasks.terminal.shell import (
    BASH_TOOL,
    CALL_TIMEOUT_S,
    MAX_COMMAND_BYTES,
    ShellEnv,
    read_command,
    tier_environment,
    trim,
)
from envs.tasks.terminal.task import Task, make_task

VERIFIER_TIMEOUT_S = 10.0
SETUP_TIMEOUT_S = 20.0
__all__ = [
    "BASH_TOOL",
    "MAX_COMMAND_BYTES",
    "MissingProgramsError",
    "TerminalEnv",
    "read_command",
    "trim",
]


class MissingProgramsError(SandboxError):
    """The sandbox lacks a program that the task's family declares.

    Says nothing about the policy.
    """


@dataclasses.dataclass(frozen=True)
class TerminalSnapshot:
    """A running episode at one moment: its files, and its counts of turns, calls, good calls and
    malformed ones in a row.
    """

    task: Task
    files: Snapshot
    counts: tuple[int, int, int, int]

    async def delete(self) -> None:
        await self.files.delete()


class TerminalEnv(ShellEnv):
    """One task at a time: a Task, a name "family/seed", or a family whose seeds come from `seed`
    and `reset`.

    reset(seed) plays that seed of the family; reset() plays the constructor's seed first and then
    seeds drawn from it. An environment made from a Task plays only this task, whatever the seed.
    """

    grading_seconds = VERIFIER_TIMEOUT_S

    def __init__(
        self,
        task: Task | str | None = None,
        sandbox_config: SandboxConfig | None = None,
        *,
        family: str | None = None,
        seed: int = 0,
        max_turns: int = 6,
        command_timeout: float = 5.0,
        max_observation_chars: int = 200,
        max_malformed: int = 3,
    ) -> None:
        if (task is None) == (family is None):
            raise ValueError(
                f"TerminalEnv got task={task!r} and family={family!r}; give exactly one of them"
            )
        if isinstance(task, str):
            family, seed = _split_name(task)
        self._fixed_task = task if isinstance(task, Task) else None
        self._family, self._seed = family, seed
        self._draw = random.Random(f"{family}/{seed}/next")
        self._resets = 0
        self._sandbox_config = sandbox_config or SandboxConfig()
        super().__init__(max_turns, command_timeout, max_observation_chars, max_malformed)
        self.task = self._next_task(None)

    @property
    def name(self) -> str:
        return self.task.name

    def sample_random_action(self) -> str:
        return format_tool_call("bash", {"command": self._draw.choice(["ls", "cat *", "pwd"])})

    def spawn(self, same_state: bool = False, **kwargs: Any) -> TerminalEnv:
        """A new environment of the same task and settings; with same_state in the middle of the
        same episode, its files copied on write.

        Raises SandboxError while a command of the episode runs, or where the backend keeps no
        snapshots.
        """
        settings: dict[str, Any] = dict(
            task=self._fixed_task,
            family=self._family,
            seed=self._seed,
            sandbox_config=self._sandbox_config,
            max_turns=self._max_turns,
            command_timeout=self._command_timeout,
            max_observation_chars=self._max_observation_chars,
            max_malformed=self._max_malformed,
        )
        copy = TerminalEnv(**{**settings, **kwargs})
        if same_state:
            snapshot = run(self.asnapshot(), CALL_TIMEOUT_S)
            try:
                run(copy.arestore(snapshot), CALL_TIMEOUT_S)
            finally:
                run(snapshot.delete(), CALL_TIMEOUT_S)
        return copy

    async def asnapshot(self) -> TerminalSnapshot:
        """The running episode as it is now; any number of environments of this task may go on from
        it.

        Raises SandboxError as `Sandbox.snapshot`.
        """
        if self._over:
            raise SandboxError(f"there is no running episode of {self.name} to keep; reset first")
        return TerminalSnapshot(
            self.task,
            await self._sandbox.snapshot(),
            (self._turns, self._calls, self._good_calls, self._malformed_in_a_row),
        )

    async def arestore(self, snapshot: TerminalSnapshot) -> tuple[str, Info]:
        """As `areset`, but the episode goes on where `snapshot` was taken.

        Raises SandboxError when there is no sandbox to be had.
        """
        await self.aclose()
        self.task = snapshot.task
        self._sandbox = Sandbox(
            dataclasses.replace(self._sandbox_config, label=self.task.name), snapshot.files
        )
        try:
            await self._sandbox.start()
        except BaseException:
            await self.aclose()
            raise
        self._begin()
        self._turns, self._calls, self._good_calls, self._malformed_in_a_row = snapshot.counts
        return self.task.instruction, {
            "task": self.task.name,
            "family": self.task.family,
            "seed": self.task.seed,
            "tools": self.tools,
        }

    # -- the episode
    # ---------------------------------------------------------------------------------------------

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Starts a fresh sandbox with the task's files.

        Raises SandboxError when there is none to be had.
        """
        await self.aclose()
        if seed is not None or self._resets:
            self.task = self._next_task(seed)
        self._resets += 1
        self._sandbox = Sandbox(dataclasses.replace(self._sandbox_config, label=self.task.name))
        try:
            await self._sandbox.start()
            await self._sandbox.write_files(self.task.files)
            await prepare(self._sandbox, self.task)
        except BaseException:
            await self.aclose()
            raise
        self._begin()
        return self.task.instruction, {
            "task": self.task.name,
            "family": self.task.family,
            "seed": self.task.seed,
            "tools": self.tools,
        }

    # -- grading
    # ---------------------------------------------------------------------------------------------

    async def _verify(self, info: Info) -> StepResult:
        """The verifier's word.

        Files that make it wait were made by the agent, so a timeout is a failure, not a fault of
        the house.
        """
        verdict = await self._sandbox.verify(self.task.verifier, timeout=VERIFIER_TIMEOUT_S)
        if verdict.timed_out:
            return await self._end(
                "failure",
                info,
                note=f"verifier of {self.task.name} was stopped after {VERIFIER_TIMEOUT_S:g} s",
            )
        try:
            reward = parse_reward(verdict.stdout, self.task.name)
        except VerifierError as error:
            if (
                self.task.runs_agent_code
            ):  # a program of the agent's that kills its grader must not hide the failure
                return await self._end(
                    "failure", info, note=f"{error}; what the agent wrote ran inside it"
                )
            return await self._end(
                "infra_verifier",
                info,
                note=f"{error} (exit {verdict.exit_code}, stderr {verdict.stderr[-200:]!r})",
            )
        return await self._end("success" if reward == 1.0 else "failure", info, reward=reward)

    def _next_task(self, seed: int | None) -> Task:
        if self._fixed_task is not None:
            return self._fixed_task
        if seed is None:
            seed = self._draw.randrange(1_000_000) if self._resets else self._seed
        return make_task(self._family, seed)


async def prepare(sandbox: Sandbox, task: Task) -> None:
    """Sees that the task's programs are there, and runs its setup.

    MissingProgramsError or SandboxError where that fails.
    """
    if not task.programs and not task.setup:
        return
    wanted = " ".join(shlex.quote(program) for program in task.programs)
    result = await sandbox.execute(
        f"for p in {wanted}; do command -v $p > /dev/null || echo $p; done", timeout=SETUP_TIMEOUT_S
    )
    if missing := result.stdout.split():
        raise MissingProgramsError(
            f"task {task.name} needs {', '.join(missing)}, which the sandbox lacks; install it or"
            f" leave out family {task.family!r}"
        )
    if task.setup:
        result = await sandbox.execute(
            f"set -e\n{task.setup}", timeout=SETUP_TIMEOUT_S, env=tier_environment(sandbox)
        )
        if result.exit_code != 0:
            raise SandboxError(
                f"setup of task {task.name} ended with exit {result.exit_code}:"
                f" {result.stderr[-300:]!r}"
            )


def _split_name(name: str) -> tuple[str, int]:
    family, _, seed = name.partition("/")
    if not seed.isdecimal():
        raise ValueError(f"task {name!r} is not 'family/seed', for example 'count/17'")
    return family, int(seed)
