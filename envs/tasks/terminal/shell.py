"""What every environment over a shell in a sandbox shares: turns, tool calls, observations,
endings.

An action is one turn of the model. A turn with a tool call runs a command in the sandbox and its
output is the observation; a turn without one hands in the work, and the subclass has it graded.
Whatever the turn says, `step` returns: a malformed call is an observation for the model.
"""

from __future__ import annotations

import abc
import time

from envs.gem import (
    Env,
    Info,
    StepResult,
    ToolCall,
    ToolCallError,
    format_tool_call,
    parse_tool_calls,
)
from envs.rock import CommandResult, Sandbox, SandboxError
from envs.rock.sync import run

# Linux refuses a single argument of 128 KiB; a command this long is a mistake
MAX_COMMAND_BYTES = 32_768
# a synchronous reset, step or close beyond the time its command and verifier may take
CALL_TIMEOUT_S = 60.0
# Where commands may not read /etc at all (the landlock tier), git and node take that for an error
# unless they are told not to look.
WITHOUT_ETC = {"GIT_CONFIG_NOSYSTEM": "1", "OPENSSL_CONF": "/dev/null"}
BASH_TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": (
            "Run a command in a shell and get its output. Each call starts a new shell in the"
            " workspace."
        ),
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string", "description": "The command to run."}},
            "required": ["command"],
        },
    },
}


class ShellEnv(Env):
    """One episode at a time in one sandbox.

    A subclass gives `areset`, which sets `_sandbox` and calls `_begin`, and `_verify`, which ends
    it.
    """

    tools = [BASH_TOOL]
    grading_seconds = 0.0  # that `_verify` may take

    def __init__(
        self, max_turns: int, command_timeout: float, max_observation_chars: int, max_malformed: int
    ) -> None:
        self._max_turns, self._command_timeout = max_turns, command_timeout
        self._max_observation_chars, self._max_malformed = max_observation_chars, max_malformed
        self._sandbox: Sandbox | None = None
        self._over = True

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Of the task, for messages."""

    @abc.abstractmethod
    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Starts a fresh sandbox and gives the instruction.

        Raises SandboxError when there is none to be had.
        """

    @abc.abstractmethod
    async def _verify(self, info: Info) -> StepResult:
        """The model handed in its work."""

    def _begin(self) -> None:
        self._turns = self._calls = self._good_calls = self._malformed_in_a_row = 0
        self._over = False

    async def _execute(self, command: str) -> CommandResult:
        return await self._sandbox.execute(
            command, timeout=self._command_timeout, env=tier_environment(self._sandbox)
        )

    # -- the synchronous face
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        return run(self.areset(seed), CALL_TIMEOUT_S)

    def step(self, action: str) -> StepResult:
        return run(
            self.astep(action), CALL_TIMEOUT_S + self._command_timeout + self.grading_seconds
        )

    def close(self) -> None:
        run(self.aclose(), CALL_TIMEOUT_S)

    def sample_random_action(self) -> str:
        return format_tool_call("bash", {"command": "ls"})

    # -- the episode
    # ---------------------------------------------------------------------------------------------

    async def astep(self, action: str) -> StepResult:
        if self._over:
            raise RuntimeError(f"episode of {self.name} is over or not begun; call reset()")
        began = time.monotonic()
        self._turns += 1
        info: Info = {
            "step_counter": self._turns,
            "parsed_action": action,
            "tool_type": None,
            "use_tool": False,
            "status": "ok",
            "exit_code": None,
            "network_denials": 0,
        }
        try:
            result = await self._turn(action, info)
        except SandboxError as error:
            info["status"] = "infra"
            result = await self._end("infra_sandbox", info, note=f"{type(error).__name__}: {error}")
        info.update(
            seconds=time.monotonic() - began,
            tool_use_counter=self._calls,
            tool_success_counter=self._good_calls,
        )
        return result

    async def aclose(self) -> None:
        """Stops the sandbox. Safe to call twice."""
        sandbox, self._sandbox, self._over = self._sandbox, None, True
        if sandbox is not None:
            await sandbox.stop()

    # -- one turn
    # ---------------------------------------------------------------------------------------------

    async def _turn(self, action: str, info: Info) -> StepResult:
        try:
            command = read_command(action)
        except ToolCallError as error:
            return await self._malformed(str(error), info)
        self._malformed_in_a_row = 0
        if command is None:
            return await self._verify(info)
        info.update(
            parsed_action=command,
            tool_type="bash",
            tool_arguments={"command": command},
            use_tool=True,
        )
        self._calls += 1
        result = await self._execute(command)
        info["exit_code"], info["network_denials"] = result.exit_code, result.network_denials
        info["status"] = (
            "timeout" if result.timed_out else "tool_error" if result.exit_code != 0 else "ok"
        )
        self._good_calls += info["status"] == "ok"
        return await self._observe(self._describe(result), info)

    async def _malformed(self, message: str, info: Info) -> StepResult:
        info["status"] = "malformed"
        self._malformed_in_a_row += 1
        if self._malformed_in_a_row >= self._max_malformed:
            return await self._end(
                "malformed",
                info,
                note=(
                    f"{self._malformed_in_a_row} malformed tool calls in a row; the last: {message}"
                ),
            )
        return await self._observe(trim(message, self._max_observation_chars), info)

    async def _observe(self, observation: str, info: Info) -> StepResult:
        if self._turns >= self._max_turns:
            return await self._out_of_turns(observation, info)
        return observation, 0.0, False, False, info

    async def _out_of_turns(self, observation: str, info: Info) -> StepResult:
        return await self._end("truncated_turns", info, observation, truncated=True)

    async def _end(
        self,
        ending: str,
        info: Info,
        observation: str = "",
        reward: float = 0.0,
        truncated: bool = False,
        note: str = "",
    ) -> StepResult:
        info.update(ending=ending, note=note)
        await self.aclose()
        return observation, reward, not truncated, truncated, info

    # -- small helpers
    # ---------------------------------------------------------------------------------------------

    def _describe(self, result: CommandResult) -> str:
        """What the model sees of a command: its output, cut to size, and how it ended where that
        was not well.
        """
        output = trim(
            (result.stdout + result.stderr).rstrip("\n"),
            self._max_observation_chars,
            sum(result.cut),
        )
        if result.timed_out:
            return f"{output}\n[timeout]".lstrip("\n")
        if result.exit_code != 0:
            return f"{output}\n[exit {result.exit_code}]".lstrip("\n")
        return output or "(no output)"


def tier_environment(sandbox: Sandbox) -> dict[str, str]:
    """Variables that commands need in this sandbox's tier."""
    return WITHOUT_ETC if sandbox.tier == "landlock" else {}


def read_command(action: str) -> str | None:
    """The command of the turn's one tool call, None for a turn without a call.

    Raises ToolCallError with a message for the model.
    """
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


def trim(text: str, limit: int, beyond: int = 0) -> str:
    """The first `limit` characters, and how many more there were. beyond: how many bytes were cut
    off already.
    """
    more = max(0, len(text) - limit) + beyond
    return f"{text[:limit]}... ({more} more)" if more else text
