"""One container: created with every limit on, entered by execs, removed by id."""

import asyncio
import contextlib
import functools
import logging
import random
import secrets
import tarfile
import tempfile
from collections.abc import Mapping
from typing import IO

import docker

from envs.rock.config import SandboxConfig
from envs.rock.docker import scripts
from envs.rock.docker.engine import CALL_SECONDS, Engine
from envs.rock.docker.limits import host_config
from envs.rock.docker.network import HOST_KERNEL_RUNTIMES, ContainerNetwork, obstacle
from envs.rock.docker.streams import STDOUT, Exec, Stream
from envs.rock.errors import AgentFault, SandboxClosedError, SandboxError, SandboxStartError

log = logging.getLogger("rock.docker")
END_SECONDS = 5.0  # in which a killed process must be gone
PLACE_BYTES = 16 << 20  # for copies of the image's shells
MAX_ANSWER_BYTES = 1 << 16  # of a script's output
MAX_ERROR_CHARACTERS = 500  # of what a script says, in an error
KILL_PAUSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 1.0)  # seconds
REMOVE_ATTEMPTS = 50
_SHELL = f"{scripts.PLACE}/sh"
_USERS = range(1 << 20, 1 << 30)  # user ids of agents
_FEW_USERS = range(20_000, 60_000)  # where a user namespace has only 65536 ids


class Container:
    """One container of the engine.

    Its commands have a user id that no other sandbox has, so limits by user id count them alone.

    Attributes:
      id: the engine's id; "" before the start and after the removal.
      image: the engine's description of the image.
      tools_directory: the host's directory that it sees read-only at limits.TOOLS; "" for none.
      shell: path of the image's bash; "" if it has none.
      tools: what the image's tools can do, see scripts.SURVEY.
      ended: done when the container has ended.
      memory_kills: how many processes its memory limit has killed.
      network: the guard of its network; None where there can be none.
    """

    def __init__(self, engine: Engine, config: SandboxConfig, image: dict, tools: str = ""):
        self.engine = engine
        self.config = config
        self.image = image
        self.tools_directory = tools
        self.id = ""
        self.shell = ""
        self.tools: frozenset[str] = frozenset()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.memory_kills = 0
        self.network: ContainerNetwork | None = None
        users = _FEW_USERS if engine.one_user_namespace else _USERS
        self._user = random.randrange(users.start, users.stop)
        self._making: asyncio.Future[dict] | None = None
        self._lifeline: Stream | None = None
        self._watcher: asyncio.Task | None = None
        self._guarding: asyncio.Future[ContainerNetwork] | None = None

    # -- start and end

    async def start(self, place_bytes: int = PLACE_BYTES) -> None:
        """Create and start it; remove it again if that fails.

        Raises:
          SandboxStartError: with the words of the engine or of the image, also when it is not
            ready within config.start_timeout.
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
        await self._create(place_bytes)
        await self._fetch_image_workspace()
        await self._run_process_1()
        await self._guard_network()
        await self._copy_shells()
        self.tools = await self._survey_tools()

    async def _create(self, place_bytes: int) -> None:
        client = self.engine.client
        labels = self.engine.labels()
        if self.config.label:
            labels["rock.label"] = self.config.label
        name = f"rock-{secrets.token_hex(8)}"
        self.id = name  # until the engine gives another
        creation = self.engine.call(
            client.create_container,
            self.image["Id"],
            entrypoint=["/bin/sh", "-c", scripts.INIT],
            command=[],
            user=f"{self._user}:{self._user}",
            hostname="sandbox",
            working_dir="/",
            stdin_open=True,
            labels=labels,
            name=name,
            host_config=host_config(
                client, self.config, self._user, place_bytes, self.tools_directory
            ),
            healthcheck={"test": ["NONE"]},
            stop_signal="SIGKILL",
        )
        self._making = asyncio.ensure_future(creation)
        self.id = (await asyncio.shield(self._making))["Id"]
        self.engine.on_memory_kill[self.id] = self._count_memory_kill

    async def _fetch_image_workspace(self) -> None:
        """Copy the image's /workspace once, before the start: later a mount lies over it."""
        image = self.image["Id"]
        if image not in self.engine.workspaces:
            self.engine.workspaces[image] = await self.engine.call(
                _fetch_workspace, self.engine.client, self.id, seconds=self.config.start_timeout
            )

    async def _run_process_1(self) -> None:
        """Start the container; its process 1 ends when the stream to its input does."""
        client = self.engine.client
        ends = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        attach = functools.partial(client.attach_socket, self.id, params=ends)
        lifeline = await Stream.open(self.engine, attach)
        self._lifeline = lifeline
        await self.engine.call(client.start, self.id, seconds=self.config.start_timeout)
        said = b""
        async for _, piece in lifeline.frames():
            said += piece
            if said.endswith(b"ready\n"):
                break
        else:
            words = said.decode(errors="replace").strip()[-MAX_ERROR_CHARACTERS:]
            raise SandboxStartError(
                f"image {self.config.image} lacks what a sandbox needs (sh, cp, chmod, rm):"
                f" {words or 'its shell ended'}"
            )
        self._watcher = asyncio.create_task(self._notice_end(lifeline))

    async def _guard_network(self) -> None:
        """Put a guard into its network, to record refused connections and relay granted ones.

        Where that is not possible it has no network all the same.
        """
        if obstacle(self.engine.runtime(self.config)):
            return
        about = await self.engine.call(self.engine.client.inspect_container, self.id)
        making = asyncio.to_thread(
            ContainerNetwork,
            about["State"]["Pid"],
            self.id,
            self.config,
            asyncio.get_running_loop(),
        )
        self._guarding = asyncio.ensure_future(making)
        try:
            self.network = await asyncio.shield(self._guarding)
        except SandboxError as error:
            if self.config.egress or self.config.doors:
                raise
            log.warning(
                "refused connections of container %s are not recorded: %s", self.id[:12], error
            )

    async def _copy_shells(self) -> None:
        """Copy the image's shells to where the agent can run but not read them."""
        code, bash = await self.ask(scripts.KEEP, user=scripts.KEEPER, shell="/bin/sh")
        if code:
            raise SandboxStartError(
                f"image {self.config.image} lacks what a sandbox needs (cp, chmod)"
            )
        self.shell = bash.strip()

    async def _survey_tools(self) -> frozenset[str]:
        """Find out, once for each image and runtime, what its tools can do."""
        key = (self.image["Id"], self.engine.runtime(self.config))
        if key not in self.engine.surveys:
            code, words = await self.ask(scripts.SURVEY)
            if code or "ok" not in words.split():
                raise SandboxStartError(
                    f"image {self.config.image} lacks what a sandbox needs (sh, cat, find, tar,"
                    f" stat): {words.strip()[-MAX_ERROR_CHARACTERS:]}"
                )
            self.engine.surveys[key] = frozenset(words.split())
        return self.engine.surveys[key]

    async def _notice_end(self, lifeline: Stream) -> None:
        """Read process 1's output, which ends with the container."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async for _ in lifeline.frames():
                pass
        self._mark_ended()

    def _mark_ended(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def alive(self) -> bool:
        """Whether it has started and is not known to have ended."""
        return self._watcher is not None and not self.ended.done()

    async def check(self) -> None:
        """Raise an error if it has ended, even where the engine has not noticed yet.

        To find out, a program of the keeper is run in it.

        Raises:
          AgentFault: it has ended, and processes were killed because its memory was full.
          SandboxClosedError: it has ended for another reason.
        """
        kind = AgentFault if self.memory_kills else SandboxClosedError
        try:
            code, _ = await self.ask(":", user=scripts.KEEPER)
        except SandboxError as error:
            raise kind(f"the container of the sandbox has ended: {error}") from error
        if code:
            raise kind("the container of the sandbox is ending")

    async def remove(self) -> None:
        """Kill and remove it, by id.

        Raises:
          SandboxError: the engine does not confirm that it is gone.
        """
        if not self.id:
            return
        name = self.id
        self.id = ""
        if self._making and not self._making.done():
            # We were cancelled: the container exists only when that call has come back.
            await asyncio.wait({self._making}, timeout=CALL_SECONDS)
        self.engine.on_memory_kill.pop(name, None)
        self._mark_ended()
        try:
            await self._remove_by_name(name)
        finally:
            await self._close_guard()
            if self._watcher:
                self._watcher.cancel()
            if self._lifeline:
                self._lifeline.close()

    async def _remove_by_name(self, name: str) -> None:
        for _ in range(REMOVE_ATTEMPTS):
            try:
                await self.engine.call(
                    self.engine.client.remove_container, name, v=True, force=True
                )
            except SandboxClosedError:
                return  # it does not exist any more
            except SandboxError as error:
                if "already in progress" not in str(error):
                    raise
            await asyncio.sleep(0.02)

    async def _close_guard(self) -> None:
        if self._guarding is None:
            return
        await asyncio.wait({self._guarding}, timeout=END_SECONDS)  # it may still be being made
        if self._guarding.done() and not self._guarding.exception():
            self._guarding.result().close()

    # -- programs in it

    async def enter(
        self,
        script: str,
        *arguments: str,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        shell: str = _SHELL,
    ) -> Exec:
        """Start a script of scripts.py in the container.

        Args:
          script: for `shell`.
          arguments: $1, $2, ... of the script.
          user: its user id; None for the agent's.
          env: its variables.
          stdin: whether it reads what is sent to it.
          shell: path in the container.
        """
        if self.ended.done():
            raise SandboxClosedError("the sandbox has ended")
        client = self.engine.client
        who = self._user if user is None else user
        made = await self.engine.call(
            client.exec_create,
            self.id,
            [shell, "-c", f"echo $$\n{script}", "sandbox", *arguments],
            user=f"{who}:{who}",
            workdir="/",
            environment=dict(env or {}),
            stdin=stdin,
        )
        start = functools.partial(client.exec_start, made["Id"], socket=True)
        stream = await Stream.open(self.engine, start)
        return Exec(self.engine, made["Id"], stream, self.ended)

    async def ask(
        self,
        script: str,
        *arguments: str,
        user: int | None = None,
        stdin: bytes | None = None,
        seconds: float = CALL_SECONDS,
        shell: str = _SHELL,
    ) -> tuple[int, str]:
        """Run a short script and return (exit code, stdout).

        Raises:
          AgentFault: it does not end within `seconds`; the sandbox's processes may stop it.
        """
        try:
            async with asyncio.timeout(seconds):
                exec_ = await self.enter(
                    script, *arguments, user=user, stdin=stdin is not None, shell=shell
                )
                return await _converse(exec_, stdin)
        except TimeoutError:
            raise AgentFault(
                f"a script in the sandbox did not end within {seconds:.0f} s"
            ) from None

    async def signal(self, exec_: Exec, name: str, *, whole: bool, spared: str = "") -> None:
        """Send a signal to what a program started.

        Args:
          exec_: the program.
          name: "INT" or "KILL".
          whole: to the program itself and to its session too.
          spared: process ids of children to leave alone, with all below them.
        """
        if exec_.pid <= 0:
            raise SandboxError("a program's process id is not known yet")
        flag = "whole" if whole else ""
        await self.ask(scripts.SIGNAL, name, str(exec_.pid), flag, spared)

    async def abandon(self, exec_: Exec) -> None:
        """Kill a program whose output is not wanted any more.

        Its stream is read to the end meanwhile: the engine waits for a reader, and then keeps all
        other requests for this container waiting.
        """
        draining = asyncio.create_task(exec_.drain())
        with contextlib.suppress(SandboxError):
            await self.signal(exec_, "KILL", whole=True)
        await asyncio.wait({draining}, timeout=END_SECONDS)
        draining.cancel()

    # -- its processes

    def _count_memory_kill(self) -> None:
        self.memory_kills += 1

    async def denials_since_last_call(self) -> int:
        """Return how many connections were refused since this was last asked."""
        if self.network is None:
            return 0
        return await self.network.denials_since_last_call()

    async def kill_all(self) -> None:
        """Kill every process of the agent and wait until they are gone.

        Raises:
          AgentFault: one stays; the container is removed then.
        """
        for pause in KILL_PAUSES:
            await self.engine.call(self.engine.client.kill, self.id, scripts.KILL_ALL)
            await asyncio.sleep(pause)
            if not await self.count_processes():
                return
        await self.remove()
        raise AgentFault("a process of the sandbox could not be killed, so its container was")

    async def count_processes(self) -> int:
        """Count the agent's processes beside process 1, zombies excluded, from outside."""
        if self.engine.runtime(self.config) not in HOST_KERNEL_RUNTIMES:
            # The engine does not see the processes of such a runtime one by one.
            _, said = await self.ask(scripts.COUNT, user=scripts.KEEPER)
            if not said.strip().isdigit():
                return 1  # it cannot be told, so assume that there is one
            return max(0, int(said) - 2)
        listed = await self.engine.call(self.engine.client.top, self.id, "-eo pid,uid,stat")
        ours = () if self.engine.one_user_namespace else (str(scripts.KEEPER), "0")
        running = [
            pid
            for pid, user, state in listed["Processes"] or ()
            if user not in ours and not state.startswith("Z")
        ]
        return max(0, len(running) - 1)


async def _converse(exec_: Exec, stdin: bytes | None) -> tuple[int, str]:
    """Send a program its input while reading its output to the end."""
    sending = None
    if stdin is not None:
        sending = asyncio.create_task(exec_.send(stdin))
    said = bytearray()
    try:
        async for number, piece in exec_.frames():
            if number == STDOUT and len(said) < MAX_ANSWER_BYTES:
                said += piece
        code = await exec_.exit_code()
        return code, bytes(said).decode(errors="surrogateescape")
    finally:
        if sending:
            sending.cancel()
        exec_.close()


def _fetch_workspace(client: docker.APIClient, container: str) -> IO[bytes] | None:
    """Return a tar of an image's /workspace; None where that is missing or empty."""
    try:
        pieces, _ = client.get_archive(container, "/workspace")
    except docker.errors.NotFound:
        return None
    with contextlib.ExitStack() as cleanup:
        file = cleanup.enter_context(tempfile.TemporaryFile(prefix="rock-"))
        for piece in pieces:
            file.write(piece)
        file.flush()
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            directory = tar.next()
            first = tar.next() if directory else None
        if first is None:
            return None
        cleanup.pop_all()  # the file stays open
        return file
