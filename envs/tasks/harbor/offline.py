"""What an embedded sandbox has no network for: found in a script before it runs, so that the task
is refused by name and not failed.
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
_LOOKED_AT, _ROW_LOOKED_AT = 1 << 18, 2000  # characters
_APT_PART = re.compile(
    r"\s*(?:sudo\s+)?(?:DEBIAN_FRONTEND=\w+\s+)?apt(?:-get)?\s+(?P<rest>.*)", re.DOTALL
)
_CLEANING = re.compile(r"\s*rm\s+-rf?\s+/var/(?:lib/apt/lists|cache/apt)\S*(?:\s+/var/\S+)*\s*|\s*")
_NOT_NEEDED = frozenset(
    ["apt-utils", "asciinema", "ca-certificates", "locales", "tmux", "tzdata"]
)  # of a recording harness, or without a program of their own
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
    """(line, what) of the first command in a shell script that asks for the network; comments do
    not count.
    """
    return need_in_rows(list(enumerate(text[:_LOOKED_AT].splitlines(), 1)))


def need_in_rows(rows: Iterable[tuple[int, str]]) -> tuple[int, str] | None:
    """The same for lines with their numbers.

    Only the beginning of a very long line is looked at, so that no script can make this take long.
    """
    for number, row in rows:
        if match := NEEDS_NETWORK.search(re.sub(r"(^|\s)#.*", "", row[:_ROW_LOOKED_AT])):
            return number, match[0].strip()
    return None


def packages(command: str) -> list[str] | None:
    """The Debian packages that a command installs, where it does nothing but this and cleaning up;
    None for any other command.
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
    """Package -> programs that stand for it: where all of them are there, the package counts as
    installed.
    """
    return {name: () if name in _NOT_NEEDED else _PROGRAMS.get(name, (name,)) for name in names}
