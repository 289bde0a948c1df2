"""Commands that need a network, which an embedded sandbox does not have.

They are found in a script before it runs, so that the task is refused with a reason instead of
failing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HERE = r"(?!localhost|127\.|0\.0\.0\.0|\[::1\]|\$)"
NEEDS_NETWORK = re.compile(
    r"\b(?:apt-get|apt|apk|yum|dnf|microdnf|zypper)\s+(?:-\S+\s+)*(?:update|upgrade|dist-upgrade|install|add)\b"
    r"|\b(?:pip3?|pipx|uv\s+pip)\s+install\b(?!.*--no-index)|\buvx\s|\buv\s+(?:run|sync|add|tool)\b"
    r"|\b(?:npm|pnpm|yarn)\s+(?:install|ci|add|i)\b|\bnpx\s"
    rf"|\b(?:curl|wget)\b[^\n|;&]*\bhttps?://{_HERE}|\bgit\s+clone\b[^\n|;&]*(?:https?|ssh|git)://|\bgit\s+clone\b[^\n|;&]*git@"
    r"|\bcargo\s+(?:install|fetch|add)\b|\bgo\s+(?:get|install)\b|\bgo\s+mod\s+download\b|\bgem\s+install\b|\b(?:conda|mamba)\s+(?:install|create)\b"
)
_MAX_CHARS = 1 << 18  # searched of a script
_MAX_ROW_CHARS = 2000  # searched of a line
_APT_PART = re.compile(
    r"\s*(?:sudo\s+)?(?:DEBIAN_FRONTEND=\w+\s+)?apt(?:-get)?\s+(?P<rest>.*)", re.DOTALL
)
_CLEANING = re.compile(r"\s*rm\s+-rf?\s+/var/(?:lib/apt/lists|cache/apt)\S*(?:\s+/var/\S+)*\s*|\s*")
# Packages of a recording harness, or without a program of their own.
_NOT_NEEDED = frozenset(["apt-utils", "asciinema", "ca-certificates", "locales", "tmux", "tzdata"])
_PROGRAMS = {
    "build-essential": ("gcc", "make"),
    "coreutils": ("ls",),
    "findutils": ("find",),
    "gawk": ("awk",),
    "mawk": ("awk",),
    "ripgrep": ("rg",),
    "procps": ("ps",),
    "python3-venv": (),
    "python3-minimal": ("python3",),
    "python-is-python3": ("python",),
    "nodejs": ("node",),
    "golang": ("go",),
    "xz-utils": ("xz",),
    "bsdmainutils": ("column",),
    "openssh-client": ("ssh",),
    "netcat-openbsd": ("nc",),
    "diffutils": ("diff",),
}


def network_need(text: str) -> tuple[int, str] | None:
    """Return (line, command) of a shell script's first command that needs the network.

    Returns None where there is none. Comments do not count.
    """
    return need_in_rows(list(enumerate(text[:_MAX_CHARS].splitlines(), 1)))


def need_in_rows(rows: Iterable[tuple[int, str]]) -> tuple[int, str] | None:
    """Return the same as `network_need` for lines with their numbers.

    Only the beginning of a very long line is searched, so no script can make this slow.
    """
    for number, row in rows:
        without_comment = re.sub(r"(^|\s)#.*", "", row[:_MAX_ROW_CHARS])
        if match := NEEDS_NETWORK.search(without_comment):
            return number, match[0].strip()
    return None


def packages(command: str) -> list[str] | None:
    """Return the Debian packages that a command installs, if it does only that and cleaning up.

    Returns None for any other command.
    """
    found: list[str] = []
    for part in re.split(r"&&|;", command):
        if _CLEANING.fullmatch(part):
            continue
        match = _APT_PART.fullmatch(part)
        words = match["rest"].split() if match else []
        plain = [word for word in words if not word.startswith("-")]
        if not plain or plain[0] not in ("update", "install", "clean", "autoremove", "upgrade"):
            return None
        if plain[0] == "install":
            found += [word.split("=")[0] for word in plain[1:]]
    return found


def programs_of(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each package, the programs that stand for it.

    A package counts as installed where all its programs are there.
    """
    programs = {}
    for name in names:
        programs[name] = () if name in _NOT_NEEDED else _PROGRAMS.get(name, (name,))
    return programs
