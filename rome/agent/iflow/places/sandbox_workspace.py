"""A ROCK sandbox as the place where tools work."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import pathlib
import posixpath
import shlex
import time
from collections.abc import AsyncIterator, Iterator

from envs.rock import AgentFault, CommandResult, Sandbox, SandboxError, SandboxFileError
from envs.rock.backend import CANNOT_EXECUTE, Session, Snapshot
from rome.agent.iflow.places.output import decode, is_long, join
from rome.agent.iflow.places.workspace import (
    SHELL_ENDED,
    BackgroundJob,
    CommandOutput,
    OnOutput,
    Workspace,
    WorkspaceError,
    require_path,
)

SHELL_CANCELLED = "this is a new shell, in the project's directory: the last command was cancelled"
JOB_SECONDS = 24 * 3600.0
MAX_SNAPSHOTS = 200
FILE_SECONDS = 60.0  # for a command that serves a file tool
# Ends a command about what is no regular file.
_CHECK = "[ -d {target} ] && exit 98; [ ! -e {target} ] || [ -f {target} ] || exit 97;"
_MEANINGS = {98: "is a directory", 97: "is no regular file"}
_LIMITS = ("memory", "pids", "disk", "killed")
# Kills what has a variable of that value, wherever it has gone.
_KILL = (
    'for e in /proc/[0-9]*/environ; do if grep -q "IFLOW_JOB={job};" "$e" 2>/dev/null; then'
    ' p=${{e#/proc/}}; kill -9 "${{p%/environ}}" 2>/dev/null; fi; done; true'
)


class SandboxWorkspace(Workspace):
    """A running sandbox; see `Workspace`.

    Args:
      sandbox: that runs. Its `max_output_bytes` bounds what is kept of an output: the default of
        64 KiB is short for an agent, a few MiB are not.
      root: directory of the project; "" for the sandbox's workspace.
      kept: archive where `keep` leaves the files; the sandbox is then stopped with the workspace.
        None for a sandbox that stays the caller's.
    """

    is_isolated = True

    def __init__(
        self, sandbox: Sandbox, root: str = "", *, kept: pathlib.Path | None = None
    ) -> None:
        self.root = root or sandbox.workspace
        self._directory = self.root
        # The landlock tier has no file system of its own, so no /tmp.
        above = posixpath.dirname(sandbox.workspace) if sandbox.tier == "landlock" else ""
        self.outputs = f"{above}/tmp/iflow/outputs"
        self.jobs: dict[str, BackgroundJob] = {}
        self._job_numbers = itertools.count(1)
        self._sandbox = sandbox
        self._kept = kept
        self._session: Session | None = None
        self._pid = 0  # of its shell, in the sandbox
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
        return self._directory

    async def execute(
        self, command: str, *, timeout: float, on_output: OnOutput | None = None
    ) -> CommandOutput:
        began = time.monotonic()
        with _told("the shell"):
            async with self._turn:
                session = await self._shell()
                note = SHELL_CANCELLED if self._was_cancelled else ""
                self._was_cancelled = False
                session.on_output = on_output
                try:
                    result = await session.run(command, timeout)
                    session.on_output = None
                    await self._note_directory(session, result)
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
                    await self._leave_shell()
            return await self._to_output(result, time.monotonic() - began, note)

    async def spawn(self, command: str) -> BackgroundJob:
        identity = str(next(self._job_numbers))
        file = f"{self.outputs}/job-{identity}.txt"
        # The file may be read before the job has begun.
        await self._must_run(f"mkdir -p {self.outputs}; : > {file}", file)
        start = f"exec >{file} 2>&1; cd {shlex.quote(self._directory)}\n"
        with _told("a background job"):
            # The semicolon ends the number: the 1 of 12 is another job.
            variables = {"IFLOW_JOB": f"{identity};"}
            job = await self._sandbox.spawn(start + command, JOB_SECONDS, variables)

        async def end() -> int | None:
            try:
                return (await job.wait()).exit_code
            except SandboxError:
                return None

        async def kill() -> None:
            with _told("a background job"):
                if job.running:
                    await job.kill()
            await self._run(_KILL.format(job=identity))

        async def read_end(place: int, limit: int) -> tuple[int, bytes]:
            # What is written meanwhile is left for the next reading.
            result = await self._run(
                f"n=$(wc -c < {file}); echo $n; tail -c +{place + 1} {file}"
                f" | head -c $((n - {place})) | tail -c {limit}"
            )
            size, _, text = result.stdout.partition("\n")
            if not size.strip().isdecimal():
                said = result.stderr[:200]
                raise WorkspaceError(f"the output of job {identity} cannot be read: {said}")
            return int(size), text.encode(errors="surrogateescape")

        made = BackgroundJob(identity, command, file, end=end(), kill=kill, read_end=read_end)
        self.jobs[identity] = made
        return made

    async def run(self, command: str, *, timeout: float) -> str:
        result = await self._run(command, timeout)
        if result.timed_out:
            raise WorkspaceError(f"{command[:80]} took more than {timeout:g} seconds")
        return result.stdout + result.stderr

    # -- files

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        status = await self.stat(path)
        if status is None:
            raise WorkspaceError(f"{path}: no such file or directory")
        if status[0] > limit:
            raise WorkspaceError(f"{path} has {status[0]} bytes, more than {limit}")
        target = self._absolute(path)
        with _told(path):
            with contextlib.suppress(SandboxFileError):  # a link, or outside: a copy is read
                return await self._sandbox.read_file(target, limit)
            copy = self._temporary()
            try:
                await self._must_run(f"cat -- {shlex.quote(target)} > {shlex.quote(copy)}", path)
                return await self._sandbox.read_file(copy, limit)
            finally:
                await self._run(f"rm -f -- {shlex.quote(copy)}")

    async def write(self, path: str, content: bytes) -> None:
        target = shlex.quote(self._absolute(path))
        copy = self._temporary()
        with _told(path):
            await self._sandbox.write_file(copy, content)
        copied = shlex.quote(copy)
        # `cat` keeps the mode and follows links, as an editor does.
        command = (
            f"trap 'rm -f -- {copied}' EXIT; {_CHECK.format(target=target)}"
            f' mkdir -p -- "$(dirname -- {target})" && cat -- {copied} > {target}'
        )
        await self._must_run(command, path)

    async def stat(self, path: str) -> tuple[int, float] | None:
        target = shlex.quote(self._absolute(path))
        result = await self._run(
            f"[ -e {target} ] || exit 99; {_CHECK.format(target=target)}"
            f" stat -L -c '%s %.9Y' -- {target} 2>/dev/null || stat -L -c '%s %Y' -- {target}"
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
        with _told("a snapshot"):
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
        with _told("a snapshot"):
            async with self._turn:
                await self._leave_shell()
                self._restores[0] += 1
                if isinstance(kept, bytes):
                    await self._sandbox.kill_all()
                    folder = shlex.quote(self._sandbox.workspace)
                    await self._must_run(f"find {folder} -mindepth 1 -delete", ".")
                    await self._sandbox.unpack(".", _pieces(kept))
                else:
                    await self._sandbox.restore(kept)

    def beside(self) -> SandboxWorkspace:
        other = copy.copy(self)
        other._directory = self.root
        other._session = None
        other._is_first = False
        other._turn = asyncio.Lock()
        return other

    async def keep(self) -> None:
        if self._kept is None:
            return
        new = self._kept.with_suffix(".new")
        try:
            with open(new, "wb") as archive:
                async for piece in self._sandbox.pack("."):
                    archive.write(piece)
            os.replace(new, self._kept)
        except (OSError, SandboxError) as error:
            raise WorkspaceError(
                f"the files of the sandbox were not kept: {error}", is_infrastructure=True
            ) from error

    async def aclose(self) -> None:
        """End the shell and all jobs, and forget the snapshots."""
        with contextlib.suppress(SandboxError):
            await self._leave_shell()
        if not self._is_first:
            return
        with contextlib.suppress(SandboxError, WorkspaceError):
            for job in self.jobs.values():
                await job.kill()
        for name in list(self._snapshots):
            with contextlib.suppress(SandboxError):
                await self._forget(name)
        if self._kept is not None:
            await self._sandbox.stop()

    # -- steps of the above

    async def _shell(self) -> Session:
        """Return the persistent shell; it is started where there is none."""
        if self._restores_seen != self._restores[0]:  # a restore has ended it
            self._restores_seen = self._restores[0]
            self._session = None
        if self._session is None:
            self._directory = self.root
            session = await self._sandbox.create_session()
            try:
                # One stream, in which errors stand where they came.
                start = f"exec 2>&1; cd -- {shlex.quote(self.root)}; echo $$"
                said = await session.run(start, FILE_SECONDS)
                self._pid = int(said.stdout.split()[-1])
            except BaseException:
                await asyncio.shield(session.close())
                raise
            self._session = session
        return self._session

    async def _note_directory(self, session: Session, result: CommandResult) -> None:
        """Note where the shell is: the rules judge the next command's paths from there."""
        if session.ended:
            return
        try:
            # Not by the shell itself, whose status and traces are the agent's.
            asked = f"cd -P /proc/{self._pid}/cwd && pwd"
            found = await self._sandbox.execute(asked, FILE_SECONDS)
            if found.exit_code != 0:  # some tiers do not show it to others
                asked = f"\\builtin pwd -P; (\\builtin exit {result.exit_code or 0})"
                found = await session.run(asked, FILE_SECONDS)
        except SandboxError:  # the command's own result is worth more
            await self._leave_shell()
            return
        lines = found.stdout.splitlines()[::-1]  # traces of the shell may stand around it
        self._directory = next((line for line in lines if line.startswith("/")), self.root)

    async def _leave_shell(self) -> None:
        session = self._session
        self._session = None
        self._directory = self.root
        if session is not None:
            await session.close()

    async def _forget(self, snapshot: str) -> None:
        kept = self._snapshots.pop(snapshot)
        if not isinstance(kept, bytes):
            await kept.delete()

    async def _to_output(self, result: CommandResult, seconds: float, note: str) -> CommandOutput:
        written = result.stdout + result.stderr
        beyond = sum(result.cut)
        text = decode(written.encode(errors="surrogateescape"))
        file = ""
        if is_long(text) or beyond:
            file = f"{self.outputs}/{time.time_ns():x}.txt"
            with contextlib.suppress(WorkspaceError):  # a full disk: the rest is worth something
                await self.write(file, written.encode(errors="replace"))
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

    def _absolute(self, path: str) -> str:
        require_path(path)
        return posixpath.normpath(posixpath.join(self.root, path))

    def _temporary(self) -> str:
        """Return a name in the sandbox's workspace, from which files are copied on."""
        name = f".iflow-{time.time_ns():x}-{next(self._numbers)}"
        return str(pathlib.PurePosixPath(self._sandbox.workspace) / name)

    async def _run(self, command: str, timeout: float = FILE_SECONDS) -> CommandResult:
        """Run a command of its own in the project's directory."""
        with _told("a command"):
            moved = f"cd -- {shlex.quote(self.root)} || exit\n{command}"
            return await self._sandbox.execute(moved, timeout)

    async def _must_run(self, command: str, path: str) -> None:
        _require_success(await self._run(command), path)


def _require_success(result: CommandResult, path: str) -> None:
    """Raise WorkspaceError for a command about a file that failed."""
    if result.exit_code in _MEANINGS:
        raise WorkspaceError(f"{path} {_MEANINGS[result.exit_code]}")
    if result.exit_code != 0:
        said = result.stderr.strip().rpartition(": ")[2][:200]
        raise WorkspaceError(f"{path}: {said.lower() or f'status {result.exit_code}'}")


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn errors of the sandbox into those of a workspace."""
    try:
        yield
    except (SandboxError, ValueError) as error:  # a command may be too long, or have a NUL
        by_agent = isinstance(error, AgentFault | ValueError)
        raise WorkspaceError(f"{what}: {error}", is_infrastructure=not by_agent) from error
