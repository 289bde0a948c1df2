"""The build context of a Dockerfile: the files that COPY and ADD name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from envs.tasks.harbor.errors import UnsupportedError
from envs.tasks.harbor.task import HarborTask

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # gzip, bzip2, xz


def is_archive(content: bytes) -> bool:
    """Return whether ADD unpacks a file with this content."""
    return content.startswith(_COMPRESSED) or content[257:262] == b"ustar"


def find(files: Mapping[str, object], pattern: str) -> list[tuple[str, bool]]:
    """Return the files and folders that a pattern names, as (path, whether it is a folder).

    The pattern is matched component by component, as Docker does.
    """
    if pattern == "":
        return [("", True)]
    wanted = pattern.split("/")
    depth = len(wanted)
    found: dict[str, bool] = {}
    for path in files:
        parts = path.split("/")
        pairs = zip(parts, wanted, strict=False)
        if len(parts) >= depth and all(fnmatch.fnmatchcase(part, want) for part, want in pairs):
            found["/".join(parts[:depth])] = len(parts) > depth
    return list(found.items())


def without_ignored(task: HarborTask) -> dict[str, tuple[bytes, int]]:
    """Return a task's build context without the files that its .dockerignore names.

    Raises:
      UnsupportedError: a pattern is more than a plain name with *.
    """
    files = dict(task.environment.context)
    ignored, _ = files.pop(".dockerignore", (b"", 0))
    for number, row in enumerate(ignored.decode(errors="replace").splitlines(), 1):
        pattern = row.strip().strip("/")
        if pattern.startswith("!") or "**" in pattern:
            raise UnsupportedError(
                (task.environment.dockerfile_path or task.path).parent / ".dockerignore",
                number,
                f"the pattern {pattern!r}; plain names and * are taken",
            )
        if not pattern or pattern.startswith("#"):
            continue
        for name, is_folder in find(files, pattern):
            files.pop(name, None)
            if is_folder:
                files = {
                    path: content
                    for path, content in files.items()
                    if not path.startswith(f"{name}/")
                }
    return files
