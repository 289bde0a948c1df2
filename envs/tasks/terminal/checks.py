"""Checks of the wide families: links, trees, archives, JSON, git and programs that the agent wrote.

They extend the checks of `task.py` and keep their rule: nothing that the agent left behind can make
them wait, break or lie. A program of the agent's runs on hidden input, and bash itself compares its
output: the program can read neither the script (see Sandbox.verify) nor the expected value. A draft
lists such checks last, because the programs they start may change files.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

_SCRIPT = r"""
clean() { /usr/bin/env -i PATH=/usr/bin:/bin HOME=/nonexistent LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 OPENSSL_CONF=/dev/null "$@" 2>/dev/null < /dev/null; }
some() { head -c 65536 | tr -d '\000'; }
link() { [ -L "$1" ] || fail; local to; to="$(readlink -- "$1")"; to="${to#./}"; \
    [ "${to%/}" = "$2" ] || fail; }
tree() { folder "$1"; [ "$(find "$1" -mindepth 1 -printf '%y %P\n' | LC_ALL=C sort | \
    head -c 65536)" = "$2" ] || fail; }
permissions() { file "$1"; [ "$(stat -c %a -- "$1")" = "$2" ] || fail; }
archived() { file "$1"; [ "$(clean tar -xOzf "$1" -- "$2" | some)" = "$3" ] || fail; }
archive() { file "$1"; [ "$(clean tar -tzf "$1" | head -c 65536 | \
    sed 's,^\./,,; /\/$/d; /^$/d' | LC_ALL=C sort)" = "$2" ] || fail; }
python() { /usr/bin/env -i PATH=/usr/bin:/bin LANG=C.UTF-8 /usr/bin/python3 -I -c "$1" \
    2>/dev/null; }
json() { file "$1"; [ "$(head -c 65536 -- "$1" | python 'import json, sys; \
    print(json.dumps(json.load(sys.stdin), sort_keys=True))')" = "$2" ] || fail; }
INI='import configparser, json, sys
read = configparser.ConfigParser(interpolation=None); read.optionxform = str; \
    read.read_file(sys.stdin)
print(json.dumps({name: dict(read[name]) for name in read.sections()}, sort_keys=True))'
ini() { file "$1"; [ "$(head -c 65536 -- "$1" | python "$INI")" = "$2" ] || fail; }
prints() { local want="$1"; shift; [ "$(clean "$@" | some)" = "$want" ] || fail; }
refuses() { if clean "$@" > /dev/null; then fail; fi; }
accepts() { clean "$@" > /dev/null || fail; }
git() { clean env GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_NO_REPLACE_OBJECTS=1 \
    /usr/bin/git --git-dir=.git -c core.fsmonitor=false "$@"; }
committed() { [ "$(git cat-file blob "$1:$2" | some)" = "$3" ] || fail; }
uncommitted() { if git cat-file -e "$1:$2"; then fail; fi; \
    git rev-parse -q --verify "$1" > /dev/null || fail; }
subjects() { [ "$(for commit in $(git rev-list -n 64 "$1"); \
    do git cat-file commit "$commit" | sed -n '/^$/{n;p;q}'; done)" = "$2" ] || fail; }
parents() { [ "$(git rev-list --parents -n 1 "$1" | wc -w)" = "$(($2 + 1))" ] || fail; }
head_is() { [ "$(git symbolic-ref HEAD)" = "refs/heads/$1" ] || fail; }
"""
# The functions above, each on one line: the lines that end in a backslash are joined.
PRELUDE = re.sub(r"\\\n *", "", _SCRIPT)

# Runs without cached bytecode: files in __pycache__ are the agent's, and Python takes them for
# current if the source changed within the same second and kept its length.
PYTHON = ("/usr/bin/python3", "-I", "-B", "-X", "pycache_prefix=/dev/null/none")


def _call(name: str, *arguments: str) -> str:
    return " ".join([name, *(shlex.quote(argument) for argument in arguments)])


def link(path: str, target: str) -> str:
    """Return a check of a symbolic link's target, except for a leading ./ and a trailing slash."""
    return _call("link", path, target)


def tree(path: str, files: Iterable[str], folders: Iterable[str] = ()) -> str:
    """Return a check that a folder contains exactly these files and folders, all regular."""
    entries = [f"f {name}" for name in files] + [f"d {name}" for name in folders]
    return _call("tree", path, "\n".join(sorted(entries)))


def permissions(path: str, octal: int) -> str:
    """Return a check that a file has exactly these permissions."""
    return _call("permissions", path, f"{octal:o}")


def archive(path: str, files: dict[str, str]) -> list[str]:
    """Return checks that a gzipped tar contains exactly these files, given as name -> text."""
    return [
        _call("archive", path, "\n".join(sorted(files))),
        *(_call("archived", path, name, text.rstrip("\n")) for name, text in files.items()),
    ]


def json_holds(path: str, value: Any) -> str:
    """Return a check that a JSON file has this value, whatever its layout."""
    return _call("json", path, json.dumps(value, sort_keys=True))


def ini_holds(path: str, value: dict[str, dict[str, str]]) -> str:
    """Return a check that an INI file has these sections and keys, in any order."""
    return _call("ini", path, json.dumps(value, sort_keys=True))


def hidden_files(files: Mapping[str, str]) -> list[str]:
    """Return shell lines that lay out files for the checks after them, which no agent has seen.

    The output of an agent's program on files that the agent knew could be written into the program.
    Paths have a folder; whatever lies at that folder is removed.
    """
    folders = sorted({path.rpartition("/")[0] for path in files})
    tops = sorted({folder.partition("/")[0] for folder in folders})
    steps = [f"rm -rf -- {shlex.join(tops)}", f"mkdir -p -- {shlex.join(folders)} || fail"]
    for path, text in files.items():
        steps.append(f"printf %s {shlex.quote(text)} > {shlex.quote(path)} || fail")
    return steps


def prints(expected: str, *command: str) -> str:
    """Return a check that a program prints exactly this when run without input and environment."""
    return _call("prints", expected.rstrip("\n"), *command)


def python_prints(expected: str, code: str) -> str:
    """Return a check that Python code, which may import the agent's modules, prints this text."""
    return prints(expected, *PYTHON, "-c", f"import sys; sys.path.insert(0, '.')\n{code}")


def committed(revision: str, path: str, text: str) -> str:
    """Return a check that a file has this text at a revision."""
    return _call("committed", revision, path, text.rstrip("\n"))


def uncommitted(revision: str, path: str) -> str:
    """Return a check that a revision exists and does not contain the file."""
    return _call("uncommitted", revision, path)


def subjects(revision: str, *newest_first: str) -> str:
    """Return a check that a revision's history has exactly these commit subjects."""
    return _call("subjects", revision, "\n".join(newest_first))


def parents(revision: str, count: int) -> str:
    """Return a check that a revision has this many parents."""
    return _call("parents", revision, str(count))


def head_is(branch: str) -> str:
    """Return a check that HEAD points to this branch."""
    return _call("head_is", branch)
