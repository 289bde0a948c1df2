"""Repair tasks from any package, tests or none: its own behaviour is recorded, then broken.

A package is a folder of Python modules, of CommonJS modules of JavaScript, or of shell scripts. It
runs only inside a sandbox. What its docstrings' examples and drawn calls show there, twice alike,
is what a repaired package must show; a mutant that some of these detect is a task. Nothing of the
package is imported here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import random
import shlex
from collections.abc import Sequence
from typing import Any

from envs.rock import Sandbox, SandboxConfig
from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import read_folder
from envs.tasks.made.draft import Case, Draft, plain_name
from envs.tasks.made.mutate_text import choose_edits
from envs.tasks.made.prove import judge_programs
from envs.tasks.repair.mutate import Edit

MAX_TESTS = 300  # that are recorded of one package
MAX_TEST_BYTES = 64 << 10
MAX_TRIED = 48  # mutants of one module
MAX_PACKAGE_BYTES = 1 << 20
MIN_TESTS_OF_LINE = 4
NEAR_LINES = 15  # from a bug to the mutants of its proof
# A bug is used where its verifier notices so large a share of so many bugs near it, itself counted.
MIN_NOTICED = 0.9
MIN_TRIED_NEAR = 4
MODULES = 3  # whose bugs are looked for, at least, where a package has so many
CASES = 4
CASE_SECONDS = 60.0  # a case runs many tests, each with a limit of its own
RECORD_SECONDS = 600.0
_SANDBOX = {
    "memory_mb": 512,
    "disk_mb": 64,
    "pids": 64,
    "inodes": 16_384,
    "label": "record of a package",
}
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Language:
    """How packages of a language are read and recorded.

    Attributes:
      suffixes: of the files that are read.
      recorders: files beside this one; the first records, and runs tests.
      words: what the instruction calls a package, and where its statements run.
    """

    suffixes: tuple[str, ...]
    recorders: tuple[str, ...]
    words: tuple[str, str]

    @property
    def files(self) -> dict[str, str]:
        """Return the texts of the recorders, by name."""
        return {name: (HERE / name).read_text() for name in (*self.recorders, "calls.py")}


LANGUAGES = {
    "python": Language((".py",), ("record.py",), ("Python package", "in {}")),
    "javascript": Language(
        (".js", ".cjs", ".json"),
        ("record_javascript.py", "record.js"),
        ("JavaScript package", "m = require('/app/{}')"),
    ),
    "shell": Language(
        (".sh", ".bash", ""), ("record_shell.py",), ("folder of shell scripts", "HERE=/app")
    ),
}


@dataclasses.dataclass(frozen=True)
class Recording:
    """A package's files and tests.

    Attributes:
      name: of the package.
      files: its source files by path, the package's folder first.
      tests: as the recorder prints them.
      language: a key of LANGUAGES.
    """

    name: str
    files: dict[str, str]
    tests: Sequence[dict[str, Any]]
    language: str = "python"


def language_of(folder: pathlib.Path) -> str:
    """Return the language of a package's folder, a key of LANGUAGES.

    Raises:
      TaskError: it is no package of any of them.
    """
    if (folder / "__init__.py").is_file():
        return "python"
    if (folder / "package.json").is_file():
        return "javascript"
    if any(path.is_file() and _is_script(path) for path in folder.glob("*")):
        return "shell"
    raise TaskError(
        folder,
        0,
        "neither __init__.py nor package.json nor a shell script is here; give the folder of a"
        " package of Python, JavaScript or shell",
    )


def _is_script(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline(200)
    return path.suffix in (".sh", ".bash") or (first.startswith(b"#!") and b"sh" in first)


def read_package(folder: pathlib.Path) -> dict[str, str]:
    """Return the source files of a package's folder, by path from the folder's parent.

    Raises:
      TaskError: it is no package, is too large, or has a file that is not text.
    """
    suffixes = LANGUAGES[language_of(folder)].suffixes
    left_out = (".git", "tests", "test", "node_modules")
    files = {}
    for path, (content, _) in read_folder(folder, leave_out=left_out).items():
        suffix = pathlib.PurePath(path).suffix
        if suffix not in suffixes or (not suffix and not content.startswith(b"#!")):
            continue
        try:
            files[f"{folder.resolve().name}/{path}"] = content.decode()
        except UnicodeDecodeError as error:
            raise TaskError(folder / path, 0, f"not UTF-8: {error}") from error
    size = sum(map(len, files.values()))
    if size > MAX_PACKAGE_BYTES:
        raise TaskError(folder, 0, f"{size} bytes of source; at most {MAX_PACKAGE_BYTES} are used")
    return files


async def record_package(folder: pathlib.Path, seed: int, isolation: str) -> Recording:
    """Return the recording of a package, of tests that two processes agree on.

    Args:
      folder: of the package.
      seed: of the calls.
      isolation: of the sandbox.

    Raises:
      TaskError: the package cannot be used: too few of its functions can be called.
      SandboxError: a fault of the machine.
    """
    language = language_of(folder)
    files = read_package(folder)
    recorders = LANGUAGES[language].files
    name = folder.resolve().name
    outputs = []
    async with Sandbox(SandboxConfig(isolation=isolation, **_SANDBOX)) as sandbox:
        await sandbox.write_files(
            {name: text.encode() for name, text in {**recorders, **files}.items()}
        )
        recorder = LANGUAGES[language].recorders[0]
        for hash_seed in ("1", "2"):
            result = await sandbox.execute(
                f"python3 -B {recorder} record {shlex.quote(name)} {seed} {MAX_TESTS}"
                " > tests.jsonl",
                timeout=RECORD_SECONDS,
                env={"PYTHONHASHSEED": hash_seed},
            )
            if result.exit_code:
                raise TaskError(folder, 0, f"it cannot be recorded: {result.stderr[-300:]}")
            outputs.append(await sandbox.read_file("tests.jsonl"))
    second = set(outputs[1].splitlines())
    agreed = [line for line in outputs[0].splitlines() if line in second]
    tests = [test for line in agreed if (test := _read_test(line, files)) is not None][:MAX_TESTS]
    if len(tests) < 2 * CASES:
        raise TaskError(
            folder, 0, f"only {len(tests)} tests could be recorded; its functions need more"
        )
    return Recording(name, files, tests, language)


def _read_test(line: bytes, files: dict[str, str]) -> dict[str, Any] | None:
    """Return a recorded test; None where a line is none, for the package may write lines itself."""
    try:
        test = json.loads(line)
        is_sound = (
            len(line) <= MAX_TEST_BYTES
            and isinstance(test["module"], str)
            and all(isinstance(one, str) for one in test["statements"])
            and all(isinstance(shown, str) for _, shown in test["outcome"])
            and len(test["outcome"]) == len(test["statements"]) > 0
            and all(name in files for name in test["lines"])
            and all(isinstance(one, int) for rows in test["lines"].values() for one in rows)
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return test if is_sound else None


def module_draft(recording: Recording, path: str, licence: str = "") -> Draft | None:
    """Return the task of a module without a bug yet; None where too few tests run it.

    Args:
      recording: of the package.
      path: of the module.
      licence: of the package, kept in the task's settings.
    """
    tests = [test for test in recording.tests if path in test["lines"]]
    if len(tests) < 2 * CASES:
        return None
    language = LANGUAGES[recording.language]
    runner = ("python3", "-B", language.recorders[0], "run")
    cases = []
    for start in range(CASES):
        chosen = tests[start::CASES]
        asked = [{"module": one["module"], "statements": one["statements"]} for one in chosen]
        cases.append(
            Case(
                (*runner, f"{{app}}/{path}", path),
                stdin="".join(json.dumps(one) + "\n" for one in asked),
                stdout="\n".join(json.dumps(one["outcome"]) for one in chosen),
            )
        )
    counts = collections.Counter(line for test in tests for line in test["lines"][path])
    # Bugs in lines that few tests run would be detected, and their neighbours' would not.
    lines = sorted(line for line, count in counts.items() if count >= MIN_TESTS_OF_LINE)
    origin = {"package": recording.name}
    if licence:
        origin["license"] = licence
    return Draft(
        name=f"package/{plain_name(recording.name)}",
        domain="software",
        family="repair-package",
        language=recording.language,
        instruction="",
        program=path,
        oracle=recording.files[path],
        cases=cases,
        common={**recording.files, **language.files},
        lines=tuple(lines),
        seconds=CASE_SECONDS,
        origin=origin,
    )


async def package_drafts(
    recording: Recording, count: int, seed: int, isolation: str, licence: str = ""
) -> list[Draft]:
    """Return up to `count` tasks of a package, one bug each, spread over modules and kinds of bugs.

    Bugs are put only where the recorded tests notice nearly all that were tried near them.

    Raises:
      SandboxError: a fault of the machine.
    """
    rng = random.Random(f"packages/{recording.name}/{seed}")
    wholes = [module_draft(recording, path, licence) for path in sorted(recording.files)]
    modules = [whole for whole in wholes if whole is not None]
    rng.shuffle(modules)
    found: list[list[Draft]] = []
    for whole in modules:
        if len(found) >= MODULES and sum(map(len, found)) >= count:
            break
        edits = choose_edits(whole.oracle, whole.language, MAX_TRIED, rng, set(whole.lines))
        programs = [edit.apply(whole.oracle) for edit in edits]
        own, *outcomes = await judge_programs(whole, [whole.oracle, *programs], isolation)
        if own:  # its tests do not hold in another process
            continue
        detected = [edit for edit, faults in zip(edits, outcomes, strict=True) if faults]
        missed = [edit for edit, faults in zip(edits, outcomes, strict=True) if not faults]
        sound = [edit for edit in detected if _is_well_tested(whole.oracle, edit, detected, missed)]
        # First the bugs whose neighbours are detected, too: their verifiers tell most apart.
        sound.sort(key=lambda edit: _neighbours(whole.oracle, edit, missed))
        found.append([_bugged(whole, edit, recording) for edit in sound])
    drafts = []
    while len(drafts) < count and any(found):
        for row in found:
            if row and len(drafts) < count:
                drafts.append(row.pop(0))
    return drafts


def _is_well_tested(
    text: str, edit: Edit, detected: Sequence[Edit], missed: Sequence[Edit]
) -> bool:
    """Return whether the tests notice enough of the edits near one, which is among `detected`."""
    noticed = _neighbours(text, edit, detected)
    tried = noticed + _neighbours(text, edit, missed)
    return tried >= MIN_TRIED_NEAR and noticed >= MIN_NOTICED * tried


def _neighbours(text: str, edit: Edit, others: Sequence[Edit]) -> int:
    """Return how many of some edits lie near one."""
    line = text.count("\n", 0, edit.start)
    return sum(abs(text.count("\n", 0, one.start) - line) <= NEAR_LINES for one in others)


def _bugged(whole: Draft, edit: Edit, recording: Recording) -> Draft:
    """Return the task whose package has one bug; mutants of its proof stay near the bug."""
    line = whole.oracle.count("\n", 0, edit.start) + 1
    near = tuple(other for other in whole.lines if abs(other - line) <= NEAR_LINES)
    files = {**recording.files, whole.program: edit.apply(whole.oracle)}
    kind, where = LANGUAGES[recording.language].words
    shown = []
    for case in whole.cases[:2]:
        asked, expected = case.stdin.splitlines()[0], (case.stdout or "").splitlines()[0]
        test = json.loads(asked)
        outcomes = [text for _, text in json.loads(expected)]
        for statement, outcome in zip(test["statements"][:3], outcomes, strict=False):
            shown.append(f">>> {statement}    # {where.format(test['module'])}\n{outcome}")
    examples = "\n".join(shown)
    draft = dataclasses.replace(
        whole,
        instruction=f"""\
/app/{recording.name} is the {kind} `{recording.name}` with one bug, somewhere in \
/app/{whole.program}. Find it and mend that file; other files are right and stay as they are. The \
package then does what its documentation and its other code say, for example

```
{examples}
```

Other examples and calls of the package's functions are compared with what the package did \
before the bug came in: what they return or print, what the public attributes of its objects hold, \
and how they fail.""",
        files=files,
        lines=near,
        origin={**whole.origin, "bug": edit.operator, "line": line},
    )
    return dataclasses.replace(draft, name=f"{draft.name}-{draft.digest[:10]}")
