"""Who may ask: a file of names and tokens, "name token" a line, that only its owner can read."""

import hashlib
import hmac
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Mapping

from envs.rock.wire.api import WORKER_USER

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MIN_TOKEN = 16  # characters


class Tokens:
    """Names by token.

    Only hashes are kept, so that no message, log or dump of memory shows a token.
    """

    def __init__(self, tokens: Mapping[str, str]):
        for name, token in tokens.items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the user name {name[:70]!r} is not made of 1 to 64 letters, digits, '_', '.'"
                    " and '-'"
                )
            if (
                len(token) < MIN_TOKEN
                or not token.isascii()
                or not token.isprintable()
                or " " in token
            ):
                raise ValueError(
                    f"the token of {name!r} is not made of at least {MIN_TOKEN} printable ASCII"
                    " characters without spaces"
                )
        self._hashes = {
            name: hashlib.sha256(token.encode()).digest() for name, token in tokens.items()
        }
        if len(set(self._hashes.values())) != len(self._hashes):
            raise ValueError("two users have the same token")

    def user(self, token: str | None) -> str | None:
        """Whose token this is. It takes as long whoever's it is."""
        presented, found = hashlib.sha256((token or "").encode(errors="replace")).digest(), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(presented, known):
                found = name
        return found


def load_tokens(path: pathlib.Path) -> dict[str, str]:
    """The file's names and tokens.

    PermissionError where others could read or change it, ValueError where it makes no sense.
    """
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as file:
        status = os.fstat(file.fileno())
        if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(
                f"{path} can be read or changed by others than its owner; chmod 600 it, and make"
                " new tokens if anyone has read it"
            )
        lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
    if bad := [number for number, words in enumerate(lines, 1) if len(words) != 2]:
        raise ValueError(f'{path}: entry {bad[0]} is not "name token"')
    tokens = dict(lines)
    if len(tokens) != len(lines):
        raise ValueError(f"{path}: a name is there twice")
    Tokens(tokens)
    return tokens


def load_or_make_tokens(path: pathlib.Path) -> dict[str, str]:
    """As load_tokens; where there is no file, one with tokens for the user "default" and for
    workers is made first.
    """
    try:
        return load_tokens(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = "".join(f"{name} {secrets.token_urlsafe(32)}\n" for name in ("default", WORKER_USER))
        with open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w"
        ) as file:
            file.write(text)
        return load_tokens(path)
