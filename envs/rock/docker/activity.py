"""What runs in a Docker sandbox, and the removal of processes that ended commands left behind."""

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator

from envs.rock.docker import scripts
from envs.rock.docker.commands import DockerJob, DockerSession
from envs.rock.docker.container import Container
from envs.rock.docker.engine import CALL_SECONDS
from envs.rock.docker.streams import Exec
from envs.rock.errors import AgentFault, SandboxClosedError, SandboxStartError

MAX_SESSIONS = 8  # each takes processes from those that are reserved for us


class Activity:
    """The jobs, sessions and file transfers of one container.

    When the last of them has ended, all processes that are left in the container are killed.
    """

    def __init__(self, container: Container):
        self._container = container
        self._jobs: set[DockerJob] = set()
        self._sessions: set[DockerSession] = set()
        self._transfers = 0
        self._untidy = False  # something has ended since the last clean-up
        self._entrance = asyncio.Lock()  # held while anything starts, and while all is killed

    @property
    def sessions(self) -> int:
        """The number of open sessions."""
        return len(self._sessions)

    @property
    def running_commands(self) -> int:
        """The number of commands that run now."""
        jobs = sum(job.running for job in self._jobs)
        return jobs + sum(session.running for session in self._sessions)

    @property
    def busy(self) -> bool:
        """Whether a command runs, or its end is not settled yet."""
        return bool(self._jobs) or any(session.running for session in self._sessions)

    async def start_job(
        self, command: str, environment: dict[str, str], timeout: float
    ) -> DockerJob:
        """Start a command."""
        config = self._container.config
        async with self._entrance:
            exec_ = await self._container.enter(
                scripts.run(config.pids),
                self._container.shell or "/bin/sh",
                command.encode(errors="replace").decode(),
                env=environment,
            )
            job = DockerJob(
                self._container,
                exec_,
                timeout=timeout,
                max_output_bytes=config.max_output_bytes,
                kill=functools.partial(self._kill, exec_),
                on_end=self._job_ended,
            )
            self._jobs.add(job)
        return job

    async def start_session(self, environment: dict[str, str]) -> DockerSession:
        """Start a shell.

        Raises:
          AgentFault: too many sessions are open.
          SandboxStartError: the image has no bash.
        """
        config = self._container.config
        if not self._container.shell:
            raise SandboxStartError(f"image {config.image} has no bash, which a session needs")
        if len(self._sessions) >= MAX_SESSIONS:
            raise AgentFault(f"a sandbox has at most {MAX_SESSIONS} sessions; close one")
        async with self._entrance:
            shell, reporter = await self._start_shell(environment)
            session = DockerSession(
                self._container, shell, reporter, kill=self._kill, on_end=self._session_ended
            )
            self._sessions.add(session)
        try:
            await session.wait_ready(config.start_timeout)
        except BaseException:
            await asyncio.shield(session.close())
            raise
        return session

    async def kill_all(self) -> None:
        """Kill every process and wait until all jobs and sessions have ended."""
        async with self._entrance:
            jobs = list(self._jobs)
            for job in jobs:
                job.doom("killed")
            for session in self._sessions:
                session.doom("killed")
            await self._container.kill_all()
            sessions = list(self._sessions)
        for session in sessions:
            await session.close()
        await _wait_for(jobs)

    async def settle(self) -> None:
        """Close the sessions and wait for the jobs of a container that was removed."""
        for session in list(self._sessions):
            await session.close()
        await _wait_for(list(self._jobs))

    @contextlib.asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Count a transfer of files, which is not killed with what commands leave behind."""
        async with self._entrance:
            self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1
            await self._tidy_up()

    @contextlib.asynccontextmanager
    async def transfer(
        self, script: str, *arguments: str, stdin: bool = False
    ) -> AsyncIterator[Exec]:
        """Run a script that moves files; it is killed when its user gives up."""
        async with self.counted():
            exec_ = await self._container.enter(script, *arguments, stdin=stdin)
            with contextlib.closing(exec_):
                try:
                    yield exec_
                except BaseException:
                    await asyncio.shield(self._container.abandon(exec_))
                    raise

    async def _start_shell(self, environment: dict[str, str]) -> tuple[Exec, Exec]:
        """Start a session's shell and the reader of its reports; return both.

        They meet at a pipe with a random name, which each gets by its standard input: a command
        line can be read by every process of the agent.
        """
        pipe = f"{scripts.PLACE}/{os.urandom(16).hex()}\n".encode()
        container = self._container
        reporter = await container.enter(scripts.DOOR, user=scripts.KEEPER, stdin=True)
        try:
            await reporter.send(pipe, more=False)
            async with asyncio.timeout(CALL_SECONDS):
                await anext(reporter.frames())  # it says that the pipe exists
            shell = await container.enter(
                scripts.session(container.config.pids),
                env=environment,
                stdin=True,
                shell=f"{scripts.PLACE}/bash",
            )
        except (TimeoutError, StopAsyncIteration):
            raise SandboxStartError("no pipe could be made to the session's shell") from None
        except BaseException:
            reporter.close()
            raise
        await shell.send(pipe, more=True)
        return shell, reporter

    async def _kill(self, exec_: Exec) -> None:
        """Kill what one job or session started; everything, where nothing else runs."""
        alone = len(self._jobs) + len(self._sessions) + self._transfers <= 1
        if alone or exec_.pid <= 0:
            await self._container.kill_all()
        else:
            await self._container.signal(exec_, "KILL", whole=True)

    async def _job_ended(self, job: DockerJob) -> None:
        self._jobs.discard(job)
        self._untidy = True
        await self._tidy_up()

    async def _session_ended(self, session: DockerSession) -> None:
        self._sessions.discard(session)
        self._untidy = True
        await self._tidy_up()

    async def _tidy_up(self) -> None:
        """Kill what ended commands left behind, if nothing else runs that may own it."""
        with contextlib.suppress(SandboxClosedError):
            async with self._entrance:
                if not self._untidy or not self._container.alive:
                    return
                if self._jobs or self._sessions or self._transfers:
                    return
                if await self._container.count_processes():
                    await self._container.kill_all()
                self._untidy = False


async def _wait_for(jobs: list[DockerJob]) -> None:
    if jobs:
        await asyncio.wait({job.task for job in jobs}, timeout=CALL_SECONDS)
