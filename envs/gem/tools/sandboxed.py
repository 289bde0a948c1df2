"""Tools that run what a model wrote: Python and shell, in a ROCK sandbox, never in this process."""

from __future__ import annotations

from envs.gem.tools.base import BaseTool, ToolResult
from envs.rock import CommandResult, Sandbox, SandboxConfig
from envs.rock.sync import run

CALL_GRACE_S = 60.0  # for starting and stopping the sandbox, beyond the program's own time
PRELUDE = """\
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, os, random, re, string, sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, partial, reduce
from itertools import accumulate, chain, combinations, count, cycle, groupby, islice, pairwise, permutations, product, zip_longest
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, log, log2, log10, pi, prod, sqrt
from typing import *
try:
    import numpy as np
except ImportError:
    pass
"""


def first_block(action: str, fences: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """The content of the (opening, closing) block that ends first, and the action up to its end;
    None where none is complete.

    Takes linear time.
    """
    found: tuple[int, int, int] | None = None
    for opening, closing in fences:
        start = action.find(opening)
        end = action.find(closing, start + len(opening)) if start >= 0 else -1
        if end >= 0 and (found is None or end + len(closing) < found[2]):
            found = (start + len(opening), end, end + len(closing))
    return (action[found[0] : found[1]].strip(), action[: found[2]]) if found else None


class PythonCodeTool(BaseTool):
    """Runs the first `<python>...</python>` or ```python block of a turn in a fresh sandbox, as a
    program with nothing but its output.

    A name that is not defined gets the program a second run after imports of the standard library's
    usual names, as in gem.
    """

    tool_type = "python_code"
    _blocks = (("<python>", "</python>"), ("```python", "```"), ("```\npython", "```"))

    def __init__(
        self,
        timeout: float = 5,
        sandbox_type: str = "rock",
        keep_error_last_line: bool = False,
        sandbox_config: SandboxConfig = SandboxConfig(),
    ) -> None:
        """timeout: seconds for a run. sandbox_type: gem's argument, accepted and not used: every
        program runs in a ROCK sandbox.
        """
        super().__init__()
        self.timeout, self.sandbox_type, self.keep_error_last_line, self.sandbox_config = (
            timeout,
            sandbox_type,
            keep_error_last_line,
            sandbox_config,
        )

    def instruction_string(self) -> str:
        return (
            "You can run Python before you answer. Write a complete program, with its imports and"
            " print(), between <python> and </python> or in a ```python block. It runs in a"
            ' sandbox, and its output comes back after "Code execution result: ". Return your final'
            " answer within \\boxed{}."
        )

    def execute_action(self, action: str) -> ToolResult:
        block = first_block(action, self._blocks)
        if block is None:
            return False, True, "", action
        code, parsed_action = block
        stdout, stderr, succeeded = run(self._run(code), 2 * self.timeout + CALL_GRACE_S)
        if stderr and self.keep_error_last_line:
            stderr = stderr.split("\n")[-1]
        output = (f"{stdout}\n{stderr}" if stderr else stdout).lstrip(" \n")
        return True, not succeeded, f"Code execution result: {output}\n", parsed_action

    async def _run(self, code: str) -> tuple[str, str, bool]:
        if code == "...":  # an ellipsis is a valid program, and a model that copied the instruction
            return "", "SyntaxError: invalid syntax", False
        async with Sandbox(self.sandbox_config) as sandbox:
            result = await self._program(sandbox, code)
            if result.exit_code != 0 and "is not defined" in result.stderr:
                result = await self._program(sandbox, PRELUDE + code)
        if result.timed_out:
            return "", f"\nExecution timed out after {self.timeout:g} seconds.", False
        return result.stdout, result.stderr.strip(), result.exit_code == 0

    async def _program(self, sandbox: Sandbox, code: str) -> CommandResult:
        await sandbox.write_file("program.py", code.encode(errors="replace"))
        return await sandbox.execute("python3 program.py", timeout=self.timeout)


class ShellTool(BaseTool):
    """Runs the first `<bash>...</bash>` or ```bash block of a turn.

    Files stay for the episode; the next one starts in an empty workspace.
    """

    tool_type = "bash"
    _blocks = (("<bash>", "</bash>"), ("```bash\n", "```"), ("```sh\n", "```"))

    def __init__(
        self,
        timeout: float = 5,
        max_output_chars: int = 4000,
        sandbox_config: SandboxConfig = SandboxConfig(),
    ) -> None:
        """timeout: seconds for a command. max_output_chars: what the model sees of an output; the
        rest is counted.
        """
        super().__init__()
        self.timeout, self.max_output_chars, self.sandbox_config = (
            timeout,
            max_output_chars,
            sandbox_config,
        )
        self._sandbox: Sandbox | None = None

    def instruction_string(self) -> str:
        return (
            "You can run shell commands before you answer. Write them between <bash> and </bash> or"
            " in a ```bash block. Each call starts a new shell in the same workspace, and its"
            ' output comes back after "Command output: ".'
        )

    def execute_action(self, action: str) -> ToolResult:
        block = first_block(action, self._blocks)
        if block is None:
            return False, True, "", action
        command, parsed_action = block
        result = run(self._run(command), self.timeout + CALL_GRACE_S)
        output = (result.stdout + result.stderr).rstrip("\n")
        if len(output) > self.max_output_chars:
            output = (
                f"{output[: self.max_output_chars]}... ({len(output) - self.max_output_chars} more)"
            )
        ending = (
            f"\n[timeout after {self.timeout:g} s]"
            if result.timed_out
            else f"\n[exit {result.exit_code}]"
            if result.exit_code
            else ""
        )
        return (
            True,
            result.exit_code != 0,
            f"Command output: {output or '(none)'}{ending}\n",
            parsed_action,
        )

    def spawn(self) -> ShellTool:
        return ShellTool(self.timeout, self.max_output_chars, self.sandbox_config)

    def reset(self) -> None:
        self.close()

    def close(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            run(sandbox.stop(), CALL_GRACE_S)

    async def _run(self, command: str) -> CommandResult:
        if self._sandbox is None:
            sandbox = Sandbox(self.sandbox_config)
            await sandbox.start()
            self._sandbox = sandbox
        return await self._sandbox.execute(command, timeout=self.timeout)
