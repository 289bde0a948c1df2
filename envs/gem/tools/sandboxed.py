"""Tools that run what a model wrote, Python or shell commands, in a ROCK sandbox."""

from __future__ import annotations

from envs.gem.code_blocks import find_blocks
from envs.gem.tool_call import read_turn
from envs.gem.tools.base import BaseTool, ToolResult
from envs.rock import AgentFault, CommandResult, Sandbox, SandboxConfig
from envs.rock.sync import run

CALL_GRACE_SECONDS = 60.0  # to start and stop a sandbox, beyond the program's own time
# the standard library's common names, as gem-llm imports them
PRELUDE = (
    "import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator,"
    " os, random, re, string, sys\n"
    "from collections import Counter, OrderedDict, defaultdict, deque\n"
    "from functools import cache, cmp_to_key, lru_cache, partial, reduce\n"
    "from itertools import accumulate, chain, combinations, count, cycle, groupby, islice,"
    " pairwise, permutations, product, zip_longest\n"
    "from math import ceil, comb, factorial, floor, gcd, inf, isqrt, log, log2, log10, pi, prod,"
    " sqrt\n"
    "from typing import *\n"
    "try:\n"
    "    import numpy as np\n"
    "except ImportError:\n"
    "    pass\n"
)


class BlockTool(BaseTool):
    """A tool that runs the first block of code that a turn says. Subclasses say how (`run_block`).

    Args:
      timeout: seconds for one run.
      sandbox_config: limits of the sandboxes; the defaults of SandboxConfig without one.
    """

    tag = ""  # a block between <tag> and </tag> is run
    languages: tuple[str, ...] = ()  # of the fenced blocks that are run

    def __init__(self, timeout: float, sandbox_config: SandboxConfig | None) -> None:
        super().__init__()
        self.timeout = timeout
        self.sandbox_config = sandbox_config or SandboxConfig()

    def execute_action(self, action: str) -> ToolResult:
        turn = read_turn(action)
        blocks = find_blocks(turn.spoken, self.tag, self.languages)
        if not blocks:
            return False, True, "", action
        first = min(blocks, key=lambda block: block.end)
        try:
            failed, observation = self.run_block(first.content.strip())
        except AgentFault as fault:
            failed = True
            observation = f"The sandbox could not run this: {fault}\n"
        return True, failed, observation, action[: turn.start + first.end]

    def run_block(self, code: str) -> tuple[bool, str]:
        """Run the code of a block; return whether it failed, and the observation."""
        raise NotImplementedError(f"{type(self).__name__} cannot run")


class PythonCodeTool(BlockTool):
    """A tool that runs Python programs, each in a fresh sandbox.

    A program is a `<python>...</python>` or ```python block; it keeps nothing but its output. As in
    gem-llm, a program with an undefined name is run again after imports of common names of the
    standard library.

    Args:
      timeout: seconds for one run.
      sandbox_type: gem-llm's argument; ignored, since every program runs in a ROCK sandbox.
      keep_error_last_line: show only the last line of stderr.
      sandbox_config: limits of the sandbox; the defaults of SandboxConfig without one.
    """

    tool_type = "python_code"
    tag = "python"
    languages = ("python", "py", "python3")

    def __init__(
        self,
        timeout: float = 5,
        sandbox_type: str = "rock",
        keep_error_last_line: bool = False,
        sandbox_config: SandboxConfig | None = None,
    ) -> None:
        super().__init__(timeout, sandbox_config)
        self.sandbox_type = sandbox_type
        self.keep_error_last_line = keep_error_last_line

    def instruction_string(self) -> str:
        return (
            "You can run Python before you answer. Write a complete program, with its imports and"
            " print(), between <python> and </python> or in a ```python block. It runs in a"
            ' sandbox, and its output comes back after "Code execution result: ". Return your final'
            " answer within \\boxed{}."
        )

    def run_block(self, code: str) -> tuple[bool, str]:
        allowed = 2 * self.timeout + CALL_GRACE_SECONDS
        stdout, stderr, succeeded = run(self._run(code), allowed)
        if self.keep_error_last_line:
            stderr = stderr.split("\n")[-1]
        output = f"{stdout}\n{stderr}" if stderr else stdout
        output = output.lstrip(" \n")
        return not succeeded, f"Code execution result: {output}\n"

    async def _run(self, code: str) -> tuple[str, str, bool]:
        if code == "...":  # valid Python, but here a model that copied the instruction
            return "", "SyntaxError: invalid syntax", False
        async with Sandbox(self.sandbox_config) as sandbox:
            result = await self._run_program(sandbox, code)
            if result.exit_code != 0 and "is not defined" in result.stderr:
                result = await self._run_program(sandbox, PRELUDE + code)
        if result.timed_out:
            return "", f"\nExecution timed out after {self.timeout:g} seconds.", False
        return result.stdout, result.stderr.strip(), result.exit_code == 0

    async def _run_program(self, sandbox: Sandbox, code: str) -> CommandResult:
        await sandbox.write_file("program.py", code.encode(errors="replace"))
        return await sandbox.execute("python3 program.py", timeout=self.timeout)


class ShellTool(BlockTool):
    """A tool that runs shell commands in one sandbox for each episode.

    A command is a `<bash>...</bash>` or ```bash block. Files stay until the end of the episode; the
    next one starts in an empty workspace.

    Args:
      timeout: seconds for one command.
      max_output_chars: of an output, shown to the model; the rest is only counted.
      sandbox_config: limits of the sandbox; the defaults of SandboxConfig without one.
    """

    tool_type = "bash"
    tag = "bash"
    languages = ("bash", "sh")

    def __init__(
        self,
        timeout: float = 5,
        max_output_chars: int = 4000,
        sandbox_config: SandboxConfig | None = None,
    ) -> None:
        super().__init__(timeout, sandbox_config)
        self.max_output_chars = max_output_chars
        self._sandbox: Sandbox | None = None

    def instruction_string(self) -> str:
        return (
            "You can run shell commands before you answer. Write them between <bash> and </bash> or"
            " in a ```bash block. Each call starts a new shell in the same workspace, and its"
            ' output comes back after "Command output: ".'
        )

    def run_block(self, code: str) -> tuple[bool, str]:
        result = run(self._run(code), self.timeout + CALL_GRACE_SECONDS)
        output = self._cut((result.stdout + result.stderr).rstrip("\n"))
        ending = ""
        if result.timed_out:
            ending = f"\n[timeout after {self.timeout:g} s]"
        elif result.exit_code:
            ending = f"\n[exit {result.exit_code}]"
        return result.exit_code != 0, f"Command output: {output or '(none)'}{ending}\n"

    def _cut(self, output: str) -> str:
        surplus = len(output) - self.max_output_chars
        if surplus <= 0:
            return output
        return f"{output[: self.max_output_chars]}... ({surplus} more)"

    def spawn(self) -> ShellTool:
        return ShellTool(self.timeout, self.max_output_chars, self.sandbox_config)

    def reset(self) -> None:
        self.close()

    def close(self) -> None:
        sandbox = self._sandbox
        self._sandbox = None
        if sandbox is not None:
            run(sandbox.stop(), CALL_GRACE_SECONDS)

    async def _run(self, command: str) -> CommandResult:
        if self._sandbox is None:
            sandbox = Sandbox(self.sandbox_config)
            await sandbox.start()
            self._sandbox = sandbox
        return await self._sandbox.execute(command, timeout=self.timeout)
