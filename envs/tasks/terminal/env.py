"""A task of the terminal curriculum as a GEM environment over a sandbox.

`shell.py` defines the turns of an episode.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from typing import Any

from envs.gem import Info, StepResult, format_tool_call
from envs.gem.episode import Script
from envs.rock import CommandResult, Sandbox, SandboxConfig, SandboxError, Snapshot
from envs.rock.sync import run
from envs.tasks.terminal.demonstrator import play_script
from envs.tasks.terminal.reward import VerifierError, parse_reward
from envs.tasks.terminal.shell import (
    BASH_TOOL,
    CALL_TIMEOUT_SECONDS,
    MAX_COMMAND_BYTES,
    ShellEnv,
    read_command,
    trim,
)
from envs.tasks.terminal.task import VERIFIER_PATH, Task, make_task

VERIFIER_TIMEOUT_SECONDS = 30.0  # by the clock: a busy machine must not fail an honest agent
SETUP_TIMEOUT_SECONDS = 20.0
_MISSING_STATUS = 90  # of a setup whose programs are missing, which it then names
KILLED = 137  # the exit code of a verifier that was killed
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

    This is a fault of the machine and says nothing about the policy.
    """


@dataclasses.dataclass(frozen=True)
class TerminalSnapshot:
    """A running episode at one moment.

    `counts` holds turns, tool calls, successful calls and consecutive malformed calls.
    """

    task: Task
    files: Snapshot
    counts: tuple[int, int, int, int]

    async def delete(self) -> None:
        """Delete the snapshot's files."""
        await self.files.delete()


class TerminalEnv(ShellEnv):
    """An environment for tasks of the terminal curriculum.

    It is made from a Task, from a name "family/seed", or from a family. reset(seed) plays that seed
    of the family; reset() plays the constructor's seed first and then seeds drawn from it. An
    environment made from a Task always plays this task.
    """

    grading_seconds = VERIFIER_TIMEOUT_SECONDS

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
        self._family = family
        self._seed = seed
        self._draw = random.Random(f"{family}/{seed}/next")
        self._random_actions = random.Random(f"{family}/{seed}/actions")
        self._resets = 0
        self._sandbox_config = sandbox_config or SandboxConfig()
        super().__init__(max_turns, command_timeout, max_observation_chars, max_malformed)
        self.task = self._next_task(None)

    @property
    def name(self) -> str:
        """Return the name of the current task."""
        return self.task.name

    def demonstration(self, rng: random.Random, error_rate: float = 0.0) -> Script:
        """Return the script that solves the current task, see `play_script`."""
        return play_script(self.task.demonstrator(), rng, error_rate)

    def sample_random_action(self) -> str:
        """Return a turn with a harmless command."""
        command = self._random_actions.choice(["ls", "cat *", "pwd"])
        return format_tool_call("bash", {"command": command})

    def spawn(self, same_state: bool = False, **kwargs: Any) -> TerminalEnv:
        """Return a new environment of the same task and settings.

        Args:
          same_state: continue from the middle of this episode, with a copy-on-write copy of its
            files.
          **kwargs: settings of the constructor to change.

        Raises:
          SandboxError: a command of the episode is running, or the backend has no snapshots.
        """
        settings: dict[str, Any] = {
            "task": self._fixed_task,
            "family": self._family,
            "seed": self._seed,
            "sandbox_config": self._sandbox_config,
            "max_turns": self._max_turns,
            "command_timeout": self._command_timeout,
            "max_observation_chars": self._max_observation_chars,
            "max_malformed": self._max_malformed,
        }
        copy = TerminalEnv(**{**settings, **kwargs})
        if same_state:
            snapshot = run(self.asnapshot(), CALL_TIMEOUT_SECONDS)
            try:
                run(copy.arestore(snapshot), CALL_TIMEOUT_SECONDS)
            finally:
                run(snapshot.delete(), CALL_TIMEOUT_SECONDS)
        return copy

    async def asnapshot(self) -> TerminalSnapshot:
        """Return a snapshot of the running episode, from which many environments may continue.

        Raises:
          SandboxError: no episode is running, or `Sandbox.snapshot` failed.
        """
        if self._over:
            raise SandboxError(f"there is no running episode of {self.name} to keep; reset first")
        files = await self._sandbox.snapshot()
        counts = (self._turns, self._calls, self._good_calls, self._malformed_in_a_row)
        return TerminalSnapshot(self.task, files, counts)

    async def arestore(self, snapshot: TerminalSnapshot) -> tuple[str, Info]:
        """Start an episode at the point where the snapshot was taken; otherwise like `areset`.

        Raises:
          SandboxError: no sandbox could be started.
        """
        await self.aclose()
        self.task = snapshot.task
        config = dataclasses.replace(self._sandbox_config, label=self.task.name)
        self._sandbox = Sandbox(config, snapshot.files)
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

    # -- Episode
    # ---------------------------------------------------------------------------------------------

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start a fresh sandbox with the task's files and return the instruction.

        Raises:
          SandboxError: no sandbox could be started, or it lacks a program (MissingProgramsError).
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

    # -- Grading
    # ---------------------------------------------------------------------------------------------

    async def _verify(self, info: Info, observation: str = "", cut: str = "") -> StepResult:
        """Run the verifier and end the episode with its reward.

        The agent made the files that the verifier reads and that fill the sandbox's memory, so a
        verifier that does not end, or lacks memory, counts as the agent's failure, not as one of
        the infrastructure.
        """
        verdict = await self._sandbox.verify(self.task.verifier, timeout=VERIFIER_TIMEOUT_SECONDS)
        ending, reward, note = self._judge(verdict)
        info["test_output"] = verdict.stdout + verdict.stderr
        if cut and ending != "infra_verifier":
            ending = cut
        return await self._end(
            ending, info, observation, reward, truncated=ending.startswith("truncated"), note=note
        )

    def _judge(self, verdict: CommandResult) -> tuple[str, float, str]:
        """Return ending, reward and note of a verifier's run."""
        if verdict.timed_out:
            limit = f"{VERIFIER_TIMEOUT_SECONDS:g} s"
            return "failure", 0.0, f"verifier of {self.task.name} was stopped after {limit}"
        try:
            reward = parse_reward(verdict.stdout, self.task.name)
        except VerifierError as error:
            if self.task.runs_agent_code:
                # A program of the agent's that kills its grader must not hide the failure.
                return "failure", 0.0, f"{error}; what the agent wrote ran inside it"
            if "memory" in verdict.limits_hit:
                note = f"{error}; it or what it ran was killed: the sandbox's memory was full"
                return "failure", 0.0, note
            if verdict.exit_code == KILLED:
                note = f"{error}; it was killed, which only the sandbox's processes or limits do"
                return "failure", 0.0, note
            note = f"{error} (exit {verdict.exit_code}, stderr {verdict.stderr[-200:]!r})"
            return "infra_verifier", 0.0, note
        return ("success" if reward == 1.0 else "failure"), reward, ""

    def _next_task(self, seed: int | None) -> Task:
        if self._fixed_task is not None:
            return self._fixed_task
        if seed is None:
            seed = self._draw.randrange(1_000_000) if self._resets else self._seed
        return make_task(self._family, seed)


async def prepare(sandbox: Sandbox, task: Task) -> None:
    """Check that the task's programs are where its verifier looks, and run the task's setup.

    Raises:
      MissingProgramsError: a program is missing.
      SandboxError: the setup failed.
    """
    if not task.programs and not task.setup:
        return
    # One command: each one that is started costs as much as a short setup.
    wanted = " ".join(shlex.quote(program) for program in task.programs)
    check = (
        f'for p in {wanted}; do PATH={VERIFIER_PATH} command -v "$p" > /dev/null'
        f' || missing="$missing $p"; done; [ -z "$missing" ] || {{ echo $missing;'
        f" exit {_MISSING_STATUS}; }}; unset p missing"
    )
    result = await sandbox.execute(f"{check}\nset -e\n{task.setup}", timeout=SETUP_TIMEOUT_SECONDS)
    missing = result.stdout.split()
    if result.exit_code == _MISSING_STATUS and missing and set(missing) <= set(task.programs):
        raise MissingProgramsError(
            f"task {task.name} needs {', '.join(missing)} in {VERIFIER_PATH}, which the sandbox"
            f" lacks; install it or leave out family {task.family!r}"
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
