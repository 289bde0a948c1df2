"""The interface of a sandbox backend, for those who write one.

`Sandbox` (sandbox.py) is the class that users see; it passes each call to a `Backend` of the kind
that the config names: embedded/, docker/ or remote/. A backend lists in `guarantees` what it
enforces and raises IsolationError for what it cannot.
"""

import abc
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from envs.rock.config import (
    Address,
    CommandResult,
    Denial,
    FileEntry,
    SandboxConfig,
    SandboxStatus,
    check_environment,
    check_seconds,
    is_encodable,
)
from envs.rock.errors import SandboxError, SandboxFileError
from envs.rock.wire.archive import Transfer

WORKSPACE = "/workspace"
MAX_PATH_BYTES = 4096
MAX_NAME_BYTES = 255  # of a file in a directory
MAX_LISTED = 100_000  # entries below a listed directory
MAX_COMMAND_BYTES = 100_000  # Linux passes at most 128 KiB as one argument of a program
# A command that writes this much beyond max_output_bytes is killed with the limit "output".
MAX_DISCARDED_BYTES = 64 << 20
CANNOT_EXECUTE = 126  # bash's exit code for a command that was found but cannot be executed


class Job(abc.ABC):
    """A command that runs in the background.

    It ends by itself, at its time limit, or when it is killed. `wait` may be called repeatedly.
    """

    @property
    @abc.abstractmethod
    def running(self) -> bool:
        """Whether the command has not ended yet."""

    @abc.abstractmethod
    async def wait(self) -> CommandResult:
        """Wait for the command's end and return its result.

        Raises:
          SandboxError: the sandbox ended first.
        """

    @abc.abstractmethod
    async def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does, to the command and its children in the same group."""

    @abc.abstractmethod
    async def kill(self) -> CommandResult:
        """Send SIGKILL to the command and return its result."""


class Session(abc.ABC):
    """A bash process that lives on between commands.

    Its working directory, variables, functions and background processes stay. Each `run` reports
    the exit code that the shell gave the command. A command that ends the shell, such as `exit`,
    ends the session. Use it as an async context manager, or call `close`.
    """

    ended: bool = False
    # Called with each piece of a running command's output, by tiers that see it as it comes: not
    # by docker, nor by remote sandboxes.
    on_output: Callable[[bytes], None] | None = None

    @abc.abstractmethod
    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        """Run a command in the shell and return its result.

        What background processes write in the meantime counts as this command's output. At the
        time limit, everything that the command started is killed, and the shell too if it does not
        become ready again.

        Args:
          command: text for bash, at most MAX_COMMAND_BYTES; several lines are allowed.
          timeout: seconds; None for `SandboxConfig.timeout`.

        Raises:
          SandboxClosedError: the session has ended.
        """

    @abc.abstractmethod
    async def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does, to the running command; do nothing when none runs."""

    @abc.abstractmethod
    async def close(self) -> None:
        """End the shell and all processes below it. Closing twice is allowed."""

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Snapshot(abc.ABC):
    """The files of a sandbox at one moment; it outlives the sandbox.

    Any number of sandboxes can start from it at the same time: `Sandbox(config, snapshot)`.
    """

    @abc.abstractmethod
    async def delete(self) -> None:
        """Delete the snapshot. Sandboxes that started from it keep their files."""


class Backend(abc.ABC):
    """One way to run a sandbox. The methods have the meaning of those of `Sandbox`.

    Attributes:
      id: the sandbox's name, once it has one.
      tier: "namespaces", "landlock", "docker", or the worker's tier of a remote sandbox.
      guarantees: names of `tiers.GUARANTEES` that are enforced; known after `start`.
      workspace: path of the workspace as commands see it. The landlock tier cannot mount anything,
        so there it is the directory's path on the host.
    """

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        self.config = config
        self.id: str | None = None
        self.tier: str | None = None
        self.guarantees: frozenset[str] = frozenset()
        self.workspace = WORKSPACE

    # -- start and end

    @abc.abstractmethod
    async def start(self) -> None:
        """Create the sandbox."""

    async def attach(self, sandbox: str) -> None:
        """Connect to a running sandbox by its id; only the remote backend can."""
        raise SandboxError(
            f"a sandbox of the {self.config.backend} backend ends with the process that started it,"
            " so none can be attached to"
        )

    @abc.abstractmethod
    async def stop(self) -> None:
        """End every process and remove all files. Stopping twice is allowed."""

    @abc.abstractmethod
    def is_alive(self) -> bool:
        """Return whether the sandbox was started and is not known to have ended."""

    @abc.abstractmethod
    async def get_status(self) -> SandboxStatus:
        """Return what the sandbox uses at this moment."""

    @abc.abstractmethod
    async def denials(self) -> list[Denial]:
        """Return the recorded attempts to reach what the egress policy does not grant."""

    # -- commands

    @abc.abstractmethod
    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        """Run a command and wait for its end."""

    @abc.abstractmethod
    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> Job:
        """Start a command in the background."""

    @abc.abstractmethod
    async def create_session(self, env: Mapping[str, str] | None = None) -> Session:
        """Start a bash that keeps its state between commands."""

    @abc.abstractmethod
    async def kill_all(self) -> None:
        """Kill every process of the sandbox and wait until they are gone."""

    @abc.abstractmethod
    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        """Run a verifier's script that no process of the agent can read."""

    @abc.abstractmethod
    async def expose_port(self, port: int) -> Address:
        """Listen on a loopback address of this host and forward connections to the port."""

    # -- copies of the files

    @abc.abstractmethod
    async def snapshot(self) -> Snapshot:
        """Copy all files, /tmp included."""

    @abc.abstractmethod
    async def restore(self, snapshot: Snapshot) -> None:
        """Replace all files by those of a snapshot and end every process."""

    @abc.abstractmethod
    async def commit(self, image: str) -> None:
        """Save the files as an image of that name."""

    # -- files

    @abc.abstractmethod
    def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield the content of a regular file below the workspace in pieces."""

    @abc.abstractmethod
    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        """Write a file below the workspace and create its directories."""

    @abc.abstractmethod
    async def list_files(self, path: str = ".") -> list[FileEntry]:
        """Return everything below a directory of the workspace."""

    @abc.abstractmethod
    def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        """Yield everything below a directory of the workspace as a tar archive."""

    @abc.abstractmethod
    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        """Make what a tar archive holds below a directory of the workspace."""

    # -- what implementations share

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """Return the variables of a command: the defaults, the config's, then `env`."""
        check_environment({**self.config.env, **(env or {})})
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": WORKSPACE,
            "LANG": "C.UTF-8",
            **self.config.env,
            **(env or {}),
        }

    def _timeout(self, timeout: float | None) -> float:
        return choose_timeout(timeout, self.config.timeout)

    def _relative(self, path: str) -> str:
        """Return a path relative to the workspace; "" is the workspace itself.

        Links are not resolved here: the backend checks them when it opens the path.

        Raises:
          SandboxFileError: "outside" for a path that leaves the workspace by its text.
        """
        return relative_path(path, self.workspace)

    def _relative_file(self, path: str) -> str:
        relative = relative_path(path, self.workspace)
        if not relative:
            raise SandboxFileError("outside", f"{path!r} is not a file below {WORKSPACE}")
        return relative


def choose_timeout(timeout: float | None, default: float) -> float:
    """Return the time limit of a command in seconds; ValueError for one that is none."""
    if timeout is None:
        return default
    check_seconds("timeout", timeout)
    return timeout


def relative_path(path: str, workspace: str = WORKSPACE) -> str:
    """Return a path relative to the workspace; "" is the workspace itself.

    Args:
      path: relative, or absolute below /workspace or below `workspace`.
      workspace: where the workspace really lies, see `Backend.workspace`.

    Raises:
      SandboxFileError: "outside" for a path that leaves the workspace by its text, or is none;
        "denied" for one that is too long.
    """
    for root in (workspace, WORKSPACE):
        if path == root or path.startswith(root + "/"):
            path = path[len(root) + 1 :]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not is_encodable(path):
        raise SandboxFileError("outside", f"{path!r} is no path: it holds a lone surrogate")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise SandboxFileError(
            "denied", f"{path[:200]!r}... has more than the {MAX_PATH_BYTES} bytes of a path"
        )
    is_outside = path.startswith("/") or ".." in parts
    if is_outside or "\0" in path:
        raise SandboxFileError("outside", f"{path!r} is not below {WORKSPACE}")
    return "/".join(parts)


def check_listed_path(path: str) -> None:
    """Raise SandboxFileError for a path of a listing that is not plainly below its directory.

    Whoever lists files may lie: a sandbox's own programs, a worker, an admin, or who speaks for it.
    """
    is_plain = all(part not in ("", ".", "..") for part in path.split("/"))
    if not is_plain or "\0" in path:
        raise SandboxFileError(
            "outside",
            f"a listing names {path[:200]!r}, which is not a path below the listed directory; where"
            " it came from cannot be trusted",
        )


def reason_not_executable(command: str) -> str:
    """Return why a command cannot be passed to a program, as bash would say it; "" if it can."""
    if "\0" in command:
        return "bash: the command contains a NUL character\n"
    size = len(command.encode(errors="replace"))
    if size > MAX_COMMAND_BYTES:
        return (
            f"bash: the command has {size} bytes, the limit is {MAX_COMMAND_BYTES}; write a file"
            " in parts\n"
        )
    return ""


def refused_result(reason: str) -> CommandResult:
    """Return the result of a command that was not run: exit code 126, the reason on stderr."""
    return CommandResult(
        stdout="",
        stderr=reason,
        exit_code=CANNOT_EXECUTE,
        timed_out=False,
        truncated=False,
        seconds=0.0,
    )


def check_verifier_files(files: Mapping[str, bytes]) -> None:
    """Raise ValueError for a verifier's file whose name is not a plain one."""
    for name in files:
        is_plain = bool(name) and "/" not in name and not name.startswith(".")
        is_possible = "\0" not in name and is_encodable(name)
        if not is_plain or not is_possible or len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise ValueError(f"verifier files are plain names, not {name!r}")
