"""The Docker backend: a sandbox is a container of this machine's engine, entered by execs.

The container is never privileged, has no capability, a read-only image, and no network except what
`egress` grants (network.py). /workspace and /tmp are tmpfs and share disk_mb and inodes three to
one. The agent cannot end, open or stop process 1, which kills all of the agent's processes when the
engine tells it to, and ends by itself when this process dies. A command costs an exec (about
50 ms), a session's command none.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from docker.utils import parse_repository_tag

from envs.rock.backend import (
    Backend,
    Snapshot,
    check_verifier_files,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.docker import scripts
from envs.rock.docker.activity import Activity
from envs.rock.docker.commands import DockerJob, DockerSession
from envs.rock.docker.container import PLACE_BYTES, Container
from envs.rock.docker.engine import Engine, engine
from envs.rock.docker.files import (
    COMMITTED,
    INODE_BYTES,
    SNAPSHOT_SECONDS,
    DockerSnapshot,
    commit,
    pack,
    put_verifier_files,
    unpack,
)
from envs.rock.docker.limits import TOOLS
from envs.rock.docker.network import obstacle
from envs.rock.docker.ports import ExposedPorts
from envs.rock.docker.probe import probe_docker
from envs.rock.docker.workspace import Workspace
from envs.rock.errors import (
    AgentFault,
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxStartError,
)
from envs.rock.gate import Gate
from envs.rock.tiers import REQUIRED
from envs.rock.wire.archive import Transfer

STARTS_AT_ONCE = 8
_start_gate = Gate(STARTS_AT_ONCE)
_VERIFIER_ENVIRONMENT = {
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "VERIFIER_FILES": f"{scripts.PLACE}/files",
}


class DockerBackend(Backend):
    """A sandbox in a container. See Backend.

    The image must be present (`docker pull`, or images.build) and have sh and the usual programs;
    sessions need bash.
    """

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        self._snapshot = _require_docker(snapshot)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()  # of execute and verify: one after the other
        self._running: _Running | None = None

    # -- start and end

    async def start(self) -> None:
        if self._running is not None:
            raise SandboxError("this sandbox is started already")
        report = await asyncio.to_thread(probe_docker, self.config.runtime)
        report.require(self.config.isolation)
        host = await asyncio.to_thread(engine)
        self._check_network(host)
        image = await self._inspect_image(host)
        self._loop = asyncio.get_running_loop()
        async with _start_gate:
            container = Container(host, self.config, image)
            self._running = _Running(container)
            await container.start()
        guarantees = report.guarantees
        if "undumpable" not in container.tools:
            guarantees -= {"verifier"}
        await self._check_isolation(host, guarantees)
        try:
            await self._load_files(container)
        except BaseException:
            await asyncio.shield(self.stop())
            raise
        self.id = container.id[:12]
        self.tier = report.tier
        self.guarantees = guarantees

    async def stop(self) -> None:
        if self._running is None:
            return
        self._running.ports.close()
        await self._running.container.remove()
        await self._running.activity.settle()

    def is_alive(self) -> bool:
        return self._running is not None and self._running.container.alive

    async def get_status(self) -> SandboxStatus:
        running = self._open()
        network = running.container.network
        code, said = await running.container.ask(scripts.STATUS)
        try:
            status = _parse_status(said, running.activity)
        except ValueError as error:
            raise SandboxError(
                f"the sandbox's status cannot be read (exit code {code}): {said[:200]!r}"
            ) from error
        return status._replace(network_denials=await network.count() if network else None)

    async def denials(self) -> list[Denial]:
        network = self._open().container.network
        return await network.denials() if network else []

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        async with self._turn:
            job = await self.spawn(command, timeout, env)
            return await job.wait_or_kill()

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> DockerJob:
        if refusal := reason_not_executable(command):
            raise ValueError(refusal.strip())
        activity = self._open().activity
        return await activity.start_job(command, self._environment(env), self._timeout(timeout))

    async def create_session(self, env: Mapping[str, str] | None = None) -> DockerSession:
        return await self._open().activity.start_session(self._environment(env))

    async def kill_all(self) -> None:
        await self._open().activity.kill_all()

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        """Run a verifier's script in a new container of the same image. See Sandbox.verify.

        The new container gets a copy of the workspace, returns it if `keep`, and is removed.
        """
        files = files or {}
        check_verifier_files(files)
        async with self._turn, contextlib.AsyncExitStack() as cleanup:
            await self.kill_all()
            running = self._open()
            workspace = await self._pack(running, "workspace")
            cleanup.push_async_callback(workspace.delete)
            verifier = Container(
                running.container.engine,
                self.config,
                running.container.image,
                tools=self.config.verifier_tools,
            )
            cleanup.push_async_callback(verifier.remove)
            file_bytes = sum(len(content) + INODE_BYTES for content in files.values())
            async with _start_gate:
                await verifier.start(PLACE_BYTES + file_bytes)
            await _unpack_agents(verifier, workspace)
            await put_verifier_files(verifier, files)
            result = await self._run_verifier(verifier, script, self._timeout(timeout))
            if running.container.network and verifier.network:
                await running.container.network.adopt(verifier.network)
            if keep:
                await self._take_over_workspace(running, verifier)
            return result

    async def expose_port(self, port: int) -> Address:
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        return await self._open().ports.expose(port)

    # -- copies of the files

    async def snapshot(self) -> DockerSnapshot:
        running = self._open()
        if running.activity.busy:
            raise SandboxError("no snapshot: a command is running")
        return await self._pack(running, "workspace tmp")

    async def restore(self, snapshot: Snapshot) -> None:
        files = _require_docker(snapshot)
        await self.stop()
        self._snapshot = files
        self._turn = asyncio.Lock()
        self._running = None
        await self.start()

    async def commit(self, image: str) -> None:
        """Save the image of this sandbox with a tar of the workspace and /tmp in it.

        Sandboxes that start from it unpack the tar.
        """
        repository, tag = parse_repository_tag(image)
        snapshot = await self.snapshot()
        container = self._open().container
        try:
            await container.engine.call(
                commit,
                container.engine.client,
                container.image["Id"],
                snapshot.file,
                repository,
                tag or "latest",
                seconds=SNAPSHOT_SECONDS,
            )
        finally:
            await snapshot.delete()

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        relative = self._relative_file(path)
        async with contextlib.aclosing(self._open().workspace.read(relative, path)) as pieces:
            async for piece in pieces:
                yield piece

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        relative = self._relative_file(path)
        await self._open().workspace.write(relative, path, pieces, mode)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        relative = self._relative(path)
        return await self._open().workspace.list_all(relative, path)

    async def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        relative = self._relative(path)
        async with contextlib.aclosing(self._open().workspace.pack(relative, path)) as pieces:
            async for piece in pieces:
                yield piece

    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        return await self._open().workspace.unpack(self._relative(path), path, pieces)

    # -- steps of the above

    def _check_network(self, host: Engine) -> None:
        asked = [*self.config.egress, *self.config.doors]
        if not asked:
            return
        if reason := obstacle(host.runtime(self.config)):
            raise IsolationError(
                f"egress and doors ({', '.join(asked)}) cannot be given here, because {reason};"
                " leave both empty, or run as root with runc"
            )

    async def _inspect_image(self, host: Engine) -> dict:
        try:
            return await host.call(host.client.inspect_image, self.config.image)
        except SandboxClosedError:
            raise SandboxStartError(
                f"the Docker engine has no image {self.config.image!r}; pull it or build it first"
            ) from None

    async def _check_isolation(self, host: Engine, guarantees: frozenset[str]) -> None:
        """Stop the sandbox and raise IsolationError if a required guarantee is missing."""
        lost = REQUIRED - guarantees
        if self.config.isolation != "required" or not lost:
            return
        await self.stop()
        raise IsolationError(
            f"isolation='required' cannot be enforced with image {self.config.image} and"
            f" runtime {host.runtime(self.config)} ({', '.join(sorted(lost))}): its kernel lets"
            " a program look into the one that started it; remedy: the default runtime"
        )

    async def _load_files(self, container: Container) -> None:
        """Write the files to start from.

        They are the snapshot's; else those committed with the image; else what the image has in
        /workspace, where the mount hides it.
        """
        if self._snapshot:
            await unpack(container, self._snapshot.file)
            return
        if COMMITTED in (container.image["Config"].get("Labels") or {}):
            code, said = await container.ask(scripts.BRING_COMMITTED, seconds=SNAPSHOT_SECONDS)
            if code:
                raise SandboxStartError(
                    f"the files committed with image {self.config.image} do not fit in:"
                    f" {said.strip()[-300:]}"
                )
            return
        content = container.engine.workspaces[container.image["Id"]]
        if content is not None:
            await unpack(container, content)

    async def _pack(self, running: "_Running", directories: str) -> DockerSnapshot:
        async with running.activity.counted():
            return await pack(running.container, directories)

    async def _run_verifier(
        self, verifier: Container, script: str, timeout: float
    ) -> CommandResult:
        shell = "bash" if verifier.shell else "sh"
        variables = dict(_VERIFIER_ENVIRONMENT)
        if self.config.verifier_tools:
            variables["VERIFIER_TOOLS"] = TOOLS
        exec_ = await verifier.enter(
            scripts.verify(self.config.pids),
            env=variables,
            stdin=True,
            shell=f"{scripts.PLACE}/{shell}",
        )
        sending = asyncio.create_task(exec_.send(script.encode(errors="replace")))
        try:
            job = DockerJob(
                verifier,
                exec_,
                timeout=timeout,
                max_output_bytes=self.config.max_output_bytes,
                kill=verifier.kill_all,
            )
            return await job.wait_or_kill()
        finally:
            sending.cancel()

    async def _take_over_workspace(self, running: "_Running", verifier: Container) -> None:
        """Replace the workspace by the verifier's."""
        await verifier.kill_all()
        changed = await pack(verifier, "workspace")
        try:
            async with running.activity.counted():
                await running.container.ask(scripts.EMPTY)
                await _unpack_agents(running.container, changed)
        finally:
            await changed.delete()

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """Return the variables of a command; PATH stays the image's unless it is given."""
        variables = super()._environment(env)
        if "PATH" not in self.config.env and "PATH" not in (env or {}):
            del variables["PATH"]
        return variables

    def _open(self) -> "_Running":
        """Return the parts of the running sandbox, or raise if it does not run."""
        if self._running is None or not self._running.container.alive:
            is_out_of_memory = self._running and self._running.container.memory_kills
            kind = AgentFault if is_out_of_memory else SandboxClosedError
            raise kind(
                "the sandbox is not running: it was not started, was stopped, or its container"
                " ended"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxError(
                "a sandbox is used from the event loop that started it; from elsewhere use"
                " envs.rock.sync.run"
            )
        return self._running


class _Running:
    """The container of a started sandbox and what is kept about it."""

    def __init__(self, container: Container):
        self.container = container
        self.activity = Activity(container)
        self.workspace = Workspace(container, self.activity)
        self.ports = ExposedPorts(container)


def _require_docker(snapshot: Snapshot | None) -> DockerSnapshot | None:
    if snapshot is None or isinstance(snapshot, DockerSnapshot):
        return snapshot
    raise SandboxError(
        f"a Docker sandbox starts from a DockerSnapshot, not from {type(snapshot).__name__}"
    )


async def _unpack_agents(container: Container, files: DockerSnapshot) -> None:
    """Write files that an agent made.

    Raises:
      AgentFault: they do not fit in, or cannot be made.
    """
    try:
        await unpack(container, files.file)
    except SandboxStartError as error:
        raise AgentFault(str(error)) from error


def _parse_status(said: str, activity: Activity) -> SandboxStatus:
    """Parse what scripts.STATUS writes; ValueError if it is something else."""
    first, *volumes = (line.split() for line in said.splitlines())
    memory, pids, nanoseconds = first
    disk_bytes = 0
    used_inodes = 0
    for block_bytes, blocks, free_blocks, inodes, free_inodes in volumes:
        disk_bytes += int(block_bytes) * (int(blocks) - int(free_blocks))
        used_inodes += int(inodes) - int(free_inodes)
    own = 2 + activity.sessions  # process 1, this script, and each session's reporter
    return SandboxStatus(
        memory_bytes=int(memory) if memory.isdigit() else None,
        pids=max(0, int(pids) - own) if pids.isdigit() else None,
        cpu_seconds=int(nanoseconds) / 1e9,
        disk_bytes=disk_bytes,
        inodes=used_inodes,
        commands=activity.running_commands,
        sessions=activity.sessions,
        network_denials=None,
    )
