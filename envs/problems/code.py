"""Programming of one turn: a function to write, hidden inputs, a real sandbox.

Nothing that decides the reward is inside the sandbox. The submitted code gets inputs and gives
outputs; what they should be, and the comparison, are here. So sys.exit(0), a replaced ==, objects
that equal everything, or a forged report have nothing to act on: an output counts for its plain
JSON value.
"""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from envs.gem import StepResult
from envs.problems.base import ProblemEnv
from envs.problems.code_families import FAMILIES
from envs.rock import Sandbox, SandboxConfig, SandboxError
from envs.rock.sync import run

TIMEOUT_SECONDS = 5.0  # of the submitted code, all inputs together
CALL_GRACE_SECONDS = 60.0  # for starting and stopping the sandbox
HIDDEN, SHOWN = 20, 2  # inputs
# different results among the hidden inputs: no constant is right for many of them
MIN_DISTINCT_RESULTS = 5
MAX_DRAWS = 200
MAX_CODE_BYTES = 100_000
_FENCES = ("```python", "```py", "```")
# Runs in the sandbox, in the same process as the submitted code: it reports, it does not judge.
# What the code prints goes to stderr.
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


class CodeEnv(ProblemEnv):
    """A Python function to write, in a ```python block; see ProblemEnv.

    A run past its time ends as `timeout`, trouble of the sandbox as `infra_sandbox`.
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
        return run(self.astep(action), TIMEOUT_SECONDS + CALL_GRACE_SECONDS)

    async def astep(self, action: str) -> StepResult:
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
        except SandboxError as error:
            return self._graded(action, "infra_sandbox", f"{type(error).__name__}: {error}")
        if ending:
            return self._graded(action, ending, note)
        wrong = [
            number
            for number, (ours, truth) in enumerate(zip(outputs, self.truths, strict=True))
            if not same(ours, truth)
        ]
        note = (
            f"{len(wrong)} of {len(self.truths)} hidden inputs give another result; on the first it"
            f" gave {str(outputs[wrong[0]])[:200]}"
            if wrong
            else ""
        )
        return self._graded(action, "failure" if wrong else "success", note)

    def demonstrator_action(self) -> str | None:
        return f"```python\n{self.drawn.source}```"

    def cheats(self) -> dict[str, list[str]]:
        name = self.drawn.name
        parameters = self.drawn.parameters
        known = ", ".join(f"{json.dumps(one)!r}: {truth!r}" for one, truth in self.shown)
        examples = (
            f"import json\ndef {name}(*arguments):\n    return"
            f" {{{known}}}.get(json.dumps(list(arguments)))\n"
        )
        equal = (
            "class Equal(int):\n    def __eq__(self, other): return True\n    __hash__ ="
            " int.__hash__\n\nimport builtins, json\njson.dumps = lambda *a, **k: 'true'\ndef"
            f" {name}({parameters}):\n    return Equal()\n"
        )
        forge = (
            "import os, pathlib\nfor place in ('reward.txt', '/logs/verifier/reward.txt',"
            " 'result.json'):\n    try:\n        pathlib.Path(place).write_text('1')\n    except"
            " OSError:\n        pass\nfor fd in (1, 2, 3, 4, 5):\n    try:\n        os.write(fd,"
            ' b\'{"value": true, "reward": 1, "passed": true}\\n\' * 20)\n    except OSError:\n'
            "        pass\nos._exit(0)\n"
        )
        tricks = {
            "examples": examples,
            "equal to all": equal,
            "forge": forge,
            "exit": "import sys\nsys.exit(0)\n",
        }
        return {trick: [f"```python\n{code}```"] for trick, code in tricks.items()}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "sandbox_config": self.sandbox_config}

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        for _ in range(MAX_DRAWS):
            self.drawn = FAMILIES[family](rng, size)
            space: dict[str, Any] = {}
            exec(compile(self.drawn.source, family, "exec"), space)  # our own text, not a model's
            inputs = list(
                {
                    json.dumps(one): one
                    for one in (self.drawn.draw_input(rng) for _ in range(5 * (HIDDEN + SHOWN)))
                }.values()
            )[: HIDDEN + SHOWN]
            truths = [space[self.drawn.name](*json.loads(json.dumps(one))) for one in inputs]
            if (
                len(inputs) == HIDDEN + SHOWN
                and len(set(map(json.dumps, truths[SHOWN:]))) >= MIN_DISTINCT_RESULTS
            ):
                break
        else:
            raise RuntimeError(
                f"family {family} at size {size} gave no inputs with {MIN_DISTINCT_RESULTS} different"
                f" results in {MAX_DRAWS} draws"
            )
        self.shown = list(zip(inputs, truths, strict=True))[:SHOWN]
        self.inputs = inputs[SHOWN:]
        self.truths = truths[SHOWN:]
        examples = "\n".join(
            f"{self.drawn.name}({', '.join(map(repr, one))}) == {truth!r}"
            for one, truth in self.shown
        )
        return (
            f"Write a Python function `{self.drawn.name}({self.drawn.parameters})`."
            f" {self.drawn.statement}\nExamples:\n{examples}\nAnswer with one ```python block. It"
            f" is tested on other inputs and has {TIMEOUT_SECONDS:g} seconds."
        )

    async def _outputs(self, code: str) -> tuple[list[Any], str, str]:
        """(what the code gave for each hidden input, "", ""), or ([], the ending, why) where it
        gave no such list.
        """
        config = dataclasses.replace(self.sandbox_config, label=self.task.name)
        async with Sandbox(config) as sandbox:
            await sandbox.write_files(
                {
                    "solution.py": code.encode(errors="replace"),
                    "runner.py": RUNNER.encode(),
                    "inputs.json": json.dumps([self.drawn.name, self.inputs]).encode(),
                }
            )
            result = await sandbox.execute("exec python3 -I runner.py", timeout=TIMEOUT_SECONDS)
        if result.timed_out:
            return [], "timeout", f"the code did not end within {TIMEOUT_SECONDS:g} s"
        try:
            outputs = [json.loads(line) for line in result.stdout.splitlines()]
        except (ValueError, RecursionError):
            return [], "failure", "what the code reports is not JSON"
        if len(outputs) != len(self.truths) or not all(isinstance(one, dict) for one in outputs):
            return (
                [],
                "failure",
                (
                    f"exit {result.exit_code}, {len(outputs)} results instead of"
                    f" {len(self.truths)}: {result.stderr[-200:]}"
                ),
            )
        return outputs, "", ""


def same(output: dict[str, Any], truth: Any) -> bool:
    """Whether a reported output is the value, types included: True is not 1, 1.0 is not 1, and a
    tuple is a list.
    """
    try:
        return (
            "error" not in output
            and "value" in output
            and json.dumps(output["value"]) == json.dumps(truth)
        )
    except RecursionError:
        return False


def read_code(action: str) -> str | None:
    """The last fenced block; without fences, the text itself where it defines a function."""
    action = action.rsplit("</think>", 1)[-1]
    end = action.rfind("```")
    start = action.rfind("```", 0, max(end, 0))
    if start < 0:
        return action if action.lstrip().startswith(("def ", "import ", "from ")) else None
    block = action[start:end]
    fence = next(fence for fence in _FENCES if block.startswith(fence))
    return block[len(fence) :].lstrip("\r\n") or None
