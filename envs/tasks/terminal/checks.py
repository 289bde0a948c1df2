"""Checks of the wide families: links, trees, archives, JSON, git, and programs that the agent
wrote.

They extend the checks of `task.py` and keep their rule: nothing the agent left can make them wait,
break or lie. Where a program of the agent's must run, it gets hidden input and only its output
counts, compared by bash itself: the program can neither read the script (see Sandbox.verify) nor
the expected value. A plan lists such checks last, for what it starts may change files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

PRELUDE = r"""
clean() { /usr/bin/env -i PATH=/usr/bin:/bin HOME=/nonexistent LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 OPENSSL_CONF=/dev/null "$@" 2>/dev/null < /dev/null; }
some() { head -c 65536 | tr -d '\000'; }
link() { [ -L "$1" ] || fail; local to; to="$(readlink -- "$1")"; to="${to#./}"; [ "${to%/}" = "$2" ] || fail; }
tree() { folder "$1"; [ "$(find "$1" -mindepth 1 -printf '%y %P\n' | LC_ALL=C sort | head -c 65536)" = "$2" ] || fail; }
permissions() { file "$1"; [ "$(stat -c %a -- "$1")" = "$2" ] || fail; }
archived() { file "$1"; [ "$(clean tar -xOzf "$1" -- "$2" | some)" = "$3" ] || fail; }
archive() { file "$1"; [ "$(clean tar -tzf "$1" | head -c 65536 | sed 's,^\./,,; /\/$/d; /^$/d' | LC_ALL=C sort)" = "$2" ] || fail; }
python() { /usr/bin/env -i PATH=/usr/bin:/bin LANG=C.UTF-8 /usr/bin/python3 -I -c "$1" 2>/dev/null; }
json() { file "$1"; [ "$(head -c 65536 -- "$1" | python 'import json, sys; print(json.dumps(json.load(sys.stdin), sort_keys=True))')" = "$2" ] || fail; }
INI='import configparser, json, sys
read = configparser.ConfigParser(interpolation=None); read.optionxform = str; read.read_file(sys.stdin)
print(json.dumps({name: dict(read[name]) for name in read.sections()}, sort_keys=True))'
ini() { file "$1"; [ "$(head -c 65536 -- "$1" | python "$INI")" = "$2" ] || fail; }
prints() { local want="$1"; shift; [ "$(clean "$@" | some)" = "$want" ] || fail; }
refuses() { if clean "$@" > /dev/null; then fail; fi; }
accepts() { clean "$@" > /dev/null || fail; }
git() { clean env GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_NO_REPLACE_OBJECTS=1 /usr/bin/git --git-dir=.git -c core.fsmonitor=false "$@"; }
committed() { [ "$(git cat-file blob "$1:$2" | some)" = "$3" ] || fail; }
uncommitted() { if git cat-file -e "$1:$2"; then fail; fi; git rev-parse -q --verify "$1" > /dev/null || fail; }
subjects() { [ "$(for commit in $(git rev-list -n 64 "$1"); do git cat-file commit "$commit" | sed -n '/^$/{n;p;q}'; done)" = "$2" ] || fail; }
parents() { [ "$(git rev-list --parents -n 1 "$1" | wc -w)" = "$(($2 + 1))" ] || fail; }
head_is() { [ "$(git symbolic-ref HEAD)" = "refs/heads/$1" ] || fail; }
"""


# Without cached bytecode: what lies in __pycache__ is the agent's, and after a change of equal
# length within a second Python takes it for new.
PYTHON = ("/usr/bin/python3", "-I", "-B", "-X", "pycache_prefix=/dev/null/none")


def _call(name: str, *arguments: str) -> str:
    return " ".join([name, *(shlex.quote(argument) for argument in arguments)])


def link(path: str, target: str) -> str:
    """A symbolic link with this text, but for a leading ./ and a trailing slash."""
    return _call("link", path, target)


def tree(path: str, files: Iterable[str], folders: Iterable[str] = ()) -> str:
    """A folder that has exactly these files and folders below it, all regular."""
    entries = [f"f {name}" for name in files] + [f"d {name}" for name in folders]
    return _call("tree", path, "\n".join(sorted(entries)))


def permissions(path: str, octal: int) -> str:
    return _call("permissions", path, f"{octal:o}")


def archive(path: str, files: dict[str, str]) -> list[str]:
    """A gzipped tar of exactly these files, name -> text."""
    return [
        _call("archive", path, "\n".join(sorted(files))),
        *(_call("archived", path, name, text.rstrip("\n")) for name, text in files.items()),
    ]


def json_holds(path: str, value: Any) -> str:
    """A file of JSON that means this value, however it is laid out."""
    return _call("json", path, json.dumps(value, sort_keys=True))


def ini_holds(path: str, value: dict[str, dict[str, str]]) -> str:
    """An INI file of these sections and keys, however they are ordered."""
    return _call("ini", path, json.dumps(value, sort_keys=True))


def prints(expected: str, *command: str) -> str:
    """The agent's program, run with a clean environment and without input, writes exactly this to
    its standard output.
    """
    return _call("prints", expected.rstrip("\n"), *command)


def python_prints(expected: str, code: str) -> str:
    """Python code that may import the agent's modules from the workspace prints exactly this."""
    return prints(expected, *PYTHON, "-c", f"import sys; sys.path.insert(0, '.')\n{code}")


def committed(revision: str, path: str, text: str) -> str:
    return _call("committed", revision, path, text.rstrip("\n"))


def uncommitted(revision: str, path: str) -> str:
    """The revision is there and has no such file."""
    return _call("uncommitted", revision, path)


def subjects(revision: str, *newest_first: str) -> str:
    """The history of the revision has exactly these commits, named by the first line of their
    messages.
    """
    return _call("subjects", revision, "\n".join(newest_first))


def parents(revision: str, count: int) -> str:
    return _call("parents", revision, str(count))


def head_is(branch: str) -> str:
    return _call("head_is", branch)
