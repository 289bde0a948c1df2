"""Grade the state that the agent left.

1. Every process of the agent is dead before any file of the tests enters the sandbox.
2. /logs/verifier and /tests are emptied first, so no reward or link of the agent's remains.
3. The script runs in fresh namespaces with an empty /tmp, with the task's variables and none of the
   agent's, and with system programs first in PATH.
4. It works on the sandbox itself, not on a copy: the steps of a task follow each other in one
   world, and rule 5 reads its files.
5. After it has ended every process is dead again. Only then is the reward read: a regular file of
   /logs/verifier, one answer, finite, from 0 to 1.

Programs of the agent's that the script starts run with the same rights as the script, as in
Harbor's shared mode, and could write a reward. A task whose tests run the agent's programs must
check their output from outside and write its reward when none of them lives any more;
examples/rpn-calculator/tests shows how.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import gzip
import io
import json
import math
import re
import shlex
import tarfile
import zlib

from envs.rock import CommandResult, Sandbox
from envs.tasks.harbor import toolchain
from envs.tasks.harbor.environment import Built, execution
from envs.tasks.harbor.task import Files, Step

READ_TIMEOUT_SECONDS = 20.0
OUTPUT_BYTES = 16 * 1024  # kept from the end of the script's output
SUMMARY_BYTES = 44 * 1024  # of all of it, compressed
MAX_UNPACKED_BYTES = 64 << 20
MAX_REWARD_BYTES = 65_536

_COULD_NOT_BEGIN = 97  # exit code of the script below
_RUN = """\
workspace={workspace}
clear() {{ chmod -R u+rwX -- "$1" 2> /dev/null; rm -rf -- "$1"; [ ! -e "$1" ] && [ ! -L "$1" ]; }}
if [ -L "$workspace/logs" ] || [ ! -d "$workspace/logs" ]; then rm -rf -- "$workspace/logs"; fi
chmod u+rwx "$workspace" "$workspace/logs" 2> /dev/null
clear "$workspace/logs/verifier" && clear "$workspace/tests" || \\
    {{ echo 'could not be emptied: /tests or /logs/verifier'; exit 97; }}
mkdir -p "$workspace/logs/verifier" "$workspace/tests"
scratch="$(mktemp -d)" || exit 97
/usr/bin/tar -xf "$VERIFIER_FILES/tests.tar" -C "$workspace/tests" || exit 97
{shims}
cd -- {workdir} 2> /dev/null || cd "$workspace"
/usr/bin/env -i {variables} HOME="$scratch" TMPDIR="$scratch" PATH="$scratch/bin:$ROCK_PATH" \\
    ROCK_PATH="$ROCK_PATH" ROCK_ROOT="$ROCK_ROOT" ROCK_PYTHON="$ROCK_PYTHON" \\
    PYTHONPATH="$workspace/tests${{VERIFIER_TOOLS:+:$VERIFIER_TOOLS}}" \\
    {command} > "$scratch/.output" 2>&1 < /dev/null
ended=$?
/usr/bin/tail -c {bytes} "$scratch/.output"
{summary}
exit $ended
"""
# The whole output of a test run, since results can be more than a command's output may be. It is
# the last line, so nothing that the tests print can stand for it.
_SUMMARY = """\
printf '\\n'
gzip -c "$scratch/.output" | base64 -w 0 | head -c {bytes}
"""
_READ = """\
place={workspace}/logs/verifier
if [ -L {workspace}/logs ] || [ -L "$place" ]; then echo 'link -'; exit 0; fi
for name in reward.txt reward.json; do
    file="$place/$name"
    if [ -f "$file" ] && [ ! -L "$file" ] && [ "$(stat -c %h -- "$file")" = 1 ]; then
        echo "$name $(head -c {bytes} -- "$file" | base64 -w 0)"
    elif [ -e "$file" ] || [ -L "$file" ]; then echo "$name -"
    fi
done
"""
_CLEAN = (
    "for d in {workspace}/tests {workspace}/logs/verifier; do chmod -R u+rwX -- $d; rm -rf -- $d;"
    " done 2> /dev/null; mkdir -p {workspace}/logs/verifier; true"
)
_HEADING = re.compile(r"=\s*short test summary info\s*=+", re.IGNORECASE)
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|\r")
_COUNTS_AS_PASSED = {
    "PASSED": True,
    "SKIPPED": True,
    "XFAIL": True,
    "FAILED": False,
    "ERROR": False,
    "XPASS": False,
}


class RewardError(ValueError):
    """The tests left no valid reward."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """The result of grading a step.

    `rewards` has several entries where reward.json has; `reward` is the one that counts. `note`
    says why the reward is 0 if that was not the tests' verdict. `output` is the end of the script's
    output. `fault` says why the grade tells nothing about the agent (reference.py).
    """

    reward: float
    rewards: dict[str, float]
    note: str = ""
    output: str = ""  # the end of what the script printed
    fault: str = ""


async def grade(sandbox: Sandbox, step: Step, built: Built, real_installs: bool = False) -> Grade:
    """Run the step's tests in the agent's sandbox.

    Args:
      sandbox: the agent's, or one with its files.
      step: the step.
      built: where its files are.
      real_installs: whether the tests install what they need themselves (toolchain.py).

    A script that left no valid reward or did not end earns 0: the agent shares its world and could
    have caused that. Whether it did is decided by the reference solution, see reference.py.

    Raises:
      SandboxError: a fault of the machine, and only that.
    """
    rewritten = built.paths.scripts(step.tests, everything=True)
    rewritten[step.test_script] = (rewritten[step.test_script][0], 0o755)
    tests = _tar(rewritten)
    result = await sandbox.verify(
        _script(sandbox, step, built),
        timeout=step.verifier_timeout,
        files={"tests.tar": tests, "shims.tar": toolchain.shims(real_installs)},
        keep=True,
    )
    return await judge(sandbox, step, built, result)


async def judge(sandbox: Sandbox, step: Step, built: Built, result: CommandResult) -> Grade:
    """Return the grade that follows from a script's end and the rewards that it left."""
    output = built.paths.outward(result.stdout)
    if result.timed_out:
        note = f"the tests of {step.name} were stopped after {step.verifier_timeout:g} s"
        return Grade(0.0, {}, note, output)
    # Above 128: killed by a signal, which a program of the agent's may have sent, and it may have
    # left a reward.
    if result.exit_code == _COULD_NOT_BEGIN or result.exit_code > 128:
        note = f"the tests of {step.name} were killed or could not begin (exit {result.exit_code})"
        return Grade(0.0, {}, note, output)
    try:
        if step.parser == "pytest":
            output, _, packed = result.stdout.rpartition("\n")
            output = built.paths.outward(output)
            passed = terminal_bench_1_passed(_unpacked(packed))
            rewards = {"reward": float(passed)}
        else:
            rewards = await _read_rewards(sandbox, built)
        return Grade(pick(rewards), rewards, "", output)
    except RewardError as error:
        return Grade(0.0, {}, f"{step.name}: {error}", output)


async def clean_up(sandbox: Sandbox) -> None:
    """Remove everything of the tests between two steps, so that the agent cannot read it."""
    await sandbox.kill_all()
    await sandbox.verify(
        _CLEAN.format(workspace=shlex.quote(sandbox.workspace)),
        timeout=READ_TIMEOUT_SECONDS,
        keep=True,
    )


def _script(sandbox: Sandbox, step: Step, built: Built) -> str:
    tools = '"${VERIFIER_TOOLS:+$VERIFIER_TOOLS/python/bin:}"'
    script = f"{built.paths.place('/tests')}/{step.test_script}"
    # Terminal-Bench 1 calls bash whatever the script's first line says.
    first = b"" if step.parser == "pytest" else step.tests[step.test_script][0]
    return _RUN.format(
        workspace=shlex.quote(sandbox.workspace),
        workdir=shlex.quote(built.paths.place(built.workdir)),
        shims=toolchain.lay(
            '"$scratch/bin"',
            '"$VERIFIER_FILES/shims.tar"',
            shlex.quote(built.paths.place("/root")),
            tools + shlex.quote(path_of_tests(built)),
        ),
        command=execution(script, first),
        bytes=OUTPUT_BYTES,
        summary=_SUMMARY.format(bytes=SUMMARY_BYTES) if step.parser == "pytest" else "",
        variables=assignments(step, built),
    )


def path_of_tests(built: Built) -> str:
    """Return the tests' PATH without the stand-ins of toolchain.py: system programs come first."""
    folders = [*toolchain.CLEAN_PATH.split(":"), *built.inner_env().get("PATH", "").split(":")]
    return ":".join(folder for folder in dict.fromkeys(folders) if folder)


def assignments(step: Step, built: Built) -> str:
    """Return the tests' variables as arguments of `env`."""
    inner = built.inner_env()
    tests = built.paths.place("/tests")
    variables = {
        **inner,
        **{name: built.paths.inward(value) for name, value in step.verifier_env.items()},
        "PATH": path_of_tests(built),
        "LANG": "C.UTF-8",
        "TEST_DIR": tests,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": tests,
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return " ".join(shlex.quote(f"{name}={value}") for name, value in variables.items())


def _tar(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# -- Rewards
# -------------------------------------------------------------------------------------------------


async def _read_rewards(sandbox: Sandbox, built: Built) -> dict[str, float]:
    """Read the rewards after every process that the tests started is dead."""
    result = await sandbox.verify(
        _READ.format(workspace=shlex.quote(sandbox.workspace), bytes=MAX_REWARD_BYTES + 1),
        timeout=READ_TIMEOUT_SECONDS,
        keep=True,
    )
    found: dict[str, bytes | None] = {}
    for row in result.stdout.splitlines():
        name, _, content = row.partition(" ")
        try:
            found[name] = None if content == "-" else base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise RewardError(f"{name} could not be read: {error}") from error
    return read_rewards(found)


def read_rewards(files: dict[str, bytes | None]) -> dict[str, float]:
    """Return the rewards in reward.txt and reward.json.

    Both files may exist only if they agree. None stands for something that is not a regular file.

    Raises:
      RewardError: the files are not one valid answer.
    """
    if odd := [name for name, content in files.items() if content is None]:
        raise RewardError(f"/logs/verifier/{odd[0]} is not a regular file")
    if not files:
        raise RewardError("the tests left neither reward.txt nor reward.json in /logs/verifier")
    if large := [name for name, content in files.items() if len(content) > MAX_REWARD_BYTES]:
        raise RewardError(f"{large[0]} has more than {MAX_REWARD_BYTES} bytes")
    answers = {}
    for name, content in files.items():
        read = _text_reward if name == "reward.txt" else _json_rewards
        answers[name] = read(content)
    if len(answers) == 1:
        (rewards,) = answers.values()
        return rewards
    text_reward = pick(answers["reward.txt"])
    json_reward = pick(answers["reward.json"])
    if text_reward != json_reward:
        raise RewardError(f"reward.txt says {text_reward:g} and reward.json says {json_reward:g}")
    return answers["reward.json"]


def pick(rewards: dict[str, float]) -> float:
    """Return the reward that counts: the one named "reward", or the only one.

    Raises:
      RewardError: it is not clear which one counts.
    """
    if "reward" in rewards:
        return rewards["reward"]
    if len(rewards) == 1:
        return next(iter(rewards.values()))
    raise RewardError(
        f"reward.json has {len(rewards)} entries ({', '.join(sorted(rewards))[:80]}), and none is"
        ' named "reward"'
    )


def _text_reward(content: bytes) -> dict[str, float]:
    try:
        return {"reward": _checked("reward.txt", float(content.decode("ascii").strip()))}
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"reward.txt holds {content[:40]!r}, and not one number") from error


def _json_rewards(content: bytes) -> dict[str, float]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"reward.json is not JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise RewardError(
            f"reward.json is a {type(value).__name__}, but must be an object of numbers"
        )
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise RewardError(f"reward.json: {key[:40]!r} is not a number")
    return {key: _checked("reward.json", number) for key, number in value.items()}


def _checked(name: str, number: float | int) -> float:
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise RewardError(f"{name} says {value}, which is not a finite number from 0 to 1")
    return value


def _unpacked(packed: str) -> str:
    """Return the whole output of a test run. Raises RewardError."""
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(packed, validate=True)))
        return content.read(MAX_UNPACKED_BYTES).decode(errors="replace")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RewardError(
            f"the tests' output is too long to be read as a whole, or no output ({error})"
        ) from error


def terminal_bench_1_passed(output: str) -> bool:
    """Return whether all tests passed, by the rule of Terminal-Bench 1's parser of pytest.

    After the first heading "short test summary info" each line "STATUS test" gives a test's
    outcome, the last one where a name (after the first "::") stands there twice. SKIPPED and XFAIL
    count as passed, ERROR and XPASS as failed; other lines and the exit code do not count. Colours
    do not either: Terminal-Bench reads the output from a terminal's screen. The one difference: a
    summary without any test is no verdict here, and resolved there.

    Raises:
      RewardError: there is no summary, or no test in it.
    """
    text = _ESCAPES.sub("", output)
    heading = _HEADING.search(text)
    if heading is None:
        raise RewardError(
            "pytest's short test summary is not in the output (run-tests.sh must call it with -rA)"
        )
    outcomes = {}
    for line in text[heading.end() :].splitlines():
        if line.startswith("FAILED"):
            line = line.rpartition(" - ")[0] or line  # the reason
        status, test = (*line.split(maxsplit=1), "", "")[:2]
        passed = _COUNTS_AS_PASSED.get(status.strip(":"))
        name = test.strip().split("::", maxsplit=1)[-1]
        if passed is not None and name:
            outcomes[name] = passed
    if not outcomes:
        raise RewardError("pytest's short test summary names no test")
    return all(outcomes.values())
