"""The build context of a Dockerfile: the files that COPY and ADD name."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Mapping, Sequence

from envs.tasks.harbor.task import LINK, Files

MAX_LINKS = 40  # that one path leads through
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # gzip, bzip2, xz


def is_archive(content: bytes) -> bool:
    """Return whether ADD unpacks a file with this content."""
    return content.startswith(_COMPRESSED) or content[257:262] == b"ustar"


def find(files: Files, pattern: str) -> list[tuple[str, bool]]:
    """Return the files and folders that a pattern names, as (path, whether it is a folder).

    The pattern is matched component by component, and links on the way to what it names are
    followed within the context, as Docker does. Links in a folder that it names are not.
    """
    found = {}
    for name in _match(files, resolve(files, pattern)):
        path = resolve(files, name)
        is_folder = not path or any(other.startswith(f"{path}/") for other in files)
        if is_folder or path in files:
            found[path] = is_folder
    return list(found.items())


def resolve(files: Files, path: str) -> str:
    """Return where a path of the context leads; a loop of links ends at one of them."""
    parts = path.split("/")[::-1]
    place: list[str] = []
    left = MAX_LINKS
    while parts:
        place.append(parts.pop())
        content, mode = files.get("/".join(place), (b"", 0))
        if mode == LINK and left:
            left -= 1
            target = content.decode(errors="surrogateescape")
            start = "/" if target.startswith("/") else f"/{'/'.join(place[:-1])}/"
            # The context is the root: neither .. nor a leading slash leads out of it.
            whole = posixpath.normpath(start + target).strip("/").split("/")
            parts += [part for part in whole[::-1] if part]
            place = []
    return "/".join(place)


def _match(files: Files, pattern: str) -> list[str]:
    """Return the members and folders whose components match those of a pattern."""
    if pattern == "":
        return [""]
    # Go writes the complement of a set as [^...].
    wanted = [part.replace("[^", "[!") for part in pattern.split("/")]
    depth = len(wanted)
    found: dict[str, None] = {}
    for path in files:
        parts = path.split("/")
        pairs = zip(parts, wanted, strict=False)
        if len(parts) >= depth and all(fnmatch.fnmatchcase(part, want) for part, want in pairs):
            found["/".join(parts[:depth])] = None
    return list(found)


def without_ignored(files: Mapping[str, tuple[bytes, int]]) -> dict[str, tuple[bytes, int]]:
    """Return a build context without the files that its .dockerignore names.

    The rules are Docker's (https://docs.docker.com/build/concepts/context/#dockerignore-files): the
    last pattern that names a file, or a folder above it, decides; ** stands for any folders, and !
    takes a file back.
    """
    content, _ = files.get(".dockerignore", (b"", 0))
    patterns = ignore_patterns(content.decode("utf-8-sig", errors="replace"))
    if not patterns:
        return dict(files)
    return {path: entry for path, entry in files.items() if not is_ignored(path, patterns)}


def ignore_patterns(text: str) -> list[tuple[re.Pattern[str], bool]]:
    """Return the patterns of a .dockerignore file, and whether each takes files back."""
    patterns = []
    for row in text.splitlines():
        if row.startswith("#") or not row.strip():
            continue
        takes_back = row.strip().startswith("!")
        pattern = posixpath.normpath(row.strip().removeprefix("!").strip() or ".").lstrip("/")
        if pattern != ".":
            patterns.append((_ignore_regex(pattern), takes_back))
    return patterns


def is_ignored(path: str, patterns: Sequence[tuple[re.Pattern[str], bool]]) -> bool:
    """Return whether the patterns leave a file out of the build context."""
    parts = path.split("/")
    above = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    ignored = False
    for pattern, takes_back in patterns:
        if any(pattern.fullmatch(place) for place in above):
            ignored = not takes_back
    return ignored


def _ignore_regex(pattern: str) -> re.Pattern[str]:
    """Return a pattern of .dockerignore as a regex for a whole path."""
    found = ""
    index = 0
    while index < len(pattern):
        rest = pattern[index:]
        if stars := re.match(r"\*\*/?", rest):
            index += stars.end()
            found += "(?:.*/)?" if index < len(pattern) else ".*"
            continue
        index += 1
        if rest[0] == "*":
            found += "[^/]*"
        elif rest[0] == "?":
            found += "[^/]"
        elif rest[0] == "\\" and len(rest) > 1:
            found += re.escape(rest[1])
            index += 1
        elif group := re.match(r"\[\^?[^]]+\]", rest):
            found += group[0]
            index += group.end() - 1
        else:
            found += re.escape(rest[0])
    try:
        return re.compile(found, re.DOTALL)
    except re.error:  # a set such as [b-a]: Docker refuses it, and no file has it for a name
        return re.compile(re.escape(pattern))
