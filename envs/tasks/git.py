"""Reading of files from untrusted git repositories, with git itself and without a checkout.

The repositories' settings have no effect.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Sequence

GIT_SECONDS = 300.0
MAX_FILE_BYTES = 16 << 20  # for one file
PROTOCOLS = "https:ssh:git"


# Settings of the repository that are overridden, because they could run or change something.
_SAFE = (
    *("-c", "safe.directory=*"),
    *("-c", "core.fsmonitor="),
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "pack.threads=1"),
    *("-c", "core.attributesFile=/dev/null"),
    *("-c", "log.showSignature=false"),  # or signed commits run the programs below
    *("-c", "gpg.program=false"),
    *("-c", "gpg.openpgp.program=false"),
    *("-c", "gpg.x509.program=false"),
    *("-c", "gpg.ssh.program=false"),
)
# Variables of the user that matter for reaching a network.
_NETWORK_VARIABLES = (
    "HOME",
    "SSH_AUTH_SOCK",
    "https_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "GIT_SSL_CAINFO",
    "SSL_CERT_FILE",
)


class RepositoryError(ValueError):
    """The repository lacks something, a patch does not apply, or git failed.

    The message is git's own.
    """


def is_repository(path: pathlib.Path) -> bool:
    """Return whether a path is a git repository, bare or with a working tree."""
    return (path / ".git").exists() or (path / "objects").is_dir()


def git(
    repository: pathlib.Path,
    *arguments: str,
    stdin: bytes = b"",
    scratch: pathlib.Path | None = None,
    protocols: str = "none",
) -> bytes:
    """Run git and return its output.

    The user's and the system's settings, and hooks and monitors that the repository names, have no
    effect.

    Args:
      repository: the folder in which git runs.
      *arguments: the command and its arguments.
      stdin: the input.
      scratch: a folder with `objects` in it for an index and new objects, so that the repository
        itself stays unchanged.
      protocols: the protocols by which git may reach other repositories, separated by colons.

    Raises:
      RepositoryError: git is missing, failed or did not end in time.
    """
    environment = _environment(protocols)
    if scratch:
        environment |= _object_store(repository, scratch)
    try:
        done = subprocess.run(
            ["git", *_SAFE, "-C", str(repository), *arguments],
            input=stdin,
            capture_output=True,
            env=environment,
            timeout=GIT_SECONDS,
        )
    except FileNotFoundError:
        raise RepositoryError("git is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise RepositoryError(
            f"git {arguments[0]} in {repository} did not end within {GIT_SECONDS:g} s"
        ) from None
    except ValueError as error:  # a NUL in an argument
        raise RepositoryError(f"git {arguments[0]}: {error}") from None
    if done.returncode != 0:
        raise RepositoryError(
            f"git {arguments[0]} in {repository} ended with {done.returncode}:"
            f" {done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return done.stdout


def _environment(protocols: str) -> dict[str, str]:
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LC_ALL": "C",
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_ALLOW_PROTOCOL": protocols,
    }
    if protocols != "none":  # reach the network as the user does
        for name in _NETWORK_VARIABLES:
            if name in os.environ:
                environment[name] = os.environ[name]
    return environment


def _object_store(repository: pathlib.Path, scratch: pathlib.Path) -> dict[str, str]:
    """Return variables that make git write to `scratch` and also read from the repository."""
    objects = ".git/objects" if (repository / ".git").is_dir() else "objects"
    return {
        "GIT_INDEX_FILE": str(scratch / "index"),
        "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((repository / objects).absolute()),
    }


def files_at(repository: pathlib.Path, commit: str) -> dict[str, tuple[str, int]]:
    """Return path -> (blob, permissions) of the regular files of a commit."""
    return {
        path: (blob, 0o755 if mode == "100755" else 0o644)
        for path, (mode, blob) in entries_at(repository, commit).items()
        if mode in ("100644", "100755", "100664")
    }


def entries_at(repository: pathlib.Path, commit: str) -> dict[str, tuple[str, str]]:
    """Return path -> (mode, object) of all entries of a commit.

    These are files, links (mode 120000) and submodules (160000).
    """
    found = {}
    for row in git(repository, "ls-tree", "-r", "-z", commit).split(b"\0"):
        if row:
            entry, _, path = row.partition(b"\t")
            mode, _, identity = entry.split()[:3]
            found[os.fsdecode(path)] = (mode.decode(), identity.decode())
    return found


def content_of(
    repository: pathlib.Path, blob: str, path: str, scratch: pathlib.Path | None = None
) -> bytes:
    """Return the content of a blob. Raises RepositoryError if it is too large."""
    size = int(git(repository, "cat-file", "-s", blob, scratch=scratch))
    if size > MAX_FILE_BYTES:
        raise RepositoryError(
            f"{path} has {size} bytes, and at most {MAX_FILE_BYTES} of a file are read"
        )
    return git(repository, "cat-file", "blob", blob, scratch=scratch)


def contents_of(repository: pathlib.Path, blobs: Sequence[str], max_bytes: int) -> list[bytes]:
    """Return the contents of blobs, read by one process.

    Args:
      repository: local, bare or with a working tree.
      blobs: full object names.
      max_bytes: of all of them together; nothing is read where they have more.

    Raises:
      RepositoryError: one is missing or torn, or they are too large.
    """
    if not blobs:
        return []
    names = "".join(f"{blob}\n" for blob in blobs).encode()
    listed = git(
        repository, "cat-file", "--batch-check=%(objecttype) %(objectsize)", stdin=names
    ).splitlines()
    sizes = []
    for blob, row in zip(blobs, listed, strict=True):
        kind, _, size = row.partition(b" ")
        if kind != b"blob":
            raise RepositoryError(f"object {blob} in {repository} is missing or no file")
        sizes.append(int(size))
    if sum(sizes) > max_bytes:
        raise RepositoryError(f"{len(blobs)} files have {sum(sizes)} bytes, more than {max_bytes}")
    # For each file: an empty line, the content and a newline.
    output = git(repository, "cat-file", "--batch=", stdin=names)
    contents = []
    place = 0
    for size in sizes:
        contents.append(output[place + 1 : place + 1 + size])
        place += size + 2
    return contents


def files_below(
    repository: pathlib.Path, commit: str, folder: str, max_bytes: int, max_files: int
) -> dict[str, tuple[bytes, int]]:
    """Return the files below a folder at a commit: path below the folder -> (content, permissions).

    Raises:
      RepositoryError: there is anything but regular files, or too much.
    """
    prefix = f"{folder}/" if folder not in ("", ".") else ""
    entries = {}
    for path, entry in entries_at(repository, commit).items():
        if path.startswith(prefix):
            entries[path.removeprefix(prefix)] = entry
    if odd := [path for path, (mode, _) in entries.items() if not mode.startswith("100")]:
        raise RepositoryError(
            f"{prefix}{odd[0]} is a link or a submodule; a task's files must be regular files"
        )
    if len(entries) > max_files:
        raise RepositoryError(f"more than {max_files} files are below {folder!r}")
    blobs = [blob for _, blob in entries.values()]
    contents = contents_of(repository, blobs, max_bytes)
    return {
        path: (content, 0o755 if mode == "100755" else 0o644)
        for (path, (mode, _)), content in zip(entries.items(), contents, strict=True)
    }


def fetch_commit(target: pathlib.Path, url: str, commit: str) -> None:
    """Fetch one commit into a bare repository at `target`, which is created if missing.

    The server must provide commits by id, as the large hosts do.
    """
    if not is_repository(target):
        target.mkdir(parents=True, exist_ok=True)
        git(target, "init", "-q", "--bare", "--template=")
    git(
        target,
        "fetch",
        "-q",
        "--depth=1",
        "--no-tags",
        "--no-recurse-submodules",
        url,
        commit,
        protocols=PROTOCOLS,
    )
    if git(target, "cat-file", "-t", commit).strip() != b"commit":
        raise RepositoryError(f"{commit} of {url} is not a commit")
