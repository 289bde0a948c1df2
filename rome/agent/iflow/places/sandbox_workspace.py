"""A ROCK sandbox as the place where tools work."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import pathlib
import posixpath
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping

from envs.rock import (
    AgentFault,
    CommandResult,
    Sandbox,
    SandboxError,
    SandboxFileError,
    SessionEndedError,
)
from envs.rock.backend import CANNOT_EXECUTE, Session, Snapshot
from rome.agent.iflow.places.output import decode, is_long, join
from rome.agent.iflow.places.sandbox_job import SandboxJob, told
from rome.agent.iflow.places.workspace import (
    SHELL_ENDED,
    BackgroundJob,
    CommandOutput,
    WorkspaceError,
    require_path,
)

SHELL_CANCELLED = "this is a new shell, in the project's directory: the last command was cancelled"
JOB_SECONDS = 24 * 3600.0
MAX_SNAPSHOTS = 200
# Ends a command about what is no regular file.
_CHECK = "[ -d {target} ] && exit 98; [ ! -e {target} ] || [ -f {target} ] || exit 97;"
FILE_SECONDS = 60.0  # for a command that serves a file tool


class SandboxWorkspace:
    """A running sandbox; see `Workspace`. It stays the caller's to stop.

    Args:
      sandbox: that runs. Its `max_output_bytes` bounds what is kept of an output: the default of
        64 KiB is short for an agent, a few MiB are not.
      root: directory of the project; "" for the sandbox's workspace.
    """

    is_isolated = True

    def __init__(self, sandbox: Sandbox, root: str = "") -> None:
        self.root = root or sandbox.workspace
        # The landlock tier has no file system of its own, so no /tmp.
        above = posixpath.dirname(sandbox.workspace) if sandbox.tier == "landlock" else ""
        self.outputs = f"{above}/tmp/iflow/outputs"
        self.jobs: dict[str, BackgroundJob] = {}
        self._job_numbers = itertools.count(1)
        self._sandbox = sandbox
        self._session: Session | None = None
        self._helper: Session | None = None  # runs what file tools need
        self._helper_turn = asyncio.Lock()
        self._was_cancelled = False  # the last command, and its shell with it
        self._turn = asyncio.Lock()
        self._snapshots: dict[str, Snapshot | bytes] = {}  # bytes: a tar archive
        self._numbers = itertools.count(1)
        self._restores = [0]  # how often the sandbox was restored, which ends all shells
        self._restores_seen = 0
        self._is_first = True  # it ends all

    # -- commands

    @property
    def directory(self) -> str:
        """Return the project's directory; where the shell is, only the sandbox knows."""
        return self.root

    async def execute(
        self,
        command: str,
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> CommandOutput:
        """Run a command in the persistent shell; see `Workspace.execute`."""
        settings = "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in (env or {}).items()
        )
        began = time.monotonic()
        with told("the shell"):
            async with self._turn:
                session = await self._shell()
                note = SHELL_CANCELLED if self._was_cancelled else ""
                self._was_cancelled = False
                session.on_output = on_output
                try:
                    result = await session.run(settings + command, timeout)
                except asyncio.CancelledError:
                    # When the shell would be ready again is not known.
                    self._was_cancelled = True
                    await asyncio.shield(self._leave_shell())
                    raise
                except AgentFault:
                    if not session.ended:
                        raise
                    # The command killed its shell before its own end could be reported.
                    result = CommandResult("", "", 137, False, False, 0.0)
                finally:
                    session.on_output = None
                if session.ended:
                    self._session = None
                    await session.close()
            return await self._to_output(result, time.monotonic() - began, note)

    async def spawn(self, command: str) -> SandboxJob:
        """Start a command in the background; see `Workspace.spawn`."""
        with told("a background job"):
            identity = str(next(self._job_numbers))
            directory = await self._directory()
            file = f"{self.outputs}/job-{identity}.txt"
            # It may be read before the job has begun.
            await self._run_for_job(f"mkdir -p {self.outputs}; : > {file}")
            start = f"exec >{file} 2>&1; cd {shlex.quote(directory)}\n"
            # The semicolon ends the number: the 1 of 12 is another job.
            variables = {"IFLOW_JOB": f"{identity};"}
            job = await self._sandbox.spawn(start + command, JOB_SECONDS, variables)
            self.jobs[identity] = SandboxJob(self._run_for_job, identity, command, job, file)
        return self.jobs[identity]  # type: ignore[return-value]

    async def stream(self, command: str, *, timeout: float) -> AsyncIterator[str]:
        """Yield the output of a command of its own; here, all of it at its end."""
        with told("a command"):
            moved = f"cd -- {shlex.quote(self.root)} || exit\n{command}"
            result = await self._sandbox.execute(moved, timeout)
        if result.timed_out:
            raise WorkspaceError(f"{command[:80]} took more than {timeout:g} seconds")
        yield result.stdout + result.stderr

    # -- files

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        """Return a file's content; see `Workspace.read`."""
        status = await self.stat(path)
        if status is None:
            raise WorkspaceError(f"{path}: no such file or directory")
        if status[0] > limit:
            raise WorkspaceError(f"{path} has {status[0]} bytes, more than {limit}")
        target = self._absolute(path)
        with told(path):
            with contextlib.suppress(SandboxFileError):  # a link, or outside: a copy is read
                return await self._sandbox.read_file(target, limit)
            copy = self._temporary()
            try:
                await self._must_run(f"cat -- {shlex.quote(target)} > {shlex.quote(copy)}", path)
                return await self._sandbox.read_file(copy, limit)
            finally:
                await self._run(f"rm -f -- {shlex.quote(copy)}", FILE_SECONDS)

    async def write(self, path: str, content: bytes) -> None:
        """Write a file whole; see `Workspace.write`."""
        target = shlex.quote(self._absolute(path))
        copy = self._temporary()
        with told(path):
            await self._sandbox.write_file(copy, content)
            copied = shlex.quote(copy)
            # `cat` keeps the mode and follows links, as an editor does.
            command = (
                f"trap 'rm -f -- {copied}' EXIT; {_CHECK.format(target=target)}"
                f' mkdir -p -- "$(dirname -- {target})" && cat -- {copied} > {target}'
            )
            await self._must_run(command, path)

    async def stat(self, path: str) -> tuple[int, float] | None:
        """Return the size and the time of change of a file; see `Workspace.stat`."""
        target = shlex.quote(self._absolute(path))
        result = await self._run(
            f"[ -e {target} ] || exit 99; {_CHECK.format(target=target)}"
            f" stat -L -c '%s %.9Y' -- {target} 2>/dev/null || stat -L -c '%s %Y' -- {target}",
            FILE_SECONDS,
        )
        if result.exit_code == 99:
            return None
        _require_success(result, path)
        fields = result.stdout.split()
        if len(fields) != 2:
            raise WorkspaceError(f"{path} cannot be looked at: {result.stdout[:200]}")
        return int(fields[0]), float(fields[1])

    async def snapshot(self) -> str:
        """Keep the files as they are, /tmp included; only the workspace's while a job runs."""
        name = f"snapshot-{next(self._numbers)}"
        with told("a snapshot"):
            if any(job.is_running for job in self.jobs.values()):
                pieces = [piece async for piece in self._sandbox.pack()]
                self._snapshots[name] = b"".join(pieces)
            else:
                self._snapshots[name] = await self._sandbox.snapshot()
            while len(self._snapshots) > MAX_SNAPSHOTS:
                await self._forget(next(iter(self._snapshots)))
        return name

    async def restore(self, snapshot: str) -> None:
        """Bring the files back to a snapshot; the shell and all jobs end."""
        kept = self._snapshots.get(snapshot)
        if kept is None:
            raise WorkspaceError(
                f"there is no snapshot {snapshot!r}: the last {MAX_SNAPSHOTS} are kept, as long as"
                " the process lives"
            )
        with told("a snapshot"):
            async with self._turn:
                await self._leave_shell()
                self._restores[0] += 1
                if isinstance(kept, bytes):
                    await self._sandbox.kill_all()
                    await self._must_run("find . -mindepth 1 -delete", ".", self._sandbox.workspace)
                    await self._sandbox.unpack(".", _pieces(kept))
                else:
                    await self._sandbox.restore(kept)

    def beside(self) -> SandboxWorkspace:
        """Return the same place with a shell of its own; see `Workspace.beside`."""
        other = copy.copy(self)
        other._session = None
        other._helper = None
        other._helper_turn = asyncio.Lock()
        other._is_first = False
        other._turn = asyncio.Lock()
        return other

    async def aclose(self) -> None:
        """End the shell and all jobs, and forget the snapshots."""
        with contextlib.suppress(SandboxError):
            await self._leave_shell()
            if self._helper is not None:
                await self._helper.close()
                self._helper = None
        if not self._is_first:
            return
        with contextlib.suppress(SandboxError):
            for job in self.jobs.values():
                await job.kill()
        for name in list(self._snapshots):
            with contextlib.suppress(SandboxError):
                await self._forget(name)

    # -- steps of the above

    async def _shell(self) -> Session:
        """Return the persistent shell; it is started where there is none."""
        self._forget_ended_shells()
        if self._session is None:
            session = await self._sandbox.create_session()
            try:
                # One stream, in which errors stand where they came.
                await session.run(f"exec 2>&1; cd -- {shlex.quote(self.root)}", FILE_SECONDS)
            except BaseException:
                await asyncio.shield(session.close())
                raise
            self._session = session
        return self._session

    def _forget_ended_shells(self) -> None:
        """Forget the shells that a restore of the sandbox has ended."""
        if self._restores_seen != self._restores[0]:
            self._restores_seen = self._restores[0]
            self._session = None
            self._helper = None

    async def _forget(self, snapshot: str) -> None:
        kept = self._snapshots.pop(snapshot)
        if not isinstance(kept, bytes):
            await kept.delete()

    async def _leave_shell(self) -> None:
        session = self._session
        self._session = None
        if session is not None:
            await session.close()

    async def _directory(self) -> str:
        """Return where the shell is; the project's directory while a command runs in it."""
        self._forget_ended_shells()
        if self._session is None or self._turn.locked():
            return self.root
        async with self._turn:
            result = await self._session.run('builtin printf %s "$PWD"', FILE_SECONDS)
        return result.stdout or self.root

    async def _to_output(self, result: CommandResult, seconds: float, note: str) -> CommandOutput:
        written = result.stdout + result.stderr
        beyond = sum(result.cut)
        text = decode(written.encode(errors="surrogateescape"))
        file = ""
        if is_long(text) or beyond:
            file = f"{self.outputs}/{time.time_ns():x}.txt"
            await self._keep(file, written)
            text = join(text, text, len(written) + beyond, file)
        notes = [note] if note else []
        if beyond:
            notes.append(f"the last {beyond} bytes of the output were not kept")
        if "output" in result.limits_hit:
            notes.append("ended: it wrote too much")
        notes += [f"ended: limit of {name}" for name in result.limits_hit if name in _LIMITS]
        if self._session is None and result.exit_code != CANNOT_EXECUTE:
            notes.append(SHELL_ENDED)
        return CommandOutput(
            text,
            None if result.timed_out else result.exit_code,
            seconds,
            denials=result.network_denials,
            file=file,
            note="; ".join(notes),
        )

    async def _keep(self, file: str, text: str) -> None:
        """Write a whole output; a full disk of the sandbox is no reason to lose the rest."""
        with contextlib.suppress(WorkspaceError):
            await self.write(file, text.encode(errors="replace"))

    def _absolute(self, path: str) -> str:
        require_path(path)
        return posixpath.normpath(posixpath.join(self.root, path))

    def _temporary(self) -> str:
        """Return a name in the sandbox's workspace, from which files are copied on."""
        name = f".iflow-{time.time_ns():x}-{next(self._numbers)}"
        return str(pathlib.PurePosixPath(self._sandbox.workspace) / name)

    async def _run(self, command: str, timeout: float, directory: str = "") -> CommandResult:
        """Run a command in a shell for such commands, in the project's directory or another one."""
        inner = f"(cd -- {shlex.quote(directory or self.root)} || exit\n{command}\n)"
        async with self._helper_turn:
            with told("a command"):
                try:
                    return await self._run_in_helper(inner, timeout)
                except SessionEndedError:  # a program of the agent's may have killed it
                    return await self._run_in_helper(inner, timeout)

    async def _run_for_job(self, command: str) -> CommandResult:
        return await self._run(command, FILE_SECONDS)

    async def _run_in_helper(self, command: str, timeout: float) -> CommandResult:
        self._forget_ended_shells()
        session = self._helper or await self._sandbox.create_session()
        self._helper = session
        try:
            result = await session.run(command, timeout)
        except BaseException:
            self._helper = None
            await asyncio.shield(session.close())
            raise
        if session.ended:
            self._helper = None
        return result

    async def _must_run(self, command: str, path: str, directory: str = "") -> None:
        _require_success(await self._run(command, FILE_SECONDS, directory), path)


def _require_success(result: CommandResult, path: str) -> None:
    """Raise WorkspaceError for a command about a file that failed."""
    if result.exit_code == 98:
        raise WorkspaceError(f"{path} is a directory")
    if result.exit_code == 97:
        raise WorkspaceError(f"{path} is no regular file")
    if result.exit_code != 0:
        said = result.stderr.strip().rpartition(": ")[2][:200]
        raise WorkspaceError(f"{path}: {said.lower() or f'status {result.exit_code}'}")


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


_LIMITS = ("memory", "pids", "disk", "killed")
