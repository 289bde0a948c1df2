"""A terminal task as a GEM environment over a sandbox.

An action is one turn of the model. A turn with a tool call runs a command in the sandbox and its output is the observation; a turn without
one ends the episode, and the verifier decides. Whatever the turn says, `step` returns: a malformed call is an observation for the model.
"""

from __future__ import annotations

import random
import shlex
import time
from typing import Any

from envs.gem import Env, Info, StepResult, ToolCall, ToolCallError, format_tool_call, parse_tool_calls
from envs.rock import CommandResult, Sandbox, SandboxConfig, SandboxError
from envs.rock.sync import run
from envs.tasks.terminal.reward import VerifierError, parse_reward
from envs.tasks.terminal.task import Task, make_task

MAX_COMMAND_BYTES = 32_768  # Linux refuses a single argument of 128 KiB; a command this long is a mistake
VERIFIER_TIMEOUT_S = 10.0
SETUP_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 60.0  # a synchronous reset, step or close beyond the time its command and verifier may take
BASH_TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command in a shell and get its output. Each call starts a new shell in the workspace.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string", "description": "The command to run."}}, "required": ["command"]},
    },
}


class MissingProgramsError(SandboxError):
    """The sandbox lacks a program that the task's family declares. Says nothing about the policy."""


class TerminalEnv(Env):
    """One task at a time: a Task, a name "family/seed", or a family whose seeds come from `seed` and `reset`.

    reset(seed) plays that seed of the family; reset() plays the constructor's seed first and then seeds drawn from it. An environment made
    from a Task plays only this task, whatever the seed.
    """

    tools = [BASH_TOOL]

    def __init__(
        self, task: Task | str | None = None, sandbox_config: SandboxConfig | None = None, *, family: str | None = None, seed: int = 0,
        max_turns: int = 6, command_timeout: float = 5.0, max_observation_chars: int = 200, max_malformed: int = 3,
    ) -> None:
        if (task is None) == (family is None):
            raise ValueError(f"TerminalEnv got task={task!r} and family={family!r}; give exactly one of them")
        if isinstance(task, str):
            family, seed = _split_name(task)
        self._fixed_task = task if isinstance(task, Task) else None
        self._family, self._seed = family, seed
        self._draw = random.Random(f"{family}/{seed}/next")
        self._resets = 0
        self._sandbox_config = sandbox_config or SandboxConfig()
        self._max_turns, self._command_timeout = max_turns, command_timeout
        self._max_observation_chars, self._max_malformed = max_observation_chars, max_malformed
        self._sandbox: Sandbox | None = None
        self._over = True
        self.task = self._next_task(None)

    # -- the synchronous face ------------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        return run(self.areset(seed), CALL_TIMEOUT_S)

    def step(self, action: str) -> StepResult:
        return run(self.astep(action), CALL_TIMEOUT_S + self._command_timeout + VERIFIER_TIMEOUT_S)

    def close(self) -> None:
        run(self.aclose(), CALL_TIMEOUT_S)

    def sample_random_action(self) -> str:
        return format_tool_call("bash", {"command": self._draw.choice(["ls", "cat *", "pwd"])})

    def spawn(self, same_state: bool = False, **kwargs: Any) -> TerminalEnv:
        """A new environment of the same task and settings. A running episode cannot be copied yet: same_state is refused."""
        if same_state:
            raise NotImplementedError("a running terminal episode cannot be copied; spawn(same_state=False) and reset")
        settings: dict[str, Any] = dict(
            task=self._fixed_task, family=self._family, seed=self._seed, sandbox_config=self._sandbox_config, max_turns=self._max_turns,
            command_timeout=self._command_timeout, max_observation_chars=self._max_observation_chars, max_malformed=self._max_malformed,
        )
        return TerminalEnv(**{**settings, **kwargs})

    # -- the episode ---------------------------------------------------------------------------------------------------------------

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Starts a fresh sandbox with the task's files. Raises SandboxError when there is none to be had."""
        await self.aclose()
        if seed is not None or self._resets:
            self.task = self._next_task(seed)
        self._resets += 1
        self._turns = self._calls = self._good_calls = self._malformed_in_a_row = 0
        self._sandbox = Sandbox(self._sandbox_config)
        try:
            await self._sandbox.start()
            await self._sandbox.upload(self.task.files)
            await prepare(self._sandbox, self.task)
        except BaseException:
            await self.aclose()
            raise
        self._over = False
        return self.task.instruction, {"task": self.task.name, "family": self.task.family, "seed": self.task.seed, "tools": self.tools}

    async def astep(self, action: str) -> StepResult:
        if self._over:
            raise RuntimeError(f"episode of {self.task.name} is over or not begun; call reset()")
        began = time.monotonic()
        self._turns += 1
        info: Info = {"step_counter": self._turns, "parsed_action": action, "tool_type": None, "use_tool": False, "status": "ok", "exit_code": None}
        try:
            result = await self._turn(action, info)
        except SandboxError as error:
            info["status"] = "infra"
            result = await self._end("infra_sandbox", info, note=f"{type(error).__name__}: {error}")
        info.update(seconds=time.monotonic() - began, tool_use_counter=self._calls, tool_success_counter=self._good_calls)
        return result

    async def aclose(self) -> None:
        """Stops the sandbox. Safe to call twice."""
        sandbox, self._sandbox, self._over = self._sandbox, None, True
        if sandbox is not None:
            await sandbox.stop()

    # -- one turn ------------------------------------------------------------------------------------------------------------------

    async def _turn(self, action: str, info: Info) -> StepResult:
        try:
            command = read_command(action)
        except ToolCallError as error:
            return await self._malformed(str(error), info)
        self._malformed_in_a_row = 0
        if command is None:
            return await self._verify(info)
        info.update(parsed_action=command, tool_type="bash", use_tool=True)
        self._calls += 1
        result = await self._sandbox.execute(command, timeout=self._command_timeout)
        info["exit_code"] = result.exit_code
        info["status"] = "timeout" if result.timed_out else "tool_error" if result.exit_code != 0 else "ok"
        self._good_calls += info["status"] == "ok"
        return await self._observe(self._describe(result), info)

    async def _malformed(self, message: str, info: Info) -> StepResult:
        info["status"] = "malformed"
        self._malformed_in_a_row += 1
        if self._malformed_in_a_row >= self._max_malformed:
            return await self._end("malformed", info, note=f"{self._malformed_in_a_row} malformed tool calls in a row; the last: {message}")
        return await self._observe(trim(message, self._max_observation_chars), info)

    async def _observe(self, observation: str, info: Info) -> StepResult:
        if self._turns >= self._max_turns:
            return await self._end("truncated_turns", info, observation, truncated=True)
        return observation, 0.0, False, False, info

    async def _verify(self, info: Info) -> StepResult:
        """The verifier's word. Files that make it wait were made by the agent, so a timeout is a failure, not a fault of the house."""
        verdict = await self._sandbox.verify(self.task.verifier, timeout=VERIFIER_TIMEOUT_S)
        if verdict.timed_out:
            return await self._end("failure", info, note=f"verifier of {self.task.name} was stopped after {VERIFIER_TIMEOUT_S:g} s")
        try:
            reward = parse_reward(verdict.stdout, self.task.name)
        except VerifierError as error:
            if self.task.runs_agent_code:  # a program of the agent's that kills its grader must not hide the failure
                return await self._end("failure", info, note=f"{error}; what the agent wrote ran inside it")
            return await self._end("infra_verifier", info, note=f"{error} (exit {verdict.exit_code}, stderr {verdict.stderr[-200:]!r})")
        return await self._end("success" if reward == 1.0 else "failure", info, reward=reward)

    async def _end(self, ending: str, info: Info, observation: str = "", reward: float = 0.0, truncated: bool = False, note: str = "") -> StepResult:
        info.update(ending=ending, note=note)
        await self.aclose()
        return observation, reward, not truncated, truncated, info

    # -- small helpers -------------------------------------------------------------------------------------------------------------

    def _describe(self, result: CommandResult) -> str:
        """What the model sees of a command: its output, cut to size, and how it ended where that was not well."""
        output = trim((result.stdout + result.stderr).rstrip("\n"), self._max_observation_chars)
        if result.timed_out:
            return f"{output}\n[timeout]".lstrip("\n")
        if result.exit_code != 0:
            return f"{output}\n[exit {result.exit_code}]".lstrip("\n")
        return output or "(no output)"

    def _next_task(self, seed: int | None) -> Task:
        if self._fixed_task is not None:
            return self._fixed_task
        if seed is None:
            seed = self._draw.randrange(1_000_000) if self._resets else self._seed
        return make_task(self._family, seed)


async def prepare(sandbox: Sandbox, task: Task) -> None:
    """Sees that the task's programs are there, and runs its setup. MissingProgramsError or SandboxError where that fails."""
    if not task.programs and not task.setup:
        return
    wanted = " ".join(shlex.quote(program) for program in task.programs)
    result = await sandbox.execute(f"for p in {wanted}; do command -v $p > /dev/null || echo $p; done", timeout=SETUP_TIMEOUT_S)
    if missing := result.stdout.split():
        raise MissingProgramsError(f"task {task.name} needs {', '.join(missing)}, which the sandbox lacks; install it or leave out family {task.family!r}")
    if task.setup:
        result = await sandbox.execute(f"set -e\n{task.setup}", timeout=SETUP_TIMEOUT_S)
        if result.exit_code != 0:
            raise SandboxError(f"setup of task {task.name} ended with exit {result.exit_code}: {result.stderr[-300:]!r}")


def read_command(action: str) -> str | None:
    """The command of the turn's one tool call, None for a turn without a call. Raises ToolCallError with a message for the model."""
    calls: list[ToolCall] = parse_tool_calls(action)
    if not calls:
        return None
    if len(calls) > 1:
        raise ToolCallError(f"{len(calls)} tool calls in one turn; make one")
    call = calls[0]
    if call.name != "bash":
        raise ToolCallError(f"unknown tool {call.name[:20]!r}; use bash")
    command = call.arguments.get("command")
    if not isinstance(command, str) or set(call.arguments) != {"command"}:
        raise ToolCallError('bash takes one argument, "command", a string')
    try:
        size = len(command.encode())
    except UnicodeEncodeError as error:
        raise ToolCallError("command is not valid Unicode") from error
    if size > MAX_COMMAND_BYTES or "\0" in command:
        raise ToolCallError(f"command has a NUL or is longer than {MAX_COMMAND_BYTES} bytes")
    return command


def trim(text: str, limit: int) -> str:
    """The first `limit` characters, and how many more there were."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit} more)"


def _split_name(name: str) -> tuple[str, int]:
    family, _, seed = name.partition("/")
    if not seed.isdecimal():
        raise ValueError(f"task {name!r} is not 'family/seed', for example 'count/17'")
    return family, int(seed)
