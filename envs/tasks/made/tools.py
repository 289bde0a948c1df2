"""Tasks from a command's own help: its options, told in the help's words, on texts it has not seen.

The command runs only in a sandbox: its help is read there, and options without an argument are
tried there on drawn texts, alone and in pairs. A pair is a task where its output differs from that
of each option alone and of none.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from typing import Any

from envs.rock import Sandbox, SandboxConfig
from envs.tasks.harbor.errors import TaskError
from envs.tasks.made.draft import Case, Draft, run_program
from envs.tasks.made.text_tools import WORDS

MAX_OPTIONS = 16
MAX_PAIRS = 40
MAX_WORDS = 160  # characters of the help of one option
MAX_OUTPUT = 4000
TEXTS = 6
_TOOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,40}")
_OPTION = re.compile(r"^\s{1,8}(-[A-Za-z0-9])(?:, (--[a-z][a-z-]*))?\s{2,}(\S.*)$", re.MULTILINE)
_SANDBOX = {"memory_mb": 256, "disk_mb": 32, "pids": 32, "label": "options of a command"}
_DRIVER = """\
import json, subprocess
order = json.load(open("order.json"))
def run(argv, text):
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=3)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
found = [[run(argv, text) for text in order["texts"]] for argv in order["commands"]]
json.dump(found, open("found.json", "w"))
"""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command without an argument, and what the help says of it."""

    flag: str
    words: str


def is_tool_name(name: str) -> bool:
    """Return whether a name can be that of a command: no path, no option, no shell syntax."""
    return _TOOL.fullmatch(name) is not None


def read_options(help_text: str) -> list[Option]:
    """Return the options without an argument that a help lists as GNU and BSD commands do."""
    found = {}
    for flag, _, words in _OPTION.findall(help_text):
        plain = " ".join(words.split())[:MAX_WORDS]
        if flag not in found and not re.match(r"(display|print|output|show) (this|version)", plain):
            found[flag] = Option(flag, plain)
    return list(found.values())[:MAX_OPTIONS]


async def tool_drafts(tool: str, count: int, seed: int, isolation: str) -> list[Draft]:
    """Return up to `count` tasks of a command.

    Raises:
      TaskError: the command is missing, or its help lists no options that change its output.
      SandboxError: a fault of the machine.
    """
    rng = random.Random(f"tools/{tool}/{seed}")
    texts = [_text(rng) for _ in range(TEXTS)]
    shown = await _outputs([[tool, "--help"]], [""], isolation)
    help_text = shown[0][0]
    if not help_text:
        raise TaskError(tool, 0, "no such command, or it has no --help")
    options = read_options(help_text)
    pairs = list(itertools.combinations(options, 2))
    chosen: list[tuple[Option, ...]] = [
        (),
        *((one,) for one in options),
        *rng.sample(pairs, min(MAX_PAIRS, len(pairs))),
    ]
    commands = [[tool, *(option.flag for option in group)] for group in chosen]
    first = await _outputs(commands, texts, isolation)
    second = await _outputs(commands, texts, isolation)
    told: dict[tuple[Option, ...], list[str]] = {}
    for group, outputs, again in zip(chosen, first, second, strict=True):
        if outputs == again and all(text and len(text) <= MAX_OUTPUT for text in outputs):
            told[group] = [text or "" for text in outputs]
    drafts: list[Draft] = []
    for group in rng.sample(list(told), len(told)):
        if len(group) == 2 and len(drafts) < count and _matters(group, told):
            drafts.append(_draft(tool, group, texts, told[group]))
    if not drafts:
        raise TaskError(tool, 0, "no two options of its help change together what it prints")
    return drafts


def _matters(group: tuple[Option, ...], told: dict[tuple[Option, ...], list[str]]) -> bool:
    """Return whether each option of a group changes the output for most texts."""
    for size in range(len(group)):
        for part in itertools.combinations(group, size):
            other = told.get(part)
            if other is None:
                return False
            if sum(one != two for one, two in zip(told[group], other, strict=True)) < TEXTS // 2:
                return False
    return True


def _draft(tool: str, group: tuple[Option, ...], texts: list[str], outputs: list[str]) -> Draft:
    wishes = "\n".join(f"- {option.words}" for option in group)
    argv = run_program("shell", "run.sh")
    draft = Draft(
        name=f"tools/{tool}",
        domain="tools",
        family="tool-help",
        language="shell",
        instruction=f"""\
Write the bash script /app/run.sh. It reads standard input and prints what the command `{tool}` \
prints of it, with these wishes, in the words of its help:

{wishes}

Apart from them the command's defaults hold. For this input

```
{texts[0]}```

it prints

```
{outputs[0].rstrip(chr(10))}
```""",
        program="run.sh",
        oracle=f"{tool} {' '.join(option.flag for option in group)}\n",
        cases=[
            Case(argv, stdin=text, stdout=output)
            for text, output in zip(texts[1:], outputs[1:], strict=True)
        ],
        origin={"tool": tool, "options": " ".join(option.flag for option in group)},
    )
    return dataclasses.replace(draft, name=f"tools/{tool}-{draft.digest[:10]}")


def _text(rng: random.Random) -> str:
    """Return lines with blanks, repetitions, numbers and both cases: what options tell apart."""
    lines = []
    for _ in range(14):
        word = rng.choice(WORDS[:6])
        word = rng.choice((word, word.upper(), word.title()))
        number = rng.choice((str(rng.randint(0, 2000)), f"{rng.randint(1, 9)}.{rng.randint(0, 9)}"))
        line = rng.choice(("", "", "  ", "\t")) + rng.choice(
            (f"{word} {number}", f"{number}\t{word}")
        )
        lines += [line] * rng.choice((1, 1, 1, 2))
        if rng.random() < 0.15:
            lines += [""] * rng.choice((1, 2))
    return "".join(f"{line}\n" for line in lines)


async def _outputs(
    commands: list[list[str]], texts: list[str], isolation: str
) -> list[list[str | None]]:
    """Return what each command prints for each text, None where it fails; run in a sandbox."""
    order = {"commands": commands, "texts": texts}
    async with Sandbox(SandboxConfig(isolation=isolation, **_SANDBOX)) as sandbox:
        await sandbox.write_files(
            {"driver.py": _DRIVER.encode(), "order.json": json.dumps(order).encode()}
        )
        await sandbox.execute("exec python3 -B driver.py", timeout=300.0)
        found: Any = json.loads(await sandbox.read_file("found.json"))
    is_sound = len(found) == len(commands) and all(
        len(row) == len(texts) and all(one is None or isinstance(one, str) for one in row)
        for row in found
    )
    if not is_sound:
        raise ValueError(f"a command changed its own record: {str(found)[:100]}")
    return found
