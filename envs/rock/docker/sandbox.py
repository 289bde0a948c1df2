"""The Docker backend: a sandbox is a container of this machine's engine, entered by execs.

Never privileged, no capability, no network but what `egress` grants (docker_network.py), a
read-only image; /workspace and /tmp are tmpfs and share disk_mb and inodes three to one. Process 1
cannot be ended, opened or stopped by the agent, and kills all of the agent's processes when the
engine tells it to; it ends by itself when this process dies. A command costs an exec (about 50 ms),
a session's command none.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from docker.utils import parse_repository_tag

from envs.rock.backend import (
    MAX_LISTED,
    Backend,
    Snapshot,
    check_verifier_files,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.docker import scripts
from envs.rock.docker.commands import KILLED, DockerJob, DockerSession
from envs.rock.docker.container import CALL_SECONDS, PLACE_BYTES, STDOUT, Container, Exec, engine
from envs.rock.docker.files import (
    COMMITTED,
    SNAPSHOT_SECONDS,
    DockerSnapshot,
    commit,
    either,
    exhaust,
    pack,
    put_verifier_files,
    unpack,
    within,
)
from envs.rock.docker.network import obstacle
from envs.rock.embedded.zygote_client import Gate
from envs.rock.errors import (
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
)
from envs.rock.tiers import REQUIRED, probe_docker
from envs.rock.transfer import PIECE_BYTES

SESSIONS, CONNECTIONS = 8, 16  # at once: each takes a process from those that are reserved for us
_KINDS = {"f": "file", "d": "directory", "l": "link"}
_start_gate = Gate(8)


class DockerBackend(Backend):
    """See Sandbox.

    The image must be there already (`docker pull`, or images.build) and have sh and the usual
    programs; sessions need bash.
    """

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        self._snapshot = snapshot
        if snapshot is not None and not isinstance(snapshot, DockerSnapshot):
            raise SandboxError(
                f"a Docker sandbox starts from a DockerSnapshot, not from {type(snapshot).__name__}"
            )
        self._container: Container | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[DockerJob] = set()
        self._sessions: set[DockerSession] = set()
        self._transfers = 0  # of files, that run now
        self._untidy = False
        self._turn, self._entrance = (
            asyncio.Lock(),
            asyncio.Lock(),
        )  # of execute and verify; of starting anything, and of killing all
        self._doors: list[asyncio.Server] = []

    # -- its life

    async def start(self) -> None:
        if self._container is not None:
            raise SandboxError("this sandbox is started already")
        report = await asyncio.to_thread(probe_docker, self.config.runtime)
        report.require(self.config.isolation)
        host = await asyncio.to_thread(engine)
        if self.config.egress and (reason := obstacle(host.runtime(self.config))):
            raise IsolationError(
                f"egress={self.config.egress}: no guard can let these through and no others here,"
                f" since {reason}; leave egress empty, or run as root with runc"
            )
        try:
            image = await host.call(host.client.inspect_image, self.config.image)
        except SandboxClosedError:
            raise SandboxStartError(
                f"the Docker engine has no image {self.config.image!r}; pull it or build it first"
            ) from None
        self._loop = asyncio.get_running_loop()
        async with _start_gate:
            container = self._container = Container(host, self.config, image)
            await container.start()
        guarantees = report.guarantees - (
            set() if "undumpable" in container.tools else {"verifier"}
        )
        if self.config.isolation == "required" and (lost := REQUIRED - guarantees):
            await self.stop()
            raise IsolationError(
                f"isolation='required' cannot be enforced with image {self.config.image} and"
                f" runtime {host.runtime(self.config)} ({', '.join(sorted(lost))}): its kernel lets"
                " a program look into the one that started it; remedy: the default runtime"
            )
        try:
            await self._bring_files(container)
        except BaseException:
            await asyncio.shield(self.stop())
            raise
        self.id, self.tier, self.guarantees = container.id[:12], report.tier, frozenset(guarantees)

    async def stop(self) -> None:
        if self._container is None:
            return
        for door in self._doors:
            door.close()
        await self._container.remove()
        for session in list(self._sessions):
            await session.close()
        if self._jobs:
            await asyncio.wait({job._task for job in self._jobs}, timeout=CALL_SECONDS)

    async def _bring_files(self, container: Container) -> None:
        """Those of the snapshot; else those that were committed with the image; else what the image
        has in /workspace, below the mount.
        """
        if self._snapshot:
            await unpack(container, self._snapshot.file)
        elif COMMITTED in (container.image["Config"].get("Labels") or {}):
            code, said = await container.ask(scripts.BRING_COMMITTED, seconds=SNAPSHOT_SECONDS)
            if code:
                raise SandboxStartError(
                    f"the files committed with image {self.config.image} do not fit in:"
                    f" {said.strip()[-300:]}"
                )
        elif (content := container.engine.workspaces[container.image["Id"]]) is not None:
            await unpack(container, content)

    def is_alive(self) -> bool:
        return self._container is not None and self._container.alive

    async def get_status(self) -> SandboxStatus:
        self._check_open()
        code, said = await self._container.ask(scripts.STATUS)
        try:
            (memory, pids, nanoseconds), *volumes = (line.split() for line in said.splitlines())
            used = [
                (int(size) * (int(blocks) - int(free)), int(inodes) - int(left))
                for size, blocks, free, inodes, left in volumes
            ]
            own = 2 + len(self._sessions)  # process 1, this script, and a listener for each session
            return SandboxStatus(
                int(memory) if memory.isdigit() else None,
                max(0, int(pids) - own) if pids.isdigit() else None,
                int(nanoseconds) / 1e9,
                sum(size for size, _ in used),
                sum(inodes for _, inodes in used),
                sum(job.running for job in self._jobs)
                + sum(session.running for session in self._sessions),
                len(self._sessions),
                await self._container.network.count() if self._container.network else None,
            )
        except ValueError as error:
            raise SandboxError(
                f"the sandbox's status cannot be read (exit code {code}): {said[:200]!r}"
            ) from error

    async def denials(self) -> list[Denial]:
        self._check_open()
        return await self._container.network.denials() if self._container.network else []

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        async with self._turn:  # one after the other
            return await self._to_its_end(await self.spawn(command, timeout, env))

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> DockerJob:
        if refusal := reason_not_executable(command):
            raise ValueError(refusal.strip())
        self._check_open()
        environment = self._environment(env)
        async with self._entrance:
            shell = self._container.shell or "/bin/sh"
            exec_ = await self._container.enter(
                scripts.run(self.config.pids),
                shell,
                command.encode(errors="replace").decode(),
                env=environment,
            )
            job = DockerJob(
                exec_,
                self.config.timeout if timeout is None else timeout,
                self.config.max_output_bytes,
                lambda: self.kill(exec_),
                self.tidy,
            )
            self._jobs.add(job)
        return job

    async def create_session(self, env: Mapping[str, str] | None = None) -> DockerSession:
        self._check_open()
        if not self._container.shell:
            raise SandboxStartError(
                f"image {self.config.image} has no bash, and a session needs one"
            )
        if len(self._sessions) >= SESSIONS:
            raise SandboxStartError(f"a sandbox has at most {SESSIONS} sessions; close one")
        name = f"{scripts.PLACE}/{os.urandom(16).hex()}\n".encode()
        async with self._entrance:
            door = await self._container.enter(scripts.DOOR, user=scripts.KEEPER, stdin=True)
            try:
                await door.send(name)
                async with asyncio.timeout(CALL_SECONDS):
                    await anext(door.frames())  # "there"
                shell = await self._container.enter(
                    scripts.session(self.config.pids),
                    env=self._environment(env),
                    stdin=True,
                    shell=f"{scripts.PLACE}/bash",
                )
            except (TimeoutError, StopAsyncIteration):
                raise SandboxStartError(
                    "the session's shell could not be given a channel"
                ) from None
            except BaseException:
                door.close()
                raise
            await shell.send(name, more=True)
            session = DockerSession(self, shell, door)
            self._sessions.add(session)
        await session.started()
        return session

    async def kill_all(self) -> None:
        self._check_open()
        async with self._entrance:
            ended = list(self._jobs)
            for one in (*ended, *self._sessions):
                one.doom("killed")
            await self._container.kill_all()
            sessions = list(self._sessions)
        for session in sessions:
            await session.close()
        if ended:
            await asyncio.wait({job._task for job in ended}, timeout=CALL_SECONDS)

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        """See Sandbox.verify: in a new container of the same image, which gets a copy of the
        workspace (and gives it back, to `keep`) and then goes.
        """
        files = files or {}
        check_verifier_files(files)
        environment = {
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "PYTHONSAFEPATH": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "VERIFIER_FILES": f"{scripts.PLACE}/files",
        }
        async with self._turn:
            await self.kill_all()
            verifier = Container(self._container.engine, self.config, self._container.image)
            async with contextlib.AsyncExitStack() as cleanup:
                workspace = await self._keep("workspace")
                cleanup.push_async_callback(workspace.delete)
                async with _start_gate:
                    cleanup.push_async_callback(verifier.remove)
                    await verifier.start(
                        PLACE_BYTES + sum(len(content) + 4096 for content in files.values())
                    )
                await unpack(verifier, workspace.file)
                await put_verifier_files(verifier, files)
                exec_ = await verifier.enter(
                    scripts.verify(self.config.pids),
                    env=environment,
                    stdin=True,
                    shell=f"{scripts.PLACE}/{'bash' if verifier.shell else 'sh'}",
                )
                sending = asyncio.create_task(exec_.send(script.encode(errors="replace")))
                cleanup.callback(sending.cancel)
                job = DockerJob(
                    exec_,
                    self.config.timeout if timeout is None else timeout,
                    self.config.max_output_bytes,
                    verifier.kill_all,
                    _nothing,
                )
                result = await self._to_its_end(job)
                if self._container.network and verifier.network:
                    await self._container.network.adopt(verifier.network)
                if keep:
                    await verifier.kill_all()
                    cleanup.push_async_callback(
                        (changed := await pack(verifier, "workspace")).delete
                    )
                    async with self._counted():
                        await self._container.ask(scripts.EMPTY)
                        await unpack(self._container, changed.file)
                return result

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        relative = self._relative_file(path)
        async with self._transfer(
            scripts.in_workspace(scripts.READ), scripts.spelled(relative)
        ) as exec_:
            async for piece in within(exec_.frames()):
                yield piece
            code = await exec_.exit_code()
        self._check_code(code, path)

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        relative = self._relative_file(path)
        async with self._transfer(
            scripts.in_workspace(scripts.WRITE),
            scripts.spelled(relative),
            f"{mode & 0o7777:o}",
            stdin=True,
        ) as exec_:
            over = asyncio.create_task(exhaust(exec_))
            try:
                async for piece in pieces:
                    if not await either(exec_.send(piece, more=True), over):
                        break
                else:
                    await either(exec_.send(b""), over)
                async with asyncio.timeout(CALL_SECONDS):
                    await over
                    code = await exec_.exit_code()
            except TimeoutError:
                raise SandboxError(
                    f"{path} was not written within {CALL_SECONDS:.0f} s after its last byte"
                ) from None
            finally:
                over.cancel()
        self._check_code(code, path)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        relative, said = self._relative(path), bytearray()
        async with self._transfer(
            scripts.in_workspace(scripts.list_files(self._container.tools)),
            scripts.spelled(relative),
        ) as exec_:
            async for piece in within(exec_.frames()):
                said += piece
                if said.count(b"\0") > MAX_LISTED or len(said) > 64 << 20:
                    raise SandboxFileError("too_large", f"there are more than {MAX_LISTED} files")
            code = await exec_.exit_code()
        if code in scripts.REASONS:  # else find's own, which complains of what vanished meanwhile
            self._check_code(code, path)
        found = []
        for record in bytes(said).split(b"\0")[:-1]:
            kind, size, mode, name = os.fsdecode(record).split(" ", 3)
            found.append(
                FileEntry(name, _KINDS.get(kind, "special"), int(size), int(mode, 8) & 0o7777)
            )
        return found

    # -- copies of its files

    async def snapshot(self) -> DockerSnapshot:
        self._check_open()
        if self._jobs or any(session.running for session in self._sessions):
            raise SandboxError("no snapshot: a command is running")
        return await self._keep("workspace tmp")

    async def restore(self, snapshot: Snapshot) -> None:
        await self.stop()
        self.__init__(self.config, snapshot)
        await self.start()

    async def commit(self, image: str) -> None:
        """The image of this sandbox and, in one file of it, a tar of the workspace and /tmp, which
        sandboxes that start from it unpack.
        """
        repository, tag = parse_repository_tag(image)
        snapshot = await self.snapshot()
        try:
            await self._container.engine.call(
                commit,
                self._container.engine.client,
                self._container.image["Id"],
                snapshot.file,
                repository,
                tag or "latest",
                seconds=SNAPSHOT_SECONDS,
            )
        finally:
            await snapshot.delete()

    async def _keep(self, directories: str) -> DockerSnapshot:
        async with self._counted():
            return await pack(self._container, directories)

    # -- a port

    async def expose_port(self, port: int) -> Address:
        """Each connection is an exec that joins the sandbox's loopback (by bash's /dev/tcp) to it.

        A client that closes its half is not heard.
        """
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        self._check_open()
        if not self._container.shell:
            raise SandboxError(
                f"image {self.config.image} has no bash, and a way to a port needs one"
            )
        free = asyncio.Semaphore(CONNECTIONS)
        door = await asyncio.start_server(
            lambda reader, writer: self._pass_through(port, free, reader, writer), "127.0.0.1", 0
        )
        self._doors.append(door)
        return Address(*door.sockets[0].getsockname())

    async def _pass_through(
        self,
        port: int,
        free: asyncio.Semaphore,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError, SandboxError), contextlib.closing(writer):
            async with free:
                exec_ = await self._container.enter(
                    scripts.CONNECT,
                    str(port),
                    user=scripts.KEEPER,
                    stdin=True,
                    shell=f"{scripts.PLACE}/bash",
                )
                sending = asyncio.create_task(_forward(reader, exec_))
                try:
                    async for number, piece in exec_.frames():
                        if number == STDOUT:
                            writer.write(piece)
                            await writer.drain()
                finally:
                    sending.cancel()
                    exec_.close()

    # -- what the above is made of

    async def tidy(self, ended: DockerJob | DockerSession) -> None:
        """After the end of a job or a session: when nothing else runs, nothing of it is left."""
        self._jobs.discard(ended)
        self._sessions.discard(ended)
        self._untidy = True
        await self._tidy_up()

    async def _tidy_up(self) -> None:
        with contextlib.suppress(SandboxClosedError):
            async with self._entrance:
                if (
                    self._untidy
                    and not (self._jobs or self._sessions or self._transfers)
                    and self.is_alive()
                ):
                    if await self._container.agents_processes():
                        await self._container.kill_all()
                    self._untidy = False

    async def kill(self, exec_: Exec) -> None:
        """What one job or session started; everything, where nothing else runs."""
        alone = len(self._jobs) + len(self._sessions) + self._transfers <= 1
        if alone or exec_.pid <= 0:
            await self._container.kill_all()
        else:
            await exec_.signal("KILL", whole=True)

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """What is ours and runs beside commands: it is not killed with what they leave."""
        async with self._entrance:
            self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1
            await self._tidy_up()

    @contextlib.asynccontextmanager
    async def _transfer(
        self, script: str, *arguments: str, stdin: bool = False
    ) -> AsyncIterator[Exec]:
        """An exec for files; where its user gives up, it is killed."""
        self._check_open()
        async with self._counted():
            with contextlib.closing(
                await self._container.enter(script, *arguments, stdin=stdin)
            ) as exec_:
                try:
                    yield exec_
                except BaseException:
                    await asyncio.shield(exec_.give_up())
                    raise

    async def _to_its_end(self, job: DockerJob) -> CommandResult:
        try:
            return await job.wait()
        except asyncio.CancelledError:
            job.doom("killed")  # its caller gave up: the command must not run on
            raise

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """A command's variables, over those of the image, whose PATH stays."""
        variables = super()._environment(env)
        if "PATH" not in self.config.env and "PATH" not in (env or {}):
            del variables["PATH"]
        return variables

    def _check_code(self, code: int, path: str) -> None:
        if code == KILLED and not self.is_alive():
            raise SandboxClosedError("the sandbox ended")
        if code:
            reason = scripts.REASONS.get(code, "denied")
            raise SandboxFileError(reason, f"{path}: {reason.replace('_', ' ')} (exit code {code})")

    def _check_open(self) -> None:
        if not self.is_alive():
            raise SandboxClosedError(
                "the sandbox is not running: it was not started, was stopped, or its container"
                " ended"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxError(
                "a sandbox is used from the event loop that started it; from elsewhere use"
                " envs.rock.sync.run"
            )


async def _nothing(job: DockerJob) -> None:
    """A verifier's container goes as a whole."""


async def _forward(reader: asyncio.StreamReader, exec_: Exec) -> None:
    while piece := await reader.read(PIECE_BYTES):
        await exec_.send(piece, more=True)
