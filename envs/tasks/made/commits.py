"""Repair tasks from the commits of any git repository: fails before, passes after.

A commit is a task where it changes one Python source and some tests, where tests of its own fail on
the source as it was, and where all of them pass on the source as it became. Tests run in sandboxes
only; git reads objects without the repository's settings, hooks and filters.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import re

from envs.rock import Sandbox, SandboxConfig
from envs.tasks.git import RepositoryError, content_of, git
from envs.tasks.harbor.errors import TaskError
from envs.tasks.made.draft import Case, Draft, is_plain_path, plain_name

MAX_TREE_BYTES = 2 << 20
MAX_FILES = 300
MAX_SUBJECT = 500  # characters of a message that the task shows
CASE_SECONDS = 60.0  # for all tests of the repository
_TEST = re.compile(r"(^|/)(tests?/.*|test_[^/]*|[^/]*_test)\.py$")
_LFS = b"version https://git-lfs.github.com/spec/"
_HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)
# Puts the agent's file into the tree, runs the tests of unittest, and prints what became of each.
# A test that must fail keeps a patched unittest from passing.
_RUNNER = """\
import io, json, secrets, shutil, sys, unittest
shutil.copyfile(sys.argv[1], sys.argv[2])
run, load = unittest.TestCase.run, unittest.defaultTestLoader.loadTestsFromName
check = unittest.TestCase.assertEqual
sys.path.insert(0, ".")
sys.stdout, real = io.StringIO(), sys.stdout
outcomes = {}
class Result(unittest.TestResult):
    def addSuccess(self, test): outcomes[test.id()] = "passed"
    def addFailure(self, test, error): outcomes[test.id()] = "failed"
    def addError(self, test, error): outcomes[test.id()] = "error"
    def addSkip(self, test, reason): outcomes[test.id()] = "skipped"
class Control(unittest.TestCase):
    def test(self): self.assertEqual(secrets.token_hex(4), "")
control = Control("test")
for name in json.loads(sys.argv[3]):
    unittest.defaultTestLoader.loadTestsFromName(name).run(Result())
control.run(Result())
sound = unittest.TestCase.run is run and unittest.TestCase.assertEqual is check
ended = outcomes.pop(control.id(), "") == "failed" and sound
for name in sorted(outcomes):
    real.write(name + " " + outcomes[name] + "\\n")
real.write("end\\n" if ended else "spoiled\\n")
real.flush()
"""


@dataclasses.dataclass(frozen=True)
class _Change:
    """What a commit changes.

    Attributes:
      source: path of the one source.
      before: its text in the parent.
      after: the text files of the commit, by path.
      modules: the tests of unittest.
      subject: of its message.
      lines: of the source that are new, and those around them.
    """

    source: str
    before: str
    after: dict[str, str]
    modules: list[str]
    subject: str
    lines: tuple[int, ...]


async def commit_draft(
    repository: pathlib.Path, commit: str, isolation: str, licence: str = ""
) -> Draft | str:
    """Return the task of a commit, or the reason why it is none.

    Args:
      repository: local, bare or with a working tree.
      commit: with one parent.
      isolation: of the sandboxes.
      licence: of the repository.

    Raises:
      TaskError: the repository cannot be read.
      SandboxError: a fault of the machine.
    """
    try:  # in a thread: reading a large repository must not hold up other work
        change = await asyncio.to_thread(_read_change, repository, commit)
    except (RepositoryError, UnicodeDecodeError) as error:
        raise TaskError(repository, 0, f"commit {commit[:12]}: {error}") from error
    if isinstance(change, str):
        return change
    return await _proven(repository, commit, change, isolation, licence)


def _read_change(repository: pathlib.Path, commit: str) -> _Change | str:
    """Return what a commit changes, or why it gives no task; plumbing commands of git only."""
    listed = git(
        repository,
        "diff-tree",
        "-r",
        "-z",
        "--no-commit-id",
        "--name-status",
        "--no-renames",
        commit,
    )
    fields = listed.decode(errors="replace").split("\0")
    rows = dict(zip(fields[1::2], fields[::2], strict=False))  # path -> A, M, D, T
    python = [path for path in rows if path.endswith(".py")]
    sources = [path for path in python if not _TEST.search(path)]
    tests = [path for path in python if _TEST.search(path)]
    if len(sources) != 1 or rows[sources[0]] != "M" or not tests:
        return f"changes {len(sources)} sources and {len(tests)} tests; one and some are needed"
    source = sources[0]
    after = _tree(repository, commit)
    if isinstance(after, str):
        return after
    if source not in after:
        return f"{source!r} is too large, no text, a pointer of Git LFS, or has an odd name"
    modules = sorted(
        path.removesuffix(".py").replace("/", ".")
        for path in after
        if _is_unittest(path, after[path])
    )
    if not modules:
        return "no tests of unittest are in its tree"
    before = content_of(repository, f"{commit}^:{source}", source).decode()
    if before.encode().startswith(_LFS):
        return f"{source!r} was a pointer of Git LFS"
    options = ("-p", "--no-ext-diff", "--no-textconv", "-U0")
    hunks = git(repository, "diff-tree", *options, f"{commit}^", commit, "--", source)
    return _Change(source, before, after, modules, _subject(repository, commit), _lines(hunks))


def _subject(repository: pathlib.Path, commit: str) -> str:
    """Return the first paragraph of a commit's message, in one line."""
    text = git(repository, "cat-file", "commit", commit).decode(errors="replace")
    _, _, message = text.partition("\n\n")
    paragraph = message.strip().partition("\n\n")[0]
    return " ".join(paragraph.split())[:MAX_SUBJECT]


def _is_unittest(path: str, text: str) -> bool:
    return bool(_TEST.search(path)) and "unittest" in text and "import pytest" not in text


def _tree(repository: pathlib.Path, commit: str) -> dict[str, str] | str:
    """Return the text files of a commit, or why they cannot be used."""
    found = {}
    size = 0
    rows = git(repository, "ls-tree", "-r", "-z", "--long", commit).split(b"\0")
    for row in rows:
        if not row:
            continue
        about, _, raw = row.partition(b"\t")
        mode, kind, name, length = about.split()
        if kind != b"blob" or mode == b"120000" or int(length) > MAX_TREE_BYTES:
            continue
        size += int(length)
        if size > MAX_TREE_BYTES or len(found) >= MAX_FILES:
            return f"its tree has more than {MAX_FILES} files or {MAX_TREE_BYTES} bytes"
        content = git(repository, "cat-file", "blob", name.decode())
        if content.startswith(_LFS):
            continue
        try:
            path, text = raw.decode(), content.decode()
        except UnicodeDecodeError:
            continue  # a picture, an archive: no source
        if is_plain_path(path):  # git lets a tree name `..`, and folders are written from it
            found[path] = text
    return found


def _lines(hunks: bytes) -> tuple[int, ...]:
    """Return the lines of the new file that a diff changes, and those around them."""
    found: set[int] = set()
    for match in _HUNK.finditer(hunks.decode(errors="replace")):
        start, length = int(match[1]), int(match[2] or 1)
        found |= set(range(max(1, start - 12), start + length + 12))
    return tuple(sorted(found))


async def _proven(
    repository: pathlib.Path, commit: str, change: _Change, isolation: str, licence: str
) -> Draft | str:
    """Return the task if its tests tell the source before from the one after."""
    source, before, after = change.source, change.before, change.after
    argv = ("python3", "-B", "-c", _RUNNER, f"{{app}}/{source}", source, json.dumps(change.modules))
    visible = {path: text for path, text in after.items() if not _TEST.search(path)}
    draft = Draft(
        name=f"commit/{plain_name(repository.resolve().name)}-{commit[:10]}",
        domain="software",
        family="repair-commit",
        language="python",
        instruction=f"""\
A repository lies in /app. Change /app/{source} so that it does what this commit message says; \
other files stay as they are:

> {change.subject}

The repository's tests, new ones among them, are run on your file.""",
        program=source,
        oracle=after[source],
        cases=[Case(argv, stdout="end")],
        files={**visible, source: before},
        common=after,
        lines=change.lines,
        seconds=CASE_SECONDS,
        origin={"repository": repository.resolve().name, "commit": commit, "license": licence},
    )
    outcomes = [
        await _outcomes(draft, text, argv, isolation)
        for text in (before, after[source], after[source])
    ]
    old, new, again = outcomes
    if new != again or not new.endswith("end"):
        return "its tests are flaky or do not end"
    if "error" in new or "failed" in new:
        kept = [line for line in new.splitlines() if not line.endswith((" error", " failed"))]
        if len(kept) < 2:
            return "its own tests do not pass"
        return "some of its tests fail after the commit"
    if old == new:
        return "its tests pass before the commit, too"
    return _with_cases(draft, new, argv)


def _with_cases(draft: Draft, stdout: str, argv: tuple[str, ...]) -> Draft:
    return dataclasses.replace(draft, cases=[Case(argv, stdout=stdout)])


async def _outcomes(draft: Draft, text: str, argv: tuple[str, ...], isolation: str) -> str:
    """Return what the runner prints for a source."""
    config = SandboxConfig(isolation=isolation, memory_mb=512, disk_mb=64, pids=64, inodes=16_384)
    arguments = [part.replace("{app}", "app") for part in argv]
    async with Sandbox(config) as sandbox:
        files = {f"tree/{name}": content.encode() for name, content in draft.common.items()}
        await sandbox.write_files({**files, f"tree/app/{draft.program}": text.encode()})
        await sandbox.write_files({"argv.json": json.dumps(arguments).encode()})
        result = await sandbox.execute(
            "cd tree && exec python3 -c 'import json, os;"
            ' argv = json.load(open("../argv.json")); os.execvp(argv[0], argv)\'',
            timeout=60.0,
        )
    return result.stdout.strip()
