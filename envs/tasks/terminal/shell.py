"""The episode loop that all environments over a shell in a sandbox share.

An action is one turn of the model. A turn with a tool call runs a command in the sandbox, and its
output is the observation. A turn without a call hands in the work, and the subclass grades it. It
also grades what is there when a limit of turns, tokens or time ends the episode.
`step` accepts any text: a malformed call becomes an observation for the model.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, ClassVar

from envs.gem import (
    Env,
    Info,
    StepResult,
    ToolCall,
    ToolCallError,
    format_tool_call,
    parse_tool_calls,
)
from envs.rock import AgentFault, CommandResult, Job, Sandbox, SandboxError
from envs.rock.sync import run

# Linux refuses a single argument of 128 KiB; a command this long is a mistake.
MAX_COMMAND_BYTES = 32_768
# For a synchronous reset, step or close, beyond the time that its command and verifier may take.
CALL_TIMEOUT_SECONDS = 60.0
SYSTEM = (
    "You solve a task in a Linux shell. Call the tool `bash` to look and to act: each call starts a"
    " new shell in the working directory. When the work is done, answer without a tool call; then"
    " it is graded."
)
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
    """An environment that plays one episode at a time in one sandbox.

    A subclass implements `areset`, which sets `_sandbox` and calls `_begin`, and `_verify`, which
    ends the episode.
    """

    system = SYSTEM
    tools: ClassVar[list[dict[str, Any]]] = [BASH_TOOL]
    grading_seconds = 0.0  # time limit of `_verify`
    is_grading = False  # whether `_verify` runs: that is not the agent's time

    def __init__(
        self, max_turns: int, command_timeout: float, max_observation_chars: int, max_malformed: int
    ) -> None:
        self._max_turns = max_turns
        self._command_timeout = command_timeout
        self._max_observation_chars = max_observation_chars
        self._max_malformed = max_malformed
        self._sandbox: Sandbox | None = None
        self._over = True
        self._end_result: StepResult | None = None  # of an episode that has ended
        self._seconds_worked = 0.0  # of the agent's commands
        # Called while the sandbox still runs, before the work of a turn is graded or thrown away.
        self.inspect: Callable[[], Awaitable[None]] | None = None
        self._is_inspected = False  # since the last turn began

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Return the task's name, for messages."""

    @abc.abstractmethod
    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start a fresh sandbox and return the instruction.

        Raises:
          SandboxError: no sandbox could be started.
        """

    @abc.abstractmethod
    async def _verify(self, info: Info, observation: str = "", cut: str = "") -> StepResult:
        """Grade the work that is there.

        Args:
          info: of the turn.
          observation: of the turn, where a limit ended the episode with it.
          cut: the ending where a limit ended the episode; "" where the model handed in.
        """

    def _begin(self) -> None:
        self._end_result = None
        self._seconds_worked = 0.0
        self._turns = 0
        self._calls = 0
        self._good_calls = 0
        self._malformed_in_a_row = 0
        self._over = False

    async def _execute(self, command: str) -> CommandResult:
        return await self._sandbox.execute(command, timeout=self._command_timeout)

    async def aspawn(self, command: str, env: Mapping[str, str], timeout: float) -> Job:
        """Start a command of the agent that is not a turn, where a turn's command would run.

        Args:
          command: may ask for a model at a door of the sandbox, and act on its own.
          env: variables in addition to the task's.
          timeout: seconds until it is killed.

        Raises:
          RuntimeError: the episode is over or was not begun.
        """
        if self._over:
            raise RuntimeError(f"episode of {self.name} is over or not begun; call reset()")
        return await self._spawn(command, env, timeout)

    async def _spawn(self, command: str, env: Mapping[str, str], timeout: float) -> Job:
        return await self._sandbox.spawn(command, timeout=timeout, env=env)

    async def aupload(self, folder: str, place: str) -> None:
        """Copy a folder of this machine to a place in the workspace of the running episode."""
        await self._sandbox.upload(folder, place)

    async def awrite(self, path: str, text: str) -> None:
        """Write a file of the workspace of the running episode."""
        await self._sandbox.write_file(path, text)

    @property
    def workspace(self) -> str:
        """Path of the workspace in the running episode's sandbox."""
        return self._sandbox.workspace

    @property
    def sandbox(self) -> Sandbox:
        """The running episode's sandbox.

        Raises:
          SandboxError: no episode is running.
        """
        if self._sandbox is None:
            raise SandboxError(f"there is no running episode of {self.name}; call reset()")
        return self._sandbox

    def folder(self, kind: str) -> str:
        """Return a folder of the running episode as a path in its workspace.

        Args:
          kind: "work", where commands begin, or "home", which they call ~.
        """
        return "."

    def extend_limits(self, turns: int, observation_chars: int) -> None:
        """Allow more turns, and observations of at least so many characters."""
        self._max_turns += turns
        self._max_observation_chars = max(self._max_observation_chars, observation_chars)

    # -- Synchronous interface
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start an episode; the synchronous form of `areset`."""
        return run(self.areset(seed), CALL_TIMEOUT_SECONDS)

    def step(self, action: str) -> StepResult:
        """Play one turn; the synchronous form of `astep`."""
        limit = CALL_TIMEOUT_SECONDS + self._command_timeout + self.grading_seconds
        return run(self.astep(action), limit)

    def close(self) -> None:
        """Stop the sandbox; the synchronous form of `aclose`."""
        run(self.aclose(), CALL_TIMEOUT_SECONDS)

    def sample_random_action(self) -> str:
        """Return a turn that lists the workspace."""
        return format_tool_call("bash", {"command": "ls"})

    # -- Episode
    # ---------------------------------------------------------------------------------------------

    async def astep(self, action: str) -> StepResult:
        """Play one turn of the model; see `envs.gem.Env.step`.

        Raises:
          RuntimeError: the episode is over, or was not begun by a reset.
        """
        if self._over:
            raise RuntimeError(f"episode of {self.name} is over or not begun; call reset()")
        self._turns += 1
        self._is_inspected = False
        info = self._new_info(action)
        return await self._finish_turn(self._turn(action, info), info)

    async def ajudge(self, ending: str) -> StepResult:
        """Grade the work as it stands; see `envs.gem.Env.ajudge`.

        Raises:
          RuntimeError: the episode was not begun by a reset.
        """
        if self._end_result is not None:  # the turn that was cut off had ended the episode
            return self._end_result
        if self._over:
            raise RuntimeError(f"episode of {self.name} is over or not begun; call reset()")
        info = self._new_info("")
        return await self._finish_turn(self._grade(info, cut=ending), info)

    def _new_info(self, action: str) -> Info:
        return {
            "step_counter": self._turns,
            "parsed_action": action,
            "tool_type": None,
            "use_tool": False,
            "status": "ok",
            "exit_code": None,
            "network_denials": 0,
        }

    async def _finish_turn(self, turn: Coroutine[Any, Any, StepResult], info: Info) -> StepResult:
        """Return a turn's result; where the sandbox failed, it ends the episode."""
        began = time.monotonic()
        try:
            result = await turn
        except AgentFault as fault:
            info["status"] = "tool_error"
            result = await self._end("failure", info, note=f"{type(fault).__name__}: {fault}")
        except SandboxError as error:
            info["status"] = "infra"
            result = await self._end("infra_sandbox", info, note=f"{type(error).__name__}: {error}")
        info.update(
            seconds=time.monotonic() - began,
            tool_use_counter=self._calls,
            tool_success_counter=self._good_calls,
        )
        return result

    async def _grade(self, info: Info, observation: str = "", cut: str = "") -> StepResult:
        self.is_grading = True
        try:
            await self._inspect()
            return await self._verify(info, observation, cut)
        finally:
            self.is_grading = False

    async def _inspect(self) -> None:
        if self.inspect is not None and not self._is_inspected:
            self._is_inspected = True
            await self.inspect()

    async def aclose(self) -> None:
        """Stop the sandbox. Calling it twice is safe."""
        sandbox = self._sandbox
        self._sandbox = None
        self._over = True
        if sandbox is not None:
            await sandbox.stop()

    # -- One turn
    # ---------------------------------------------------------------------------------------------

    async def _turn(self, action: str, info: Info) -> StepResult:
        try:
            command = read_command(action)
        except ToolCallError as error:
            return await self._malformed(str(error), info)
        self._malformed_in_a_row = 0
        if command is None:
            return await self._grade(info)
        info.update(
            parsed_action=command,
            tool_type="bash",
            tool_arguments={"command": command},
            use_tool=True,
        )
        self._calls += 1
        began = time.monotonic()
        result = await self._execute(command)
        self._seconds_worked += time.monotonic() - began
        info["exit_code"] = result.exit_code
        info["network_denials"] = result.network_denials
        # A command that ends with another exit status than 0 has run: the call is no error.
        if result.timed_out:
            info["status"] = "timeout"
        elif result.exit_code == 0:
            self._good_calls += 1
        return await self._observe(self._describe(result), info)

    async def _malformed(self, message: str, info: Info) -> StepResult:
        info["status"] = "malformed"
        self._malformed_in_a_row += 1
        if self._malformed_in_a_row >= self._max_malformed:
            note = f"{self._malformed_in_a_row} malformed tool calls in a row; the last: {message}"
            return await self._end("malformed", info, note=note)
        return await self._observe(trim(message, self._max_observation_chars), info)

    async def _observe(self, observation: str, info: Info) -> StepResult:
        if self._turns >= self._max_turns:  # what is there counts although it was not handed in
            return await self._grade(info, observation, cut="truncated_turns")
        return observation, 0.0, False, False, info

    async def _end(
        self,
        ending: str,
        info: Info,
        observation: str = "",
        reward: float = 0.0,
        truncated: bool = False,
        note: str = "",
    ) -> StepResult:
        if not ending.startswith("infra"):
            await self._inspect()
        info.update(ending=ending, note=note)
        self._end_result = (observation, reward, not truncated, truncated, info)
        try:
            await self.aclose()
        except SandboxError as error:
            # The episode has its result. If this changed it, an agent whose sandbox is slow to end
            # would have its failure masked.
            logging.warning("the sandbox of %s was not closed: %s", self.name, error)
        return self._end_result

    # -- Helpers
    # ---------------------------------------------------------------------------------------------

    def _describe(self, result: CommandResult) -> str:
        """Format a command's result for the model: trimmed output, and how it failed if it did."""
        output = (result.stdout + result.stderr).rstrip("\n")
        output = trim(output, self._max_observation_chars, beyond=sum(result.cut))
        if result.timed_out:
            return f"{output}\n[timeout]".lstrip("\n")
        if result.exit_code != 0:
            return f"{output}\n[exit {result.exit_code}]".lstrip("\n")
        return output or "(no output)"


def read_command(action: str) -> str | None:
    """Return the command of a turn's one tool call, or None for a turn without a call.

    Raises:
      ToolCallError: the call is malformed. The message is written for the model.
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
    """Return the first `limit` characters of a text, and a note of how many more there were.

    Args:
      text: the text.
      limit: the number of characters to keep.
      beyond: the number of bytes that had been cut off before.
    """
    more = max(0, len(text) - limit) + beyond
    return f"{text[:limit]}... ({more} more)" if more else text
