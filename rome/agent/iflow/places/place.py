"""Opens the place where the tools of a session work: this machine, or a copy in a sandbox."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from envs.rock import Sandbox, SandboxConfig, SandboxError
from rome.agent.iflow.places.host_workspace import HostWorkspace
from rome.agent.iflow.places.sandbox_workspace import SandboxWorkspace
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError

Kind = Literal["sandbox", "host"]
KINDS: tuple[Kind, ...] = ("sandbox", "host")
FILES = "workspace.tar"  # in the session's folder: what the last turn in a sandbox left
PIECE = 1 << 20
HIDDEN = ".iflow-hidden"  # in the sandbox, for a moment: the names of what is left out
REMOVE_SECONDS = 60.0
# Wide enough for building and testing a project.
_WIDE: dict[str, Any] = {
    "label": "iflow",
    "memory_mb": 4096,
    "disk_mb": 2048,
    "inodes": 200_000,
    "pids": 512,
    "cpus": float(os.cpu_count() or 1),
    "open_files": 1024,
    "max_output_bytes": 4 << 20,
}


async def open_place(
    kind: Kind,
    directory: pathlib.Path,
    session_folder: pathlib.Path,
    *,
    egress: Sequence[str] = (),
    hides: Callable[[str], bool] = lambda path: False,
) -> Workspace:
    """Open the place of a session; it is closed with `aclose`.

    Args:
      kind: "host" works in `directory` itself, "sandbox" in a copy of it.
      directory: of the project.
      session_folder: for whole outputs, and for the files of a sandbox between two turns.
      egress: what a sandbox may reach, as `envs.rock.SandboxConfig` has it.
      hides: says of a file of the project that it must not be read: a sandbox does not get it.

    Raises:
      WorkspaceError: the directory is not there, or the sandbox did not start.
    """
    if kind == "host":
        return HostWorkspace(str(directory), str(session_folder))
    if not directory.is_dir():
        raise WorkspaceError(f"{directory} is no directory; name one to work in")
    sandbox = Sandbox(SandboxConfig(egress=tuple(egress), **_WIDE))
    files = session_folder / FILES
    try:
        await sandbox.start()
        if files.exists():
            await sandbox.unpack(".", _pieces(files))
        else:
            await sandbox.upload(directory, ".")
        await _leave_out(sandbox, directory, hides)
    except (OSError, SandboxError) as error:
        with contextlib.suppress(OSError, SandboxError):
            await sandbox.stop()
        raise WorkspaceError(
            f"no sandbox with the files of {directory}: {error}. --workspace=host needs none",
            is_infrastructure=True,
        ) from error
    return SandboxWorkspace(sandbox, kept=files)


async def _leave_out(
    sandbox: Sandbox, directory: pathlib.Path, hides: Callable[[str], bool]
) -> None:
    """Remove from the sandbox's copy of a project what must not be read there."""
    hidden = []
    for above, folders, names in os.walk(directory):
        found = [name for name in (*folders, *names) if hides(os.path.join(above, name))]
        folders[:] = [name for name in folders if name not in found]
        hidden += [os.path.relpath(os.path.join(above, name), directory) for name in found]
    if hidden:
        listed = "".join(f"./{one}\0" for one in hidden)
        await sandbox.write_file(HIDDEN, os.fsencode(listed))
        done = await sandbox.execute(f"xargs -0 rm -rf < {HIDDEN} && rm {HIDDEN}", REMOVE_SECONDS)
        if done.exit_code != 0:
            raise SandboxError(f"files that must not be read are still there: {done.stderr[:300]}")


async def _pieces(path: pathlib.Path) -> AsyncIterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
