"""Programming problems of one turn: a function to write, hidden inputs, a real sandbox.

Nothing that decides the reward is inside the sandbox. The submitted code gets inputs and returns
outputs; the expected results and the comparison stay in this process. An output counts only for its
plain JSON value, so sys.exit(0), a replaced ==, objects that equal everything or a forged report
have no effect.
"""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from envs.gem import StepResult, read_turn
from envs.gem.code_blocks import PYTHON, fenced_blocks
from envs.problems.base import ProblemEnv
from envs.problems.code_families import FAMILIES
from envs.rock import AgentFault, Sandbox, SandboxConfig, SandboxError
from envs.rock.sync import run

TIMEOUT_SECONDS = 5.0  # for the submitted code on all inputs together
CALL_GRACE_SECONDS = 60.0  # for starting and stopping the sandbox
HIDDEN = 20  # inputs that grade
SHOWN = 2  # inputs in the problem's text
# Different results among the hidden inputs, so that no constant is right for many of them.
MIN_DISTINCT_RESULTS = 5
MAX_DRAWS = 200
MAX_CODE_BYTES = 100_000
NO_SUCH_PROGRAM = 127  # a shell's exit code, and one that the code itself may choose
# Runs in the sandbox in the process of the submitted code. It reports results and judges nothing.
# The code's own output goes to stderr.
RUNNER = """\
import json, os, sys
report = os.dup(1)
os.dup2(2, 1)
name, inputs = json.load(open("inputs.json"))
space = {"__name__": "solution"}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), space)
outputs = []
for arguments in inputs:
    try:
        outputs.append(json.dumps({"value": space[name](*arguments)}))
    except Exception as error:
        outputs.append(json.dumps({"error": type(error).__name__ + ": " + str(error)[:200]}))
sys.stderr.flush()
os.write(report, ("\\n".join(outputs) + "\\n").encode())
os._exit(0)
"""
# Submissions that try to earn the reward without solving the problem.
_LOOK_UP_EXAMPLES = """\
import json
def {name}(*arguments):
    return {{{known}}}.get(json.dumps(list(arguments)))
"""
_EQUAL_TO_ALL = """\
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__

import builtins, json
json.dumps = lambda *a, **k: 'true'
def {name}({parameters}):
    return Equal()
"""
_FORGE = """\
import os, pathlib
for place in ('reward.txt', '/logs/verifier/reward.txt', 'result.json'):
    try:
        pathlib.Path(place).write_text('1')
    except OSError:
        pass
for fd in (1, 2, 3, 4, 5):
    try:
        os.write(fd, b'{"value": true, "reward": 1, "passed": true}\\n' * 20)
    except OSError:
        pass
os._exit(0)
"""


class CodeEnv(ProblemEnv):
    """A Python function to write in a ```python block; see ProblemEnv.

    A run beyond its time ends as `timeout`, a sandbox without python3 as `infra_verifier`, and a
    failure of the sandbox as `infra_sandbox`, except where the code can bring it about: that is a
    `failure`.
    """

    subject = "code"
    families = tuple(FAMILIES)
    system = (
        "Write the Python function that is asked for, complete with its imports, in one ```python"
        " block. Call no tool."
    )

    def __init__(
        self,
        family: str = "all",
        level: str = "medium",
        seed: int = 0,
        sandbox_config: SandboxConfig | None = None,
    ) -> None:
        super().__init__(family, level, seed)
        self.sandbox_config = sandbox_config or SandboxConfig()

    def step(self, action: str) -> StepResult:
        """Run and grade the code; the synchronous form of `astep`."""
        return run(self.astep(action), TIMEOUT_SECONDS + CALL_GRACE_SECONDS)

    async def astep(self, action: str) -> StepResult:
        """Run the code in a sandbox and grade its outputs; see `envs.gem.Env.step`."""
        self._take_turn()
        code = read_code(action)
        if code is None:
            return self._graded(action, "malformed", "no ```python block")
        if len(code.encode(errors="replace")) > MAX_CODE_BYTES or "\0" in code:
            return self._graded(
                action, "malformed", f"the code has a NUL or more than {MAX_CODE_BYTES} bytes"
            )
        try:
            outputs, ending, note = await self._outputs(code)
        except AgentFault as fault:
            return self._graded(action, "failure", f"{type(fault).__name__}: {fault}")
        except SandboxError as error:
            return self._graded(action, "infra_sandbox", f"{type(error).__name__}: {error}")
        if ending:
            return self._graded(action, ending, note)
        wrong = []
        for number, (ours, truth) in enumerate(zip(outputs, self.truths, strict=True)):
            if not same(ours, truth):
                wrong.append(number)
        if not wrong:
            return self._graded(action, "success")
        note = (
            f"{len(wrong)} of {len(self.truths)} hidden inputs give another result; on the first it"
            f" gave {str(outputs[wrong[0]])[:200]}"
        )
        return self._graded(action, "failure", note)

    def demonstrator_action(self) -> str | None:
        """Return the reference solution as a turn."""
        return f"```python\n{self.drawn.source}```"

    def cheats(self) -> dict[str, list[str]]:
        """Return submissions that must earn nothing, by name of the trick."""
        name = self.drawn.name
        parameters = self.drawn.parameters
        known = ", ".join(f"{json.dumps(one)!r}: {truth!r}" for one, truth in self.shown)
        tricks = {
            "examples": _LOOK_UP_EXAMPLES.format(name=name, known=known),
            "equal to all": _EQUAL_TO_ALL.format(name=name, parameters=parameters),
            "forge": _FORGE,
            "exit": "import sys\nsys.exit(0)\n",
        }
        return {trick: [f"```python\n{code}```"] for trick, code in tricks.items()}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "sandbox_config": self.sandbox_config}

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        for _ in range(MAX_DRAWS):
            self.drawn = FAMILIES[family](rng, size)
            inputs = self._draw_inputs(rng)
            truths = self._results(inputs)
            distinct = set(map(json.dumps, truths[SHOWN:]))
            if len(inputs) == HIDDEN + SHOWN and len(distinct) >= MIN_DISTINCT_RESULTS:
                break
        else:
            raise RuntimeError(
                f"family {family} at size {size} gave no inputs with {MIN_DISTINCT_RESULTS}"
                f" different results in {MAX_DRAWS} draws"
            )
        self.shown = list(zip(inputs, truths, strict=True))[:SHOWN]
        self.inputs = inputs[SHOWN:]
        self.truths = truths[SHOWN:]
        examples = []
        for arguments, truth in self.shown:
            call = f"{self.drawn.name}({', '.join(map(repr, arguments))})"
            examples.append(f"{call} == {truth!r}")
        shown = "\n".join(examples)
        return (
            f"Write a Python function `{self.drawn.name}({self.drawn.parameters})`."
            f" {self.drawn.statement}\nExamples:\n{shown}\nAnswer with one ```python block. It"
            f" is tested on other inputs and has {TIMEOUT_SECONDS:g} seconds."
        )

    def _draw_inputs(self, rng: random.Random) -> list[list[Any]]:
        """Draw the arguments of HIDDEN + SHOWN calls, or of fewer where too many are equal."""
        different = {}
        for _ in range(5 * (HIDDEN + SHOWN)):
            arguments = self.drawn.draw_input(rng)
            different[json.dumps(arguments)] = arguments
        return list(different.values())[: HIDDEN + SHOWN]

    def _results(self, inputs: list[list[Any]]) -> list[Any]:
        """Run the reference solution, which is our own text, in this process."""
        space: dict[str, Any] = {}
        exec(compile(self.drawn.source, self.drawn.name, "exec"), space)
        function = space[self.drawn.name]
        return [function(*json.loads(json.dumps(arguments))) for arguments in inputs]

    async def _outputs(self, code: str) -> tuple[list[Any], str, str]:
        """Run the code on the hidden inputs.

        Returns:
          (outputs, "", ""), one output for each input, or ([], ending, note) where the run gave no
            such list.
        """
        config = dataclasses.replace(self.sandbox_config, label=self.task.name)
        async with Sandbox(config) as sandbox:
            files = {
                "solution.py": code.encode(errors="replace"),
                "runner.py": RUNNER.encode(),
                "inputs.json": json.dumps([self.drawn.name, self.inputs]).encode(),
            }
            await sandbox.write_files(files)
            result = await sandbox.execute("exec python3 -I runner.py", timeout=TIMEOUT_SECONDS)
        if result.timed_out:
            return [], "timeout", f"the code did not end within {TIMEOUT_SECONDS:g} s"
        if result.exit_code == NO_SUCH_PROGRAM and await self._lacks_python(config):
            note = "the tests need python3, which the sandbox lacks; install it, or name an image"
            return [], "infra_verifier", note
        try:
            outputs = [json.loads(line) for line in result.stdout.splitlines()]
        except (ValueError, RecursionError):
            return [], "failure", "what the code reports is not JSON"
        if len(outputs) != len(self.truths) or not all(isinstance(one, dict) for one in outputs):
            note = (
                f"exit {result.exit_code}, {len(outputs)} results instead of {len(self.truths)}:"
                f" {result.stderr[-200:]}"
            )
            return [], "failure", note
        return outputs, "", ""

    async def _lacks_python(self, config: SandboxConfig) -> bool:
        """Ask a sandbox in which no submitted code ran."""
        async with Sandbox(config) as sandbox:
            found = await sandbox.execute("command -v python3", timeout=TIMEOUT_SECONDS)
        return found.exit_code != 0


def same(output: dict[str, Any], truth: Any) -> bool:
    """Return whether a reported output is the value, types included.

    True is not 1, and 1.0 is not 1; a tuple counts as a list.
    """
    if "error" in output or "value" not in output:
        return False
    try:
        return json.dumps(output["value"]) == json.dumps(truth)
    except RecursionError:
        return False


def read_code(action: str) -> str | None:
    """Return the last fenced block of Python that a turn says.

    A block without a language, which may be an example's output, counts where none is called
    Python. Without fences, return the text itself if it begins like Python code, else None.
    """
    spoken = read_turn(action).spoken
    blocks = [block for block in fenced_blocks(spoken) if block.language in ("", *PYTHON)]
    if blocks:
        named = [block for block in blocks if block.language]
        return (named or blocks)[-1].content or None
    is_code = spoken.lstrip().startswith(("def ", "import ", "from "))
    return spoken if is_code and "```" not in spoken else None
