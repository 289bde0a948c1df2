"""A program that looks through folders in a workspace; `walking` runs its text by python3 there.

It imports the standard library only, and runs on Python 3.7 and later. Its one argument is a JSON
object with `op` ("list", "glob" or "search"), `path`, and what the operation needs. It prints one
JSON object a line, the last one {"end": true}.

What .gitignore names is passed over, as git does it, so is what .iflowignore at the top names, and
.git.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import sys
from typing import Any, Iterator, NamedTuple  # noqa: UP035

MAX_SEARCHED = 32 << 20  # bytes of a file
MAX_LINE = 500  # characters that are printed


class Rule(NamedTuple):
    """A line of an ignore file: about paths below `folder`; `ignores` is False after a "!"."""

    folder: str
    pattern: list[str]
    ignores: bool
    is_for_folders: bool


def split_glob(glob: str) -> list[str] | None:
    """Return a pattern of .gitignore as one for each part of a path; None for a wrong one."""
    if (len(glob) - len(glob.rstrip("\\"))) % 2:
        return None
    glob = re.sub(r"\\([*?[])", r"[\1]", glob).replace("[^", "[!")
    parts = re.sub(r"\\(.)", r"\1", glob).lstrip("/").split("/")
    return parts if "/" in glob else ["**", *parts]


def fits(path: list[str], glob: list[str]) -> bool:
    """Return whether the parts of a path fit a pattern; ** stands for any of them."""
    if not glob:
        return not path
    rest = glob[1:]
    if glob[0] != "**":
        return bool(path) and fnmatch.fnmatchcase(path[0], glob[0]) and fits(path[1:], rest)
    if not rest:
        return bool(path)
    if "**" not in rest:
        return len(path) >= len(rest) and fits(path[-len(rest) :], rest)
    return any(fits(path[place:], rest) for place in range(len(path)))


def expand_braces(glob: str) -> list[str]:
    """Return the patterns that {a,b} stands for."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", glob)
    if not found:
        return [glob]
    before, after = glob[: found.start()], glob[found.end() :]
    return [
        one for part in found.group(1).split(",") for one in expand_braces(before + part + after)
    ]


def read_rules(folder: str, relative: str) -> list[Rule]:
    """Return the rules of the ignore files of a folder."""
    rules = []
    names = [".gitignore"]
    if not relative:
        names = [".git/info/exclude", ".gitignore", ".iflowignore"]
    for name in names:
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read(1 << 20).split("\n")
        except (OSError, ValueError):
            continue
        found = [parse_rule(line.rstrip("\r"), relative) for line in lines]
        rules += [rule for rule in found if rule is not None]
    return rules


def parse_rule(line: str, folder: str) -> Rule | None:
    """Return the rule of a line of an ignore file; None where it has none."""
    line = re.sub(r"(?<!\\) +\Z", "", line)
    if not line or line.startswith("#"):
        return None
    ignores = not line.startswith("!")
    if not ignores:
        line = line[1:]
    is_for_folders = line.endswith("/")
    if is_for_folders:
        line = line[:-1]
    pattern = split_glob(line) if line else None
    return None if pattern is None else Rule(folder, pattern, ignores, is_for_folders)


def is_ignored(rules: list[Rule], relative: str, is_folder: bool) -> bool:
    """Return whether a path is passed over: the last rule that fits decides."""
    for rule in reversed(rules):
        if rule.is_for_folders and not is_folder:
            continue
        inner = relative[len(rule.folder) + 1 :] if rule.folder else relative
        if fits(inner.split("/"), rule.pattern):
            return rule.ignores
    return False


def walk(root: str, start: str) -> Iterator[str]:
    """Yield the files below a folder, relative to it, in order of their paths.

    Ignore files count from the project's root on; outside of it, from the folder on.
    """
    inside = start == root or start.startswith(root.rstrip("/") + "/")
    base = root if inside else start
    relative = "" if start == base else os.path.relpath(start, base)
    rules: list[Rule] = []
    above = ""
    for part in relative.split("/") if relative else ():
        rules += read_rules(os.path.join(base, above), above)
        above = above + "/" + part if above else part
    yield from walk_below(base, relative, rules, len(relative) + 1 if relative else 0)


def walk_below(base: str, relative: str, rules: list[Rule], cut: int) -> Iterator[str]:
    folder = os.path.join(base, relative)
    rules = rules + read_rules(folder, relative)
    try:
        with os.scandir(folder) as found:
            # As paths sort, a folder comes where its name with a slash does; a link is no folder.
            names = sorted(e.name + "/" * e.is_dir(follow_symlinks=False) for e in found)
    except OSError:
        return
    for name in names:
        is_folder = name.endswith("/")
        path = os.path.join(relative, name.rstrip("/"))
        if name in (".git", ".git/") or is_ignored(rules, path, is_folder):
            continue
        if is_folder:
            yield from walk_below(base, path, rules, cut)
        else:
            yield path[cut:]


def list_folder(path: str) -> None:
    """Print the entries of a folder."""
    with os.scandir(path) as found:
        for entry in sorted(found, key=lambda one: one.name):
            try:
                status = entry.stat()
                kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
                size = status.st_size
            except OSError:  # a link that leads nowhere
                kind, size = "link", 0
            show({"name": entry.name, "kind": kind, "size": size})


def search(request: dict[str, Any], paths: Iterator[str]) -> None:
    """Print the lines that fit, and those around them."""
    pattern = re.compile(request["pattern"], re.IGNORECASE if request.get("ignore_case") else 0)
    around = request.get("context", 0)
    left = request["limit"]
    for path in paths:
        lines = read_lines(path)
        printed = -1
        for number, line in enumerate(lines):
            if not pattern.search(line):
                continue
            for near in range(
                max(printed + 1, number - around), min(len(lines), number + around + 1)
            ):
                is_match = near == number or bool(pattern.search(lines[near]))
                text = lines[near][:MAX_LINE]
                show({"path": path, "number": near + 1, "text": text, "is_match": is_match})
                printed = near
            left -= 1
            if left <= 0:
                return


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file; none of any other."""
    try:
        # A FIFO would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SEARCHED:
                return []
            data = file.read()
    except OSError:
        return []
    if b"\0" in data[:8192]:
        return []
    lines = data.decode("utf-8", "replace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line[:-1] if line.endswith("\r") else line for line in lines]


def show(value: dict[str, Any]) -> None:
    """Print an object; JSON escapes make any name printable."""
    sys.stdout.write(json.dumps(value) + "\n")


def main(text: str) -> None:
    """Do what a request asks."""
    request = json.loads(text)
    path = request["path"]
    if request["op"] == "list":
        list_folder(path)
        return
    globs = [split_glob(one) for one in expand_braces(request.get("glob") or "**")]
    if not os.path.isdir(path):
        os.stat(path)
        found = [(path, os.path.basename(path))]
    else:
        names = walk(request["root"], path)
        found = ((os.path.join(path, name), name) for name in names)  # type: ignore[assignment]
    fitting = (
        (place, name) for place, name in found if any(g and fits(name.split("/"), g) for g in globs)
    )
    if request["op"] == "search":
        search(request, (place for place, _ in fitting))
        return
    for count, (_, name) in enumerate(fitting):
        if count >= request["limit"]:
            break
        show({"name": name})


if __name__ == "__main__":
    try:
        main(sys.argv[1])
        show({"end": True})
    except re.error as problem:
        print("the pattern is no regular expression: " + str(problem))
    except OSError as problem:
        print(str(problem.filename) + ": " + str(problem.strerror))
    except (BrokenPipeError, RecursionError) as problem:
        print(type(problem).__name__)
