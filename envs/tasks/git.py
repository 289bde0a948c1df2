"""Reading of files from untrusted git repositories, with git itself and without a checkout.

The repositories' settings have no effect.
"""

from __future__ import annotations

import os
import pathlib
import subprocess

GIT_SECONDS = 300.0
MAX_FILE_BYTES = 16 << 20  # of one file that is read
PROTOCOLS = "https:ssh:git"


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
    if protocols != "none":  # to reach a network as the user does
        environment |= {
            name: os.environ[name]
            for name in (
                "HOME",
                "SSH_AUTH_SOCK",
                "https_proxy",
                "HTTPS_PROXY",
                "no_proxy",
                "NO_PROXY",
                "GIT_SSL_CAINFO",
                "SSL_CERT_FILE",
            )
            if name in os.environ
        }
    if scratch:
        environment |= {
            "GIT_INDEX_FILE": str(scratch / "index"),
            "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(
                (
                    repository / (".git/objects" if (repository / ".git").is_dir() else "objects")
                ).absolute()
            ),
        }
    safe = (
        "-c",
        "safe.directory=*",
        "-c",
        "core.fsmonitor=",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "pack.threads=1",
        "-c",
        "core.attributesFile=/dev/null",
    )
    try:
        done = subprocess.run(
            ["git", *safe, "-C", str(repository), *arguments],
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
    rows = [
        row.partition(b"\t")
        for row in git(repository, "ls-tree", "-r", "-z", commit).split(b"\0")
        if row
    ]
    return {
        os.fsdecode(path): (entry.split()[0].decode(), entry.split()[2].decode())
        for entry, _, path in rows
    }


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


def files_below(
    repository: pathlib.Path, commit: str, folder: str, max_bytes: int, max_files: int
) -> dict[str, tuple[bytes, int]]:
    """Return the files below a folder at a commit: path below the folder -> (content, permissions).

    Raises:
      RepositoryError: there is anything but regular files, or too much.
    """
    prefix = f"{folder}/" if folder not in ("", ".") else ""
    entries = {
        path.removeprefix(prefix): entry
        for path, entry in entries_at(repository, commit).items()
        if path.startswith(prefix)
    }
    if odd := [path for path, (mode, _) in entries.items() if not mode.startswith("100")]:
        raise RepositoryError(
            f"{prefix}{odd[0]} is a link or a submodule; a task's files must be regular files"
        )
    if len(entries) > max_files:
        raise RepositoryError(f"more than {max_files} files are below {folder!r}")
    names = "".join(f"{blob}\n" for _, blob in entries.values()).encode()
    sizes = [
        int(size)
        for size in git(repository, "cat-file", "--batch-check=%(objectsize)", stdin=names).split()
    ]
    if sum(sizes) > max_bytes:
        raise RepositoryError(f"more than {max_bytes} bytes are below {folder!r}")
    content = git(
        repository, "cat-file", "--batch=", stdin=names
    )  # an empty line, the content and a newline for each
    files = {}
    place = 0
    for (path, (mode, _)), size in zip(entries.items(), sizes, strict=True):
        place += 1
        files[path] = (content[place : place + size], 0o755 if mode == "100755" else 0o644)
        place += size + 1
    return files


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
        raise RepositoryError(f"{commit} of {url} is no commit")
