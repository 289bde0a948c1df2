"""A task that a generator made, and the Harbor folder that holds it.

The agent writes one program. The verifier runs it on hidden cases in an environment of its own
(verify.py), so a task measures what a program does and never how its text looks.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import pathlib
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from envs.tasks.harbor.task import Files

APP = "/app"
HERE = pathlib.Path(__file__).parent
# Exact versions: a task means the same years later.
IMAGES = {
    "python": "python:3.12.8-bookworm",
    "shell": "python:3.12.8-bookworm",
    "sql": "python:3.12.8-bookworm",
    "config": "python:3.12.8-bookworm",
    "javascript": "node:20.18.1-bookworm",
}
INTERPRETERS = {
    "python": ["python3", "-B"],
    "shell": ["bash"],
    "javascript": ["node"],
}
CASE_SECONDS = 10.0
_CANARY_SPACE = uuid.UUID("5b0f2a1e-6a52-4d43-9a7e-3c1b0c7d9e21")
_TEST_SH = """\
#!/bin/bash
exec /usr/bin/env python3 -I -B /tests/verify.py /app
"""


# Paths come from repositories of others, and go into scripts, TOML and folders of this machine.
_PLAIN_PATH = re.compile(r"[\w+.@=-][\w+.@= -]*(/[\w+.@=-][\w+.@= -]*)*")
MAX_PATH = 200
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")  # Harbor's rule


def is_plain_path(path: str) -> bool:
    """Return whether a path stays below its folder, and needs no quotes but for spaces."""
    parts = path.split("/")
    return (
        len(path) <= MAX_PATH
        and _PLAIN_PATH.fullmatch(path) is not None
        and not {".", "..", ".git"} & set(parts)
    )


def plain_name(name: str) -> str:
    """Return a name with only the characters that Harbor allows in the name of a task."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "unnamed"


@dataclasses.dataclass(frozen=True)
class Case:
    """One hidden run of the agent's program.

    Attributes:
      argv: the command; {app} is the folder of the program. It runs in a fresh folder.
      stdin: its standard input.
      files: of the fresh folder, by path.
      setup: a shell command that runs in that folder before the program.
      probe: a shell command that runs there after it; its output is the state that is compared.
      stdout: expected output, trailing line breaks aside; None: not compared.
      code: expected exit status, of which only whether it is 0 counts; None: not compared.
      left: expected files by path, None where a file must be gone.
      state: expected output of the probe.
    """

    argv: tuple[str, ...]
    stdin: str = ""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    setup: str = ""
    probe: str = ""
    stdout: str | None = None
    code: int | None = 0
    left: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    state: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the case as verify.py reads it."""
        expect: dict[str, Any] = {"files": dict(self.left)}
        if self.stdout is not None:
            expect["stdout"] = self.stdout
        if self.code is not None:
            expect["code"] = self.code
        if self.state is not None:
            expect["probe"] = self.state
        return {
            "argv": list(self.argv),
            "stdin": self.stdin,
            "files": dict(self.files),
            "setup": self.setup,
            "probe": self.probe,
            "expect": expect,
        }


@dataclasses.dataclass(frozen=True)
class Draft:
    """A task before it is proven.

    Attributes:
      name: unique within a set, of two parts: GROUP/NAME.
      domain: the broad kind of work.
      family: the generator.
      language: of the oracle, a key of IMAGES.
      instruction: what the agent is told.
      program: name of the file that the agent delivers in /app.
      oracle: text of a correct program.
      cases: the hidden runs.
      files: that the agent finds in /app, by path.
      common: files of every case's folder, by path; of the verifier alone.
      lines: the lines of the oracle that mutants may change; empty for all.
      seconds: for one case.
      origin: where the task comes from: seed, package, commit.
    """

    name: str
    domain: str
    family: str
    language: str
    instruction: str
    program: str
    oracle: str
    cases: Sequence[Case] = dataclasses.field(repr=False)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    common: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    lines: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    seconds: float = CASE_SECONDS
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what could harm this machine or break the task's folder. Raises ValueError."""
        if not _TASK_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name[:MAX_PATH]!r} is no name such as logs/count-7")
        for path in (self.program, *self.files, *self.common):
            if not is_plain_path(path):
                raise ValueError(f"{path[:MAX_PATH]!r} is no plain path of a file below a folder")
        if self.program == "solve.sh":
            raise ValueError("the program 'solve.sh' would replace the script that installs it")
        for text in (self.instruction, self.oracle, *self.files.values()):
            text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError

    @property
    def order(self) -> dict[str, Any]:
        """Return what verify.py reads."""
        return {
            "program": self.program,
            "seconds": self.seconds,
            "files": dict(self.common),
            "cases": [case.to_json() for case in self.cases],
        }

    @property
    def digest(self) -> str:
        """Return a hash over what defines the task, its name aside."""
        identity = json.dumps([self.instruction, self.oracle, self.order, dict(self.files)])
        return hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=8).hexdigest()

    @property
    def canary(self) -> str:
        """Return the GUID that marks the task's files: a corpus that holds it holds the task."""
        return str(uuid.uuid5(_CANARY_SPACE, self.digest))


def run_program(language: str, program: str, *arguments: str) -> tuple[str, ...]:
    """Return the argv of a case that runs the agent's program."""
    return (*INTERPRETERS[language], f"{{app}}/{program}", *arguments)


def files_of(draft: Draft) -> Files:
    """Return the files of the task's Harbor folder."""
    canary = f"# canary GUID {draft.canary}: this file must not be in a training corpus\n"
    image = IMAGES[draft.language]
    solve = f"#!/bin/bash\n{canary}cat '/solution/{draft.program}' > '{APP}/{draft.program}'\n"
    texts = {
        "task.toml": canary + _settings(draft),
        "instruction.md": f"<!-- canary GUID {draft.canary} -->\n{draft.instruction.strip()}\n",
        "environment/Dockerfile": f"FROM {image}\nWORKDIR {APP}\n"
        + ("COPY files/ ./\n" if draft.files else ""),
        "solution/solve.sh": solve,
        f"solution/{draft.program}": draft.oracle,
        "tests/Dockerfile": f"FROM {image}\nWORKDIR {APP}\nCOPY . /tests/\n",
        "tests/test.sh": _TEST_SH,
        "tests/verify.py": (HERE / "verify.py").read_text(),
    }
    texts |= {f"environment/files/{name}": text for name, text in draft.files.items()}
    order = json.dumps(draft.order).encode()
    found: dict[str, tuple[bytes, int]] = {}
    for name, text in texts.items():
        mode = 0o755 if name.endswith(".sh") and not name.startswith("environment/") else 0o644
        found[name] = (text.encode(), mode)
    # Compressed, so that paths in it are not rewritten on the way into a sandbox.
    found["tests/cases.json.gz"] = (gzip.compress(order, mtime=0), 0o644)
    return found


def _settings(draft: Draft) -> str:
    """Return the text of task.toml."""
    tags = json.dumps([draft.family, draft.language])
    origin = "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in sorted(draft.origin.items())
    )
    return (
        'schema_version = "1.2"\n'
        f'artifacts = ["{APP}/{draft.program}"]\n\n'
        f"[task]\nname = {json.dumps(draft.name)}\n\n"
        f"[metadata]\ncategory = {json.dumps(draft.domain)}\ntags = {tags}\n"
        f"digest = {json.dumps(draft.digest)}\n{origin}\n"
        "[agent]\ntimeout_sec = 600.0\n\n"
        '[verifier]\nenvironment_mode = "separate"\ntimeout_sec = 300.0\n\n'
        "[environment]\nbuild_timeout_sec = 300.0\ncpus = 1\nmemory_mb = 512\nstorage_mb = 256\n"
        'network_mode = "no-network"\n'
    )


def write_draft(draft: Draft, folder: pathlib.Path) -> None:
    """Write the task's Harbor folder; it is there as a whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, (content, mode) in files_of(draft).items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
