"""Containers of the Docker engine of this machine: made with every limit on, entered by execs,
ended by id.

The calls of the docker SDK block, so they run in threads, each with a deadline; the streams of
execs are read by the event loop itself.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import random
import secrets
import socket
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeVar

import docker
import requests

from envs.rock.config import SandboxConfig
from envs.rock.docker import scripts
from envs.rock.docker.network import RUNC, ContainerNetwork, obstacle
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError
from envs.rock.host import seccomp

log = logging.getLogger("rock.docker")
T = TypeVar("T")
CALL_SECONDS = 30.0  # for one answer of the engine
END_SECONDS = 5.0  # in which what was killed must be gone
CALLS_AT_ONCE = 16
# above the agent's own, which RLIMIT_NPROC counts: our execs, which have many threads while they
# begin
RESERVED_PIDS = 64
PLACE_BYTES = 16 << 20
OWNER, MANAGER = "rock.owner", "rock.manager"
STDOUT, STDERR = 1, 2


class Engine:
    """The engine at DOCKER_HOST (a unix socket), and what this process has in it. See `engine`."""

    def __init__(self, host: str):
        if not host.startswith("unix://"):
            raise SandboxStartError(
                f"DOCKER_HOST is {host}: sandboxes are containers of this machine's own engine, at"
                " a unix:// socket; on other machines run a ROCK worker"
            )
        if not os.path.exists(host.removeprefix("unix://")):
            raise SandboxStartError(f"there is no Docker engine: nothing is at {host}")
        self.host, self.manager = host, secrets.token_hex(8)
        self._calls = ThreadPoolExecutor(CALLS_AT_ONCE, "rock-docker")
        self._containers: dict[str, Container] = {}
        self.workspaces: dict[
            str, IO[bytes] | None
        ] = {}  # a tar of what an image has in /workspace, by its id
        self.surveys: dict[
            tuple[str, str], frozenset[str]
        ] = {}  # what an image's tools can do, by its id and the runtime
        try:
            self.client = docker.APIClient(
                host, version="auto", timeout=CALL_SECONDS, max_pool_size=CALLS_AT_ONCE
            )
            self.info = self.client.info()
            self._sweep()
            events = self.client.events(
                decode=True,
                filters={"type": "container", "event": "oom", "label": f"{MANAGER}={self.manager}"},
            )
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SandboxStartError(f"no Docker engine answers at {host}: {error}") from error
        threading.Thread(
            target=self._watch, args=(events,), name="rock-docker-events", daemon=True
        ).start()

    @property
    def one_user_namespace(self) -> bool:
        """Whether containers have only the user ids below 65536."""
        return any(
            word in option
            for option in self.info.get("SecurityOptions") or ()
            for word in ("name=userns", "name=rootless")
        )

    def runtime(self, config: SandboxConfig) -> str:
        return config.runtime or self.info.get("DefaultRuntime", "")

    async def call(
        self,
        function: Callable[..., T],
        *arguments: object,
        seconds: float = CALL_SECONDS,
        **options: object,
    ) -> T:
        """A blocking call of the SDK, in a thread.

        SandboxError where the engine refuses or does not answer in time.
        """
        call = asyncio.get_running_loop().run_in_executor(
            self._calls, functools.partial(function, *arguments, **options)
        )
        name = getattr(function, "__name__", "a stream")
        try:
            async with asyncio.timeout(
                seconds
            ):  # not wait_for, which loses a cancellation that comes with the answer
                return await call
        except TimeoutError:
            raise SandboxError(
                f"the Docker engine did not answer {name} within {seconds:.0f} s"
            ) from None
        except docker.errors.NotFound as error:
            raise SandboxClosedError(
                f"the Docker engine knows it no more: {error.explanation}"
            ) from error
        except docker.errors.NullResource as error:
            raise SandboxClosedError("the sandbox has ended") from error
        except docker.errors.APIError as error:
            if error.status_code == 409 and "is not running" in (error.explanation or ""):
                raise SandboxClosedError("the container of the sandbox has ended") from error
            raise SandboxError(
                f"the Docker engine refused {name}: {error.explanation or error}"
            ) from error
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SandboxError(
                f"the Docker engine at {self.host} does not answer {name}: {error}"
            ) from error

    def labels(self) -> dict[str, str]:
        return {OWNER: json.dumps(_identity(os.getpid())), MANAGER: self.manager}

    def _sweep(self) -> None:
        """Remove what managers left that have died.

        (Their containers also end by themselves: see scripts.KEEP.)
        """
        for container in self.client.containers(all=True, filters={"label": OWNER}):
            if _is_dead(container["Labels"][OWNER]):
                with contextlib.suppress(docker.errors.APIError):
                    self.client.remove_container(container["Id"], force=True)

    def _watch(self, events) -> None:
        """In a thread of its own: the engine tells of each process that the memory limit killed."""
        with contextlib.suppress(
            docker.errors.DockerException, requests.RequestException, OSError, ValueError
        ):
            for event in events:
                if (container := self._containers.get(event["id"])) is not None:
                    container.memory_kills += 1


_engines: dict[str, Engine] = {}
_lock = threading.Lock()


def engine() -> Engine:
    """The engine at DOCKER_HOST; one connection for this process.

    SandboxStartError where none answers. It may block: call it in a thread.
    """
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    with _lock:
        if host not in _engines:
            _engines[host] = Engine(host)
        return _engines[host]


def _forget_after_fork() -> None:
    global _engines, _lock
    _engines, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _identity(pid: int) -> dict[str, str | int]:
    """What tells a process from all others, those of other containers and of earlier boots
    included.
    """
    with open(f"/proc/{pid}/stat") as file, open("/proc/sys/kernel/random/boot_id") as boot:
        started = file.read().rpartition(")")[2].split()[19]
        return {
            "pid": pid,
            "started": started,
            "boot": boot.read().strip(),
            "namespace": os.readlink("/proc/self/ns/pid"),
        }


def _is_dead(label: str) -> bool:
    """Whether the manager of this label is known to have died.

    One of another pid namespace cannot be judged from here.
    """
    try:
        owner = json.loads(label)
        here = _identity(os.getpid())
        if owner["boot"] != here["boot"]:
            return True
        return owner["namespace"] == here["namespace"] and _identity(int(owner["pid"])) != owner
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        return False  # not ours


def seccomp_profile() -> str:
    """The system calls that the embedded backend refuses, as Docker's JSON. Its own profile leaves
    AF_VSOCK and io_uring open.
    """
    eperm, enosys, eafnosupport = 1, 38, 97

    def rule(names: list[str], answer: int, *arguments: tuple[int, str, int, int]) -> dict:
        fields = [
            {"index": index, "op": operator, "value": value, "valueTwo": second}
            for index, operator, value, second in arguments
        ]
        return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": answer, "args": fields}

    low_half = 0xFFFFFFFF
    rules = [rule(sorted(seccomp._DENIED), eperm), rule(sorted(seccomp._ABSENT), enosys)]
    rules += [
        rule(["clone"], eperm, (0, "SCMP_CMP_MASKED_EQ", 1 << bit, 1 << bit))
        for bit in range(32)
        if seccomp._NEW_NAMESPACES >> bit & 1
    ]
    refused = [
        family
        for family in range(seccomp._AF_INET6)
        if family not in (seccomp._AF_UNIX, seccomp._AF_INET)
    ]
    rules += [
        rule(["socket"], eafnosupport, (0, "SCMP_CMP_MASKED_EQ", low_half, family))
        for family in refused
    ]
    rules += [
        rule(["socket"], eafnosupport, (0, "SCMP_CMP_GT", seccomp._AF_INET6, 0)),
        rule(["socketpair"], eafnosupport, (0, "SCMP_CMP_NE", seccomp._AF_UNIX, 0)),
    ]
    rules += [
        rule(["prlimit64"], eperm, (0, "SCMP_CMP_NE", 0, 0))
    ]  # of itself alone: process 1 has the same user id
    rules += [
        rule(["ioctl"], eperm, (1, "SCMP_CMP_MASKED_EQ", low_half, request))
        for request in (seccomp._TIOCSTI, seccomp._TIOCLINUX)
    ]
    return json.dumps(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": [f"SCMP_ARCH_{os.uname().machine.upper()}"],
            "syscalls": rules,
        }
    )


def host_config(
    client: docker.APIClient, config: SandboxConfig, user: int, place_bytes: int
) -> dict:
    """Every limit.

    Of disk_mb and inodes a quarter is /tmp's: Docker cannot let two mounts share one limit.
    """

    def tmpfs(size: int, inodes: int, mode: str, owner: int = 0) -> str:
        return f"rw,exec,nosuid,nodev,size={size},nr_inodes={inodes},mode={mode},uid={owner},gid={owner}"

    disk = (
        config.disk_mb << 20
    )  # core is 1, not 0: a core_pattern that is a pipe ignores 0, and the host's crash handler would run
    hidden = [
        f"/proc/{name}"
        for name in (
            "acpi",
            "asound",
            "interrupts",
            "kcore",
            "keys",
            "latency_stats",
            "sched_debug",
            "scsi",
            "timer_list",
            "timer_stats",
        )
    ]
    hidden += [
        f"/sys/{name}"
        for name in (
            "block",
            "bus",
            "class",
            "dev",
            "devices/virtual",
            "firmware",
            "hypervisor",
            "kernel",
            "module",
            "power",
        )
    ]
    limits = {
        "nofile": config.open_files,
        "core": 1,
        "fsize": disk,
        "memlock": 64 << 10,
        "msgqueue": 0,
    }
    return {"MaskedPaths": hidden} | client.create_host_config(
        privileged=False,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges", f"seccomp={seccomp_profile()}"],
        read_only=True,
        network_mode="none",
        dns=["127.0.0.1"],
        dns_search=["."],
        ipc_mode="private",
        runtime=config.runtime,
        auto_remove=True,
        log_config={"Type": "none"},
        mem_limit=config.memory_mb << 20,
        memswap_limit=config.memory_mb << 20,
        pids_limit=config.pids + RESERVED_PIDS,
        cpu_period=100_000,
        cpu_quota=max(1000, int(config.cpus * 100_000)),
        shm_size=min(16, max(1, config.memory_mb // 16)) << 20,
        ulimits=[{"Name": name, "Soft": limit, "Hard": limit} for name, limit in limits.items()],
        tmpfs={
            "/workspace": tmpfs(
                disk - disk // 4, max(16, config.inodes - config.inodes // 4), "700", user
            ),
            "/tmp": tmpfs(disk // 4, max(16, config.inodes // 4), "1777"),
            scripts.PLACE: tmpfs(place_bytes, 1024, "711", scripts.KEEPER),
        },
    )


class Container:
    """One container.

    Commands in it have a user id that no other sandbox's have, so that limits by user id count them
    alone.
    """

    def __init__(self, engine: Engine, config: SandboxConfig, image: dict):
        self.engine, self.config = engine, config
        self.id = ""
        self.user = (
            random.randrange(20_000, 60_000)
            if engine.one_user_namespace
            else random.randrange(1 << 20, 1 << 30)
        )
        self.memory_kills = 0
        self.ended = asyncio.get_running_loop().create_future()
        self.shell = ""  # the image's own, for commands
        self.image = image
        self.tools: frozenset[str] = frozenset()
        self._making: asyncio.Future | None = None
        self._lifeline: Stream | None = None
        self._watcher: asyncio.Task | None = None
        self._guarding: asyncio.Future[ContainerNetwork] | None = None
        self.network: ContainerNetwork | None = None  # None: nobody sees what is tried in it

    async def start(self, place_bytes: int = PLACE_BYTES) -> None:
        """SandboxStartError with the engine's words, or the image's, where it does not come up
        within config.start_timeout.
        """
        try:
            async with asyncio.timeout(self.config.start_timeout):
                await self._start(place_bytes)
        except TimeoutError:
            await self.remove()
            raise SandboxStartError(
                f"the container did not start within {self.config.start_timeout:g} s"
            ) from None
        except SandboxStartError:
            await self.remove()
            raise
        except SandboxError as error:
            await self.remove()
            raise SandboxStartError(str(error)) from error
        except BaseException:
            await asyncio.shield(self.remove())
            raise

    async def _start(self, place_bytes: int) -> None:
        client = self.engine.client
        labels = self.engine.labels() | (
            {"rock.label": self.config.label} if self.config.label else {}
        )
        agent = f"{self.user}:{self.user}"
        name = f"rock-{secrets.token_hex(8)}"
        self.id = name  # until the engine gives another
        self._making = asyncio.ensure_future(
            self.engine.call(
                client.create_container,
                self.image["Id"],
                entrypoint=["/bin/sh", "-c", scripts.INIT],
                command=[],
                user=agent,
                hostname="sandbox",
                working_dir="/",
                stdin_open=True,
                labels=labels,
                name=name,
                host_config=host_config(client, self.config, self.user, place_bytes),
                healthcheck={"test": ["NONE"]},
                stop_signal="SIGKILL",
            )
        )
        self.id = (await asyncio.shield(self._making))["Id"]
        self.engine._containers[self.id] = self
        if (
            self.image["Id"] not in self.engine.workspaces
        ):  # before the start: a mount lies over it then
            self.engine.workspaces[self.image["Id"]] = await self.engine.call(
                _fetch_workspace, client, self.id, seconds=self.config.start_timeout
            )
        self._lifeline = await Stream.open(
            self.engine,
            functools.partial(
                client.attach_socket,
                self.id,
                params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1},
            ),
        )
        await self.engine.call(client.start, self.id, seconds=self.config.start_timeout)
        said = b""
        async for _, piece in self._lifeline.frames():
            said += piece
            if said.endswith(b"ready\n"):
                break
        else:
            raise SandboxStartError(
                f"image {self.config.image} has not what a sandbox needs (sh, cp, chmod, rm):"
                f" {said.decode(errors='replace').strip()[-500:] or 'its shell ended'}"
            )
        self._watcher = asyncio.create_task(self._watch())
        await self._guard_network()
        code, bash = await self.ask(scripts.KEEP, user=scripts.KEEPER, shell="/bin/sh")
        if code:
            raise SandboxStartError(
                f"image {self.config.image} has not what a sandbox needs (cp, chmod)"
            )
        self.shell = bash.strip()
        key = self.image["Id"], self.engine.runtime(self.config)
        if key not in self.engine.surveys:
            code, words = await self.ask(scripts.SURVEY)
            if code or "ok" not in words.split():
                raise SandboxStartError(
                    f"image {self.config.image} has not what a sandbox needs (sh, cat, find, tar,"
                    f" stat): {words.strip()[-500:]}"
                )
            self.engine.surveys[key] = frozenset(words.split())
        self.tools = self.engine.surveys[key]

    async def _guard_network(self) -> None:
        if obstacle(self.engine.runtime(self.config)):
            return
        about = await self.engine.call(self.engine.client.inspect_container, self.id)
        try:
            self._guarding = asyncio.ensure_future(
                asyncio.to_thread(
                    ContainerNetwork,
                    about["State"]["Pid"],
                    self.id,
                    self.config,
                    asyncio.get_running_loop(),
                )
            )
            self.network = await asyncio.shield(self._guarding)
        except SandboxError as error:
            if self.config.egress:
                raise
            log.warning(
                "what is tried in container %s is not seen: %s", self.id[:12], error
            )  # it has no network all the same

    async def denials_since_last_told(self) -> int:
        return await self.network.since_last_told() if self.network else 0

    async def _watch(self) -> None:
        """Its output ends with it."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async for _ in self._lifeline.frames():
                pass
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def alive(self) -> bool:
        return self._watcher is not None and not self.ended.done()

    async def enter(
        self,
        script: str,
        *arguments: str,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        shell: str = f"{scripts.PLACE}/sh",
    ) -> "Exec":
        """Start a script of `inside` in the container, as the agent's user or another."""
        if self.ended.done():
            raise SandboxClosedError("the sandbox has ended")
        command = [shell, "-c", f"echo $$\n{script}", "sandbox", *arguments]
        who = self.user if user is None else user
        made = await self.engine.call(
            self.engine.client.exec_create,
            self.id,
            command,
            user=f"{who}:{who}",
            workdir="/",
            environment=dict(env or {}),
            stdin=stdin,
        )
        stream = await Stream.open(
            self.engine, functools.partial(self.engine.client.exec_start, made["Id"], socket=True)
        )
        return Exec(self, made["Id"], stream)

    async def ask(
        self,
        script: str,
        *arguments: str,
        user: int | None = None,
        stdin: bytes | None = None,
        seconds: float = CALL_SECONDS,
        shell: str = f"{scripts.PLACE}/sh",
    ) -> tuple[int, str]:
        """(exit code, stdout) of a short script. SandboxError where it does not end in time."""
        said = bytearray()
        try:
            async with asyncio.timeout(seconds):
                exec_ = await self.enter(
                    script, *arguments, user=user, stdin=stdin is not None, shell=shell
                )
                sending = asyncio.create_task(exec_.send(stdin)) if stdin is not None else None
                try:
                    async for number, piece in exec_.frames():
                        if number == STDOUT and len(said) < 1 << 16:
                            said += piece
                    return await exec_.exit_code(), bytes(said).decode(errors="surrogateescape")
                finally:
                    if sending:
                        sending.cancel()
                    exec_.close()
        except TimeoutError:
            raise SandboxError(
                f"a script in the sandbox did not end within {seconds:.0f} s"
            ) from None

    async def check(self) -> None:
        """SandboxClosedError if it has ended, whether or not the engine has noticed yet: a program
        of the keeper's must run in it.
        """
        try:
            code, _ = await self.ask(":", user=scripts.KEEPER)
        except SandboxError as error:
            raise SandboxClosedError(f"the container of the sandbox has ended: {error}") from error
        if code:
            raise SandboxClosedError("the container of the sandbox is ending")

    async def kill_all(self) -> None:
        """Kill every process of the agent and wait until they are gone.

        SandboxError, and the end of the container, if one stays.
        """
        for pause in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 1.0):
            await self.engine.call(self.engine.client.kill, self.id, scripts.KILL_ALL)
            await asyncio.sleep(pause)
            if not await self.agents_processes():
                return
        await self.remove()
        raise SandboxError("a process of the sandbox could not be killed, so its container was")

    async def agents_processes(self) -> int:
        """How many there are beside process 1, zombies not counted, as the engine sees it from
        outside.
        """
        if (
            self.engine.runtime(self.config) not in RUNC
        ):  # whose processes the engine does not see one by one
            code, said = await self.ask(scripts.COUNT, user=scripts.KEEPER)
            return max(0, int(said) - 2) if said.strip().isdigit() else 1
        listed = await self.engine.call(self.engine.client.top, self.id, "-eo pid,uid,stat")
        ours = (str(scripts.KEEPER), "0") if not self.engine.one_user_namespace else ()
        return max(
            0,
            sum(
                user not in ours and not state.startswith("Z")
                for _, user, state in listed["Processes"] or ()
            )
            - 1,
        )

    async def remove(self) -> None:
        """Kill and remove it, by id. SandboxError where the engine does not say that it is gone."""
        if not self.id:
            return
        name, self.id = self.id, ""
        if (
            self._making and not self._making.done()
        ):  # we were cancelled meanwhile: it is there only when that call has come back
            await asyncio.wait({self._making}, timeout=CALL_SECONDS)
        self.engine._containers.pop(name, None)
        if not self.ended.done():
            self.ended.set_result(None)
        try:
            for _ in range(50):
                try:
                    await self.engine.call(
                        self.engine.client.remove_container, name, v=True, force=True
                    )
                except SandboxClosedError:
                    break
                except SandboxError as error:
                    if "already in progress" not in str(error):
                        raise
                await asyncio.sleep(0.02)
        finally:
            if self._guarding:  # we may have been cancelled while it was made
                await asyncio.wait({self._guarding}, timeout=END_SECONDS)
                if self._guarding.done() and not self._guarding.exception():
                    self._guarding.result().close()
            if self._watcher:
                self._watcher.cancel()
            if self._lifeline:
                self._lifeline.close()


def _fetch_workspace(client: docker.APIClient, container: str) -> IO[bytes] | None:
    """A tar of what its image has in /workspace; None where that is missing or empty."""
    try:
        pieces, _ = client.get_archive(container, "/workspace")
    except docker.errors.NotFound:
        return None
    file = tempfile.TemporaryFile(prefix="rock-")
    for piece in pieces:
        file.write(piece)
    file.flush()
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        if tar.next() and tar.next():  # the directory itself, and something in it
            return file
    file.close()
    return None


class Stream:
    """A hijacked connection of the engine's: what we write is the stdin of a program, and frames of
    its stdout and stderr come back.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self.writer = reader, writer

    @classmethod
    async def open(cls, engine: Engine, call: Callable[[], socket.SocketIO]) -> "Stream":
        sock, early = await engine.call(functools.partial(_take_socket, call))
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        reader.feed_data(early)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def frames(self) -> AsyncIterator[tuple[int, bytes]]:
        """(STDOUT or STDERR, bytes) until the end."""
        while True:
            try:
                header = await self._reader.readexactly(8)
                yield header[0], await self._reader.readexactly(int.from_bytes(header[4:], "big"))
            except (asyncio.IncompleteReadError, ConnectionError):
                return

    async def drain(self) -> None:
        """Read on to the end, whatever it is."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1 << 16):
                pass

    def close(self) -> None:
        self.writer.close()


def _take_socket(call: Callable[[], socket.SocketIO]) -> tuple[socket.socket, bytes]:
    """The socket of a hijacked connection, and what came on it before it was ours: http.client
    reads the headers through a buffer.
    """
    raw = call()
    response = raw._response
    taken = socket.socket(fileno=os.dup(raw.fileno()))
    taken.setblocking(False)  # the flag is of the connection, so of both descriptors
    raw._sock.setblocking(False)
    buffered = response.raw._fp.fp
    early = buffered.read1(1 << 16) if buffered.peek(1) else b""
    response.close()
    return taken, early


class Exec:
    """One program that was started in a container, and its end as the engine tells it."""

    def __init__(self, container: Container, name: str, stream: Stream):
        self.container, self.name, self.stream = container, name, stream
        self.pid = 0  # in the container; 0 until the first frame has come

    async def frames(self) -> AsyncIterator[tuple[int, bytes]]:
        """(STDOUT or STDERR, bytes) until the end, after the process id."""
        first = b""
        async for number, piece in self.stream.frames():
            if not self.pid and number == STDOUT:
                first += piece
                line, end, piece = first.partition(b"\n")
                if not end:
                    continue
                self.pid = int(line) if line.isdigit() else -1
            if piece:
                yield number, piece

    async def send(self, data: bytes, more: bool = False) -> None:
        """Onto its stdin, and then its end."""
        with contextlib.suppress(ConnectionError):
            self.stream.writer.write(data)
            await self.stream.writer.drain()
            if not more:
                self.stream.writer.write_eof()

    async def exit_code(self, seconds: float = CALL_SECONDS) -> int:
        """Once its streams have ended, or a little later.

        SandboxClosedError if the container ended with it.
        """
        client, pause = self.container.engine.client, 0.005
        async with asyncio.timeout(seconds):
            while (state := await self.container.engine.call(client.exec_inspect, self.name))[
                "Running"
            ] or state["ExitCode"] is None:
                if self.container.ended.done():
                    raise SandboxClosedError("the sandbox ended before its command")
                await asyncio.sleep(pause)
                pause = min(0.1, 2 * pause)
        return state["ExitCode"]

    async def signal(self, name: str, *, whole: bool, spared: str = "") -> None:
        """To what it started: see scripts.SIGNAL."""
        if self.pid <= 0:
            raise SandboxError("a program's process id is not known yet")
        await self.container.ask(
            scripts.SIGNAL, name, str(self.pid), "whole" if whole else "", spared
        )

    async def give_up(self) -> None:
        """Kill it while its stream is read on: one that nobody reads makes the engine wait, and
        whoever asks it for something else of the container.
        """
        draining = asyncio.create_task(self.stream.drain())
        with contextlib.suppress(SandboxError):
            await self.signal("KILL", whole=True)
        await asyncio.wait({draining}, timeout=END_SECONDS)
        draining.cancel()

    def close(self) -> None:
        self.stream.close()
