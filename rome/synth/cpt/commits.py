"""Documents of commits: which places to change, the change itself, and tests that show it.

A commit's message stands for the issue. Every answer is checked: blocks of a repair are applied and
make the commit's files; tests are run before and after in a sandbox.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping

from envs.tasks.git import RepositoryError
from rome.synth.cpt.document import Document, make_document
from rome.synth.cpt.edits import EditError, write_edits
from rome.synth.cpt.execute import Runs, Tree
from rome.synth.cpt.repository import Commit, Repository, read_tree

MAX_SHOWN_CHARACTERS = 60_000  # of the files that a document shows
MAX_LISTED_FILES = 400
MIN_MESSAGE_WORDS = 3
_TEST = re.compile(r"(^|/)(tests?/.*|test_[^/]*|[^/]*_test)\.py$")
_CODE = re.compile(r"\.(py|js|ts|tsx|go|rs|c|h|cc|cpp|hpp|java|rb|sh|php|swift|kt|scala|lua|sql)$")


def is_test(path: str) -> bool:
    """Return whether a path is that of a Python file of tests."""
    return bool(_TEST.search(path))


def localisation_document(
    repository: Repository, commit: Commit, paths: list[str]
) -> Document | str:
    """Return the document that asks where to change what, or the reason why there is none.

    Args:
      repository: of the commit.
      commit: whose changed files and functions are the answer.
      paths: all files of its parent.
    """
    if fault := _message_fault(commit):
        return fault
    changed = [path for path in sorted(commit.before) if _CODE.search(path)]
    if not changed:
        return "changes no code that was there"
    listed = _near_paths(paths, changed)
    answer = []
    for path in changed:
        places = changed_places(commit.before[path], commit.after.get(path, ""), path)
        answer.append(f"{path}: {places}")
    text = (
        f"# Repository {repository.name}\n\n## Files\n" + "\n".join(listed) + "\n\n"
        f"## Issue\n{commit.message}\n\n## Where to change the code\n" + "\n".join(answer) + "\n"
    )
    return make_document("localisation", [text], _origin(repository, commit))


def repair_document(repository: Repository, commit: Commit) -> Document | str:
    """Return the document that asks for a commit's change, or the reason why there is none."""
    if fault := _message_fault(commit):
        return fault
    if not any(_CODE.search(path) for path in commit.before):
        return "changes no code that was there"
    if sum(map(len, commit.before.values())) > MAX_SHOWN_CHARACTERS:
        return f"its files have more than {MAX_SHOWN_CHARACTERS} characters"
    try:
        blocks = write_edits(commit.before, commit.after)
    except EditError as error:
        return str(error)
    text = (
        f"# Repository {repository.name}\n\n## Issue\n{commit.message}\n\n## Files\n"
        f"{show_files(commit.before)}\n## Change\n{blocks}"
    )
    return make_document("repair", [text], _origin(repository, commit))


async def tests_document(repository: Repository, commit: Commit, runs: Runs) -> Document | str:
    """Return the document that asks for a commit's tests, or the reason why there is none.

    Its tests fail on the sources before the commit, and pass twice on those after it.

    Args:
      repository: of the commit.
      commit: that changes sources and tests.
      runs: runs tests in sandboxes.
    """
    if fault := _message_fault(commit):
        return fault
    every = {path: text for path, text in commit.after.items() if is_test(path)}
    tests = {path: text for path, text in every.items() if runs.takes(path)}
    sources = {
        path: text
        for path, text in commit.before.items()
        if path.endswith(".py") and not is_test(path)
    }
    if not tests or not sources:
        return "changes no Python source together with tests"
    if sum(map(len, [*tests.values(), *sources.values()])) > MAX_SHOWN_CHARACTERS:
        return f"its files have more than {MAX_SHOWN_CHARACTERS} characters"
    if lacking := await runs.lacking(tests.values()):
        return f"its tests need {lacking}, which the sandbox's Python does not have"
    try:
        tree, _ = read_tree(repository, commit.id)
    except RepositoryError as error:
        return f"its tree cannot be read: {error}"
    old_sources = {path: commit.before.get(path) for path in commit.after if path not in every}
    modules = sorted(tests)
    outcomes = await runs.run(
        tree, [Tree(old_sources, modules), Tree({}, modules), Tree({}, modules)]
    )
    if isinstance(outcomes, str):
        return outcomes
    old, new, again = outcomes
    if new != again:
        return "its tests are flaky"
    if not new or set(new.values()) - {"passed", "skipped"}:
        return "not all of its tests pass in the sandbox"
    shown = sorted(name for name, what in new.items() if what == "passed" and old.get(name) != what)
    if not shown:
        return "its tests pass before the commit, too"
    text = (
        f"# Repository {repository.name}\n\n## Issue\n{commit.message}\n\n## Files\n"
        f"{show_files(sources)}\n## Tests that fail until this is done\n{show_files(tests)}"
    )
    origin = _origin(repository, commit) | {"fails_before": shown}
    return make_document("tests", [text], origin)


def _origin(repository: Repository, commit: Commit) -> dict[str, object]:
    return {
        "repository": repository.name,
        "commit": commit.id,
        "licence": repository.licence,
        "paths": sorted(commit.before | commit.after),
    }


def _message_fault(commit: Commit) -> str:
    words = len(commit.message.split())
    return "" if words >= MIN_MESSAGE_WORDS else f"its message has {words} words"


def show_files(files: Mapping[str, str]) -> str:
    """Return files with their paths, fenced by a line that none of them holds."""
    fence = "```"
    while any(fence in text for text in files.values()):
        fence += "`"
    shown = []
    for path, text in sorted(files.items()):
        end = "" if text.endswith("\n") or not text else "\n"
        shown.append(f"{path}\n{fence}\n{text}{end}{fence}\n")
    return "".join(shown)


def _near_paths(paths: list[str], changed: list[str]) -> list[str]:
    """Return paths to choose from: of a large repository those in the same folders first."""
    if len(paths) <= MAX_LISTED_FILES:
        return sorted(paths)
    folders = {path.rpartition("/")[0] for path in changed}
    near = [path for path in sorted(paths) if path.rpartition("/")[0] in folders]
    rest = sorted(set(paths) - set(near))
    step = max(1, len(rest) // MAX_LISTED_FILES)
    chosen = set(changed) | set(near[:MAX_LISTED_FILES])
    for path in rest[::step]:
        if len(chosen) >= MAX_LISTED_FILES:
            break
        chosen.add(path)
    return sorted(chosen)


def changed_places(before: str, after: str, path: str) -> str:
    """Return which lines of the old file change, and which functions hold them."""
    old = before.split("\n")
    matcher = difflib.SequenceMatcher(None, old, after.split("\n"), autojunk=False)
    spans = [
        (i1 + 1, max(i1 + 1, i2)) for kind, i1, i2, _, _ in matcher.get_opcodes() if kind != "equal"
    ]
    lines = ", ".join(f"{start}-{end}" if end > start else str(start) for start, end in spans)
    names = _functions_of(before, spans) if path.endswith(".py") else []
    return f"lines {lines}" + (f" ({', '.join(names)})" if names else "")


def _functions_of(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return the functions and classes, innermost first come, that hold some of the lines."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: dict[str, None] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            name = f"{prefix}{child.name}"
            first, last = child.lineno, child.end_lineno or child.lineno
            if any(start <= last and end >= first for start, end in spans):
                found[name] = None
            visit(child, f"{name}.")

    visit(tree, "")
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return inner
