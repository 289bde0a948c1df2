"""A program that looks through folders in a workspace; `walking` runs its text by python3 there.

It imports the standard library only, and runs on Python 3.7 and later. Its one argument is a JSON
object with `op` ("list", "glob" or "search"), `path`, and what the operation needs. It prints one
JSON object a line, the last one {"end": true}.

What .gitignore names is passed over, as git does it, so is what .iflowignore at the top names, and
.git.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from typing import Any, Iterator, NamedTuple, Pattern  # noqa: UP035

MAX_SEARCHED = 32 << 20  # bytes of a file
MAX_LINE = 500  # characters that are printed


class Rule(NamedTuple):
    """A line of an ignore file: about paths below `folder`; `ignores` is False after a "!"."""

    folder: str
    pattern: Pattern[str]
    ignores: bool
    is_for_folders: bool


def translate(glob: str) -> str:
    """Return the regular expression of a pattern of .gitignore, about a relative path."""
    anchored = "/" in glob
    glob = glob.lstrip("/")
    out = "" if anchored else "(?:.*/)?"
    place = 0
    while place < len(glob):
        rest = glob[place:]
        at_start = place == 0 or glob[place - 1] == "/"
        bracket = re.match(r"\[[!^]?\]?(?:\[:\w+:\]|\\.|[^\]\\])*\]", rest)
        if at_start and rest.startswith("**/"):
            out += "(?:.*/)?"
            place += 3
        elif at_start and rest == "**":
            out += ".*" if place == 0 else ".+"
            place += 2
        elif rest.startswith("*"):
            out += "[^/]*"
            place += len(rest) - len(rest.lstrip("*"))
        elif rest.startswith("?"):
            out += "[^/]"
            place += 1
        elif bracket:
            out += bracket_expression(bracket.group())
            place += bracket.end()
        else:
            if rest.startswith("\\") and len(rest) > 1:
                place += 1
            out += re.escape(glob[place])
            place += 1
    return out


def bracket_expression(text: str) -> str:
    """Return the regular expression of a set of characters, which never has a slash."""
    inner = text[1:-1]
    negated = inner[:1] in ("!", "^")
    if negated:
        inner = inner[1:]
    for name, members in (("digit", "0-9"), ("alpha", "a-zA-Z"), ("alnum", "a-zA-Z0-9")):
        inner = inner.replace("[:" + name + ":]", members)
    inner = inner.replace("[", "\\[").replace("]", "\\]").replace("&&", "&\\&")
    if inner.startswith("^"):
        inner = "\\" + inner
    return "(?!/)[" + ("^" if negated else "") + inner + "]"


def compile_glob(glob: str) -> Pattern[str] | None:
    """Return a compiled pattern; None for one that means nothing."""
    try:
        return re.compile("(?s:" + translate(glob) + r")\Z")
    except re.error:
        return None


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
        try:
            with open(
                os.path.join(folder, name), encoding="utf-8", errors="surrogateescape"
            ) as file:
                lines = file.read(1 << 20).split("\n")
        except (OSError, ValueError):
            continue
        for line in lines:
            rule = parse_rule(line.rstrip("\r"), relative)
            if rule is not None:
                rules.append(rule)
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
    pattern = compile_glob(line) if line else None
    return None if pattern is None else Rule(folder, pattern, ignores, is_for_folders)


def is_ignored(rules: list[Rule], relative: str, is_folder: bool) -> bool:
    """Return whether a path is passed over: the last rule that fits decides."""
    for rule in reversed(rules):
        if rule.is_for_folders and not is_folder:
            continue
        inner = relative[len(rule.folder) + 1 :] if rule.folder else relative
        if rule.pattern.match(inner):
            return rule.ignores
    return False


def walk(root: str, start: str) -> Iterator[str]:
    """Yield the files below a folder, relative to it, in order of their paths.

    Args:
      root: of the project, from which on ignore files count.
      start: a folder; outside the project its own ignore files count only.
    """
    inside = start == root or start.startswith(root.rstrip("/") + "/")
    base = root if inside else start
    rules: list[Rule] = []
    relative = ""
    if start != base:
        rules += read_rules(base, "")
        parts = os.path.relpath(start, base).split("/")
        for part in parts[:-1]:
            relative = relative + "/" + part if relative else part
            rules += read_rules(os.path.join(base, relative), relative)
        relative = "/".join(parts)
    yield from walk_below(base, relative, rules, len(relative) + 1 if relative else 0)


def walk_below(base: str, relative: str, rules: list[Rule], cut: int) -> Iterator[str]:
    folder = os.path.join(base, relative)
    rules = rules + read_rules(folder, relative)
    try:
        with os.scandir(folder) as found:
            # As paths sort, a folder comes where its name with a slash does.
            entries = sorted((e.name + "/" * is_folder(e), e) for e in found)
    except OSError:
        return
    for name, entry in entries:
        path = relative + "/" + entry.name if relative else entry.name
        if entry.name == ".git" or is_ignored(rules, path, name.endswith("/")):
            continue
        if name.endswith("/"):
            yield from walk_below(base, path, rules, cut)
        else:
            yield path[cut:]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder itself; a link to one is none."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


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
    globs = [compile_glob(one) for one in expand_braces(request.get("glob") or "**")]
    if not os.path.isdir(path):
        os.stat(path)
        found = [(path, os.path.basename(path))]
    else:
        names = walk(request["root"], path)
        found = ((os.path.join(path, name), name) for name in names)  # type: ignore[assignment]
    fitting = ((place, name) for place, name in found if any(g and g.match(name) for g in globs))
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
