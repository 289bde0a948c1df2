"""This machine as the place where tools work: files below a folder, and a bash.

Nothing is isolated here: what may be run is the policy's to say. A path that is named inside the
folder cannot lead out of it by a symbolic link, so that a rule on paths holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import itertools
import os
import pathlib
import secrets
import stat as stat_module
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from envs.rock.backend import MAX_COMMAND_BYTES
from rome.agent.iflow.places.checkpoint import ShadowRepository
from rome.agent.iflow.places.host_shell import HostShell, kill_processes
from rome.agent.iflow.places.output import MAX_OUTPUT_BYTES, OutputKeeper
from rome.agent.iflow.places.workspace import (
    SHELL_ENDED,
    BackgroundJob,
    CommandOutput,
    OnOutput,
    Workspace,
    WorkspaceError,
    require_path,
)

_READ_BYTES = 1 << 16
FLOODED = f"ended: it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB"
# Takes the output of a job, which is not to fill the disk and must not wait for a reader.
_KEEP_BEGINNING = (
    f"trap '' XFSZ; ulimit -f {MAX_OUTPUT_BYTES >> 10}; cat 2> /dev/null; exec cat > /dev/null"
)
# Programs must not wait for somebody at a terminal.
_ENVIRONMENT = {
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "TERM": "dumb",
}


class HostWorkspace(Workspace):
    """A folder of this machine; its files are where they were, so there is nothing to keep.

    Args:
      root: the folder.
      folder: of the session, for whole outputs and checkpoints. Processes that an earlier process
        with the same folder left are ended at the start.
    """

    is_isolated = False

    def __init__(self, root: str, folder: str) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise WorkspaceError(f"{root} is no directory; name one to work in")
        self.jobs: dict[str, BackgroundJob] = {}
        self._job_numbers = itertools.count(1)
        folder = os.path.realpath(folder)
        self.outputs = f"{folder}/outputs"
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        self._mark = f"IFLOW_WORKSPACE={name}"
        self._shell: HostShell | None = None
        self._is_first = True  # it ends all
        self._turn = asyncio.Lock()  # of commands in the shell
        self._number = 0
        self._repository = ShadowRepository(
            pathlib.Path(folder, "checkpoints"), pathlib.Path(self.root)
        )
        kill_processes(self._mark)

    # -- commands

    @property
    def directory(self) -> str:
        return self._shell.directory if self._shell else self.root

    async def execute(
        self, command: str, *, timeout: float, on_output: OnOutput | None = None
    ) -> CommandOutput:
        text = encode_command(command)
        keeper = OutputKeeper(self._next_file(), on_output)
        began = time.monotonic()
        async with self._turn:
            if self._shell is None:
                self._shell = await self._start_shell()
            shell = self._shell
            try:
                ended = await shell.run(text, timeout, keeper)
            finally:
                # The workspace may have been closed meanwhile.
                if not shell.is_alive and shell is self._shell:
                    await asyncio.shield(self._leave_shell())
        output, file = keeper.finish()
        said = {FLOODED: ended.is_flooded, SHELL_ENDED: not ended.is_alive}
        note = "; ".join(text for text, is_so in said.items() if is_so)
        seconds = time.monotonic() - began
        return CommandOutput(output, ended.exit_code, seconds, file=file, note=note)

    async def spawn(self, command: str) -> BackgroundJob:
        text = encode_command(command)
        identity = str(next(self._job_numbers))
        path = f"{self.outputs}/job-{identity}.txt"
        mark = f"{self._mark}-{identity}"
        os.makedirs(self.outputs, exist_ok=True)
        read, write = os.pipe()
        try:
            with open(path, "wb") as file:
                keeper = await _start_bash(_KEEP_BEGINNING, stdin=read, stdout=file)
            environment = self._environment() | {"IFLOW_JOB": mark}
            process = await _start_bash(
                text, stdout=write, stderr=write, cwd=self.directory, env=environment
            )
        finally:
            os.close(read)
            os.close(write)

        async def end() -> int:
            code = await process.wait()
            with contextlib.suppress(TimeoutError):  # a child may hold the pipe for longer
                await asyncio.wait_for(keeper.wait(), 1.0)
            return code if code >= 0 else 128 - code

        async def kill() -> None:
            await asyncio.to_thread(kill_processes, f"IFLOW_JOB={mark}")

        async def read_end(place: int, limit: int) -> tuple[int, bytes]:
            await asyncio.sleep(0)  # a caller may read again and again
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(place, size - limit))
                return size, file.read(size - file.tell())

        job = BackgroundJob(identity, command, path, end=end(), kill=kill, read_end=read_end)
        self.jobs[identity] = job
        return job

    async def run(self, command: str, *, timeout: float) -> str:
        process = await _start_bash(
            encode_command(command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.root,
            env=self._environment(),
        )
        assert process.stdout is not None
        data = bytearray()
        try:
            async with asyncio.timeout(timeout):
                while piece := await process.stdout.read(_READ_BYTES):
                    data += piece
                    if len(data) > MAX_OUTPUT_BYTES:
                        raise WorkspaceError(f"{command[:80]}: {FLOODED}")
        except TimeoutError as error:
            raise WorkspaceError(f"{command[:80]} took more than {timeout:g} seconds") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
        return data.decode(errors="replace")

    # -- files

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        return await asyncio.to_thread(self._read, path, limit)

    async def write(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self._write, path, content)

    async def stat(self, path: str) -> tuple[int, float] | None:
        with _told(path):
            try:
                status = os.stat(self._resolve(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            _require_regular(path, status)
        return status.st_size, status.st_mtime

    async def snapshot(self) -> str:
        """Keep the files as they are; see `ShadowRepository`."""
        return await asyncio.to_thread(self._repository.take)

    async def restore(self, snapshot: str) -> None:
        """Bring the files back to a snapshot; the shell and the jobs go on."""
        await asyncio.to_thread(self._repository.restore, snapshot)

    def beside(self) -> HostWorkspace:
        other = copy.copy(self)
        other._shell = None
        other._is_first = False
        other._turn = asyncio.Lock()
        return other

    async def keep(self) -> None:
        pass

    async def aclose(self) -> None:
        await self._leave_shell()
        if not self._is_first:
            return
        for job in self.jobs.values():
            await job.kill()
        await asyncio.to_thread(kill_processes, self._mark)

    # -- steps of the above

    def _environment(self) -> dict[str, str]:
        name, _, value = self._mark.partition("=")
        own = {key for key in os.environ if key.lower().replace("_", "") == "iflowapikey"}
        inherited = {key: text for key, text in os.environ.items() if key not in own}
        return inherited | _ENVIRONMENT | {name: value}

    async def _start_shell(self) -> HostShell:
        mark = f"{self._mark}-{secrets.token_hex(8)}"
        environment = self._environment() | {"IFLOW_SHELL": mark}
        try:
            return await HostShell.start(self.root, environment, f"IFLOW_SHELL={mark}")
        except OSError as error:
            raise WorkspaceError(f"no bash could be started in {self.root}: {error}") from error

    async def _leave_shell(self) -> None:
        shell = self._shell
        self._shell = None
        if shell is not None:
            await shell.close()

    def _next_file(self) -> pathlib.Path:
        self._number += 1
        return pathlib.Path(self.outputs, f"{time.time_ns():x}-{self._number}.txt")

    def _resolve(self, path: str) -> str:
        """Return the real path of a named one, which no link leads out of the project."""
        require_path(path)
        named = os.path.normpath(os.path.join(self.root, os.path.expanduser(path)))
        real = os.path.realpath(named)
        if _is_below(named, self.root) and not _is_below(real, self.root):
            raise WorkspaceError(
                f"{path} leads to {real}, outside the project; name that path itself if it is meant"
            )
        return real

    def _read(self, path: str, limit: int) -> bytes:
        with _told(path):
            # A FIFO would be waited for otherwise.
            descriptor = os.open(self._resolve(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                _require_regular(path, status)
                content = file.read(limit + 1)
        if len(content) > limit:
            raise WorkspaceError(f"{path} has {status.st_size} bytes, more than {limit}")
        return content

    def _write(self, path: str, content: bytes) -> None:
        with _told(path):
            target = pathlib.Path(self._resolve(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o666 & ~_umask()
            status = target.stat() if target.exists() else None
            if status is not None:
                _require_regular(path, status)
                mode = stat_module.S_IMODE(status.st_mode)
            # A kill in the middle leaves the file as it was.
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".iflow-")
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                if status is not None and os.geteuid() == 0:  # who may give a file away
                    os.chown(temporary, status.st_uid, status.st_gid)
                os.chmod(temporary, mode)
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise


async def _start_bash(text: bytes | str, **options: Any) -> asyncio.subprocess.Process:
    """Start a bash of its own, which has no input unless it is given some."""
    return await asyncio.create_subprocess_exec(
        *("/bin/bash", "--noprofile", "--norc", "-c", text),
        **{"stdin": asyncio.subprocess.DEVNULL, "start_new_session": True} | options,
    )


def encode_command(command: str) -> bytes:
    """Return a command as bash gets it; WorkspaceError for one that it cannot get."""
    text = command.encode(errors="replace")
    if b"\0" in text:
        raise WorkspaceError("the command has a NUL character, which no program can be given")
    if len(text) > MAX_COMMAND_BYTES:
        raise WorkspaceError(
            f"the command has {len(text)} bytes, the limit is {MAX_COMMAND_BYTES}; write a file"
            " with write_file and use it"
        )
    return text


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn errors of the file system into those of a workspace."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorkspaceError(f"{path}: {reason[:1].lower()}{reason[1:]}") from error


def _require_regular(path: str, status: os.stat_result) -> None:
    if stat_module.S_ISDIR(status.st_mode):
        raise WorkspaceError(f"{path} is a directory")
    if not stat_module.S_ISREG(status.st_mode):
        raise WorkspaceError(f"{path} is no regular file")


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _umask() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("Umask:"))
    return int(line.split()[1], 8)
