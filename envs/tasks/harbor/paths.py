"""The absolute paths of a task in a sandbox that can write only below its workspace.

The embedded sandbox has the machine's /usr, an /etc of its own, /tmp and /workspace. The task's own
folders (/app, /logs, /tests, and those that its Dockerfile makes) lie below the workspace: /app is
/workspace/app. Paths are rewritten in texts that go in (commands, scripts, Python code of tests)
and rewritten back in texts that come out, so agent and task speak of /app throughout.

Not rewritten are paths that are put together at run time ("/" + "app"), and paths in data files.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from collections.abc import Iterable

from envs.tasks.harbor.task import Files

_SYSTEM_FOLDERS = "bin boot dev etc lib lib32 lib64 libx32 proc run sbin sys usr"
_SCRIPT_SUFFIXES = """
.bash .c .cfg .conf .go .h .ini .js .mjs .mk .pl .py .rb .rs .sh .toml .ts .yaml .yml
"""
ALWAYS = ("app", "logs", "tests", "solution", "root")
SYSTEM = frozenset(_SYSTEM_FOLDERS.split())  # read-only here
REAL = frozenset(("tmp",))  # exists in the sandbox and is writable, as in any container
SCRIPT_SUFFIXES = frozenset(_SCRIPT_SUFFIXES.split())


class PathMap:
    """Rewrites paths between a task and the sandbox whose workspace is at `workspace`.

    `roots` are the first components of the task's folders.
    """

    def __init__(self, workspace: str, roots: Iterable[str] = ()) -> None:
        self.workspace = workspace
        # Without mounts of its own (another workspace) the sandbox has no /tmp to itself.
        self._real = REAL if workspace == "/workspace" else frozenset()
        self.roots = tuple(sorted({*ALWAYS, *roots, *REAL} - SYSTEM - self._real))
        names = "|".join(re.escape(name) for name in sorted(self.roots, key=len, reverse=True))
        # Not after a letter, a slash, a variable or a glob, because "src/app", "$HOME/app" and
        # "*/tests/*" are no absolute paths; and not before a longer name.
        self._inward = re.compile(rf"(?<![\w./~$}}\)\]*?@%+-])/({names})(?![\w-]|\.\w)")
        self._outward = re.compile(rf"{re.escape(workspace)}/({names})(?![\w-]|\.\w)")

    def inward(self, text: str) -> str:
        """Rewrite a text's paths on the way into the sandbox."""
        return self._inward.sub(lambda match: f"{self.workspace}/{match[1]}", text)

    def outward(self, text: str) -> str:
        """Rewrite a text's paths on the way out of the sandbox."""
        return self._outward.sub(lambda match: f"/{match[1]}", text)

    def place(self, path: str) -> str:
        """Return the location of an absolute path of the task; its first component may be unknown.

        Raises:
          ValueError: the location is read-only.
        """
        normal = posixpath.normpath(f"/{path}").replace("//", "/")
        top = normal.split("/")[1]
        if top in SYSTEM:
            raise ValueError(f"{path} lies in /{top}, which is read-only here")
        if top in self._real:
            return normal
        return f"{self.workspace}{normal}" if top else self.workspace

    def scripts(self, files: Files, everything: bool = False) -> dict[str, tuple[bytes, int]]:
        """Return files with the paths in scripts and code rewritten.

        With `everything` the paths in all text files are rewritten.
        """
        return {
            name: (self._script(name, content, everything), mode)
            for name, (content, mode) in files.items()
        }

    def _script(self, name: str, content: bytes, everything: bool) -> bytes:
        path = pathlib.PurePosixPath(name)
        is_script = (
            content.startswith(b"#!")
            or path.suffix in SCRIPT_SUFFIXES
            or path.name in ("Makefile", "Dockerfile")
        )
        if not everything and not is_script:
            return content
        try:
            return self.inward(content.decode()).encode()
        except UnicodeDecodeError:
            return content


def root_of(path: str) -> str | None:
    """Return the first component of an absolute path if it may have to be mapped, else None."""
    parts = pathlib.PurePosixPath(path).parts
    if len(parts) < 2 or parts[0] != "/":
        return None
    root = parts[1]
    if root in SYSTEM | REAL or not re.fullmatch(r"[\w][\w.-]*", root):
        return None
    return root
