"""A task's absolute paths in a sandbox that can write only below its workspace.

The embedded sandbox has the machine's /usr, an /etc of its own, /tmp and /workspace. A task's own
folders (/app, /logs, /tests, what its Dockerfile makes) lie below the workspace: /app is
/workspace/app. Texts that go in (commands, scripts, Python code of tests) get their paths
rewritten, texts that come out are rewritten back, so that agent and task speak of /app throughout.

What rewriting cannot see: a path put together at run time ("/" + "app"), and paths in data files,
which are left as they are.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from collections.abc import Iterable

from envs.tasks.harbor.task import Files

ALWAYS = ("app", "logs", "tests", "solution", "root")
SYSTEM = frozenset(
    [
        "bin",
        "boot",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "proc",
        "run",
        "sbin",
        "sys",
        "usr",
    ]
)  # read-only here
REAL = frozenset(("tmp",))  # there, and writable, as in any container
SCRIPT_SUFFIXES = frozenset(
    [
        ".bash",
        ".c",
        ".cfg",
        ".conf",
        ".go",
        ".h",
        ".ini",
        ".js",
        ".mjs",
        ".mk",
        ".pl",
        ".py",
        ".rb",
        ".rs",
        ".sh",
        ".toml",
        ".ts",
        ".yaml",
        ".yml",
    ]
)


class PathMap:
    """Rewrites paths between a task and the sandbox whose workspace is at `workspace`.

    `roots` are the first components of the task's folders.
    """

    def __init__(self, workspace: str, roots: Iterable[str] = ()) -> None:
        self.workspace = workspace
        self._real = (
            REAL if workspace == "/workspace" else frozenset()
        )  # without mounts of its own the sandbox has no /tmp to itself
        self.roots = tuple(sorted({*ALWAYS, *roots, *REAL} - SYSTEM - self._real))
        names = "|".join(re.escape(name) for name in sorted(self.roots, key=len, reverse=True))
        # Not after a letter, a slash, a variable or a glob: "src/app", "$HOME/app", "*/tests/*" are
        # no absolute paths. Not before a longer name.
        self._inward = re.compile(rf"(?<![\w./~$}}\)\]*?@%+-])/({names})(?![\w-]|\.\w)")
        self._outward = re.compile(rf"{re.escape(workspace)}/({names})(?![\w-]|\.\w)")

    def inward(self, text: str) -> str:
        return self._inward.sub(lambda match: f"{self.workspace}/{match[1]}", text)

    def outward(self, text: str) -> str:
        return self._outward.sub(lambda match: f"/{match[1]}", text)

    def place(self, path: str) -> str:
        """Where an absolute path of the task lies, its first component being known or not.

        ValueError for a place that is read-only.
        """
        normal = posixpath.normpath(f"/{path}").replace("//", "/")
        top = normal.split("/")[1]
        if top in SYSTEM:
            raise ValueError(f"{path} lies in /{top}, which is read-only here")
        return (
            normal if top in self._real else f"{self.workspace}{normal}" if top else self.workspace
        )

    def scripts(self, files: Files, everything: bool = False) -> dict[str, tuple[bytes, int]]:
        """The files with paths rewritten in scripts and code; with `everything` in all that is
        text.
        """
        return {
            name: (self._script(name, content, everything), mode)
            for name, (content, mode) in files.items()
        }

    def _script(self, name: str, content: bytes, everything: bool) -> bytes:
        suffix = pathlib.PurePosixPath(name).suffix
        if not (
            everything
            or content.startswith(b"#!")
            or suffix in SCRIPT_SUFFIXES
            or pathlib.PurePosixPath(name).name in ("Makefile", "Dockerfile")
        ):
            return content
        try:
            return self.inward(content.decode()).encode()
        except UnicodeDecodeError:
            return content


def root_of(path: str) -> str | None:
    """The first component of an absolute path that may have to be mapped."""
    parts = pathlib.PurePosixPath(path).parts
    return (
        parts[1]
        if len(parts) > 1
        and parts[0] == "/"
        and parts[1] not in SYSTEM | REAL
        and re.fullmatch(r"[\w][\w.-]*", parts[1])
        else None
    )
