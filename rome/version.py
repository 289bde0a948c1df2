"""The version of this code, and the commit that runs: every result says which code made it."""

import functools
import pathlib
import subprocess

VERSION = "0.1.0"
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_GIT_SECONDS = 5.0


@functools.cache
def describe() -> str:
    """Return VERSION with the commit where this is a checkout: `0.1.0+g1a2b3c4d5e`.

    `.dirty` follows where tracked files differ from that commit. Without git, or in an installed
    copy, it is VERSION alone.
    """
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=10", "--dirty=.dirty"]
    command += ["--exclude=*"]  # a tag says less than VERSION does
    if not (_ROOT / ".git").exists():  # a repository above this one is not ours
        return VERSION
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return VERSION
    commit = found.stdout.strip()
    return f"{VERSION}+g{commit}" if found.returncode == 0 and commit else VERSION
