"""Tokens of the callers: a file with one "name token" a line, readable only by its owner."""

import hashlib
import hmac
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Mapping

from envs.rock.wire.operations import WORKER_USER

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MIN_TOKEN_CHARS = 16


class Tokens:
    """Finds the user that a token belongs to.

    Only hashes are kept, so no message, log or memory dump shows a token.

    Args:
      tokens: token by user name.

    Raises:
      ValueError: a name or a token is malformed, or two users have the same token.
    """

    def __init__(self, tokens: Mapping[str, str]):
        for name, token in tokens.items():
            _check_name(name)
            _check_token(name, token)
        self._hashes = {name: _hash(token) for name, token in tokens.items()}
        if len(set(self._hashes.values())) != len(self._hashes):
            raise ValueError("two users have the same token")

    def user(self, token: str | None) -> str | None:
        """Return the user of a token, None if it is unknown; takes the same time for all users."""
        presented = _hash(token or "")
        found = None
        for name, known in self._hashes.items():
            if hmac.compare_digest(presented, known):
                found = name
        return found


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the user name {name[:70]!r} is not made of 1 to 64 letters, digits, '_', '.' and '-'"
        )


def _check_token(name: str, token: str) -> None:
    is_printable = token.isascii() and token.isprintable() and " " not in token
    if len(token) < MIN_TOKEN_CHARS or not is_printable:
        raise ValueError(
            f"the token of {name!r} is not made of at least {MIN_TOKEN_CHARS} printable ASCII"
            " characters without spaces"
        )


def load_tokens(path: pathlib.Path) -> dict[str, str]:
    """Return the tokens of a file by user name.

    Raises:
      PermissionError: others than the owner can read or change the file.
      ValueError: a line is malformed, or a name or token is there twice.
    """
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as file:
        status = os.fstat(file.fileno())
        is_owned = status.st_uid in (0, os.geteuid())
        if not is_owned or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(
                f"{path} can be read or changed by others than its owner; chmod 600 it, and make"
                " new tokens if anyone has read it"
            )
        entries = [line.split() for line in file if line.strip() and not line.startswith("#")]
    tokens: dict[str, str] = {}
    for number, words in enumerate(entries, 1):
        if len(words) != 2:
            raise ValueError(f'{path}: entry {number} is not "name token"')
        name, token = words
        if name in tokens:
            raise ValueError(f"{path}: a name is there twice: {name}")
        tokens[name] = token
    Tokens(tokens)  # checks names and tokens
    return tokens


def load_or_make_tokens(path: pathlib.Path) -> dict[str, str]:
    """Return the tokens of a file, which is made first if it is missing.

    A new file holds random tokens for the user "default" and for the workers. Errors as in
    `load_tokens`.
    """
    try:
        return load_tokens(path)
    except FileNotFoundError:
        _make_tokens(path)
        return load_tokens(path)


def _make_tokens(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w") as file:
        for name in ("default", WORKER_USER):
            token = secrets.token_urlsafe(32)
            file.write(f"{name} {token}\n")
