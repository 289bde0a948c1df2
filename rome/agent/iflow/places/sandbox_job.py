"""A background command in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from envs.rock import AgentFault, CommandResult, SandboxError
from envs.rock.backend import Job
from rome.agent.iflow.places.output import decode
from rome.agent.iflow.places.workspace import WorkspaceError

# Kills what has a variable of that value, wherever it has gone.
_KILL = (
    'for e in /proc/[0-9]*/environ; do if grep -q "IFLOW_JOB={job};" "$e" 2>/dev/null; then'
    ' p=${{e#/proc/}}; kill -9 "${{p%/environ}}" 2>/dev/null; fi; done; true'
)


class SandboxJob:
    """A background command; see `BackgroundJob`. Its output is a file in the sandbox.

    Args:
      run: runs another command in the sandbox.
      identity: of the job, which is IFLOW_JOB in its environment, with a semicolon.
      command: that was started, for people.
      job: that runs.
      file: in the sandbox, with its output.
    """

    def __init__(
        self,
        run: Callable[[str], Awaitable[CommandResult]],
        identity: str,
        command: str,
        job: Job,
        file: str,
    ) -> None:
        self.id = identity
        self.command = command
        self.path = file
        self._run = run
        self._job = job
        self._read = 0
        self._killed = False
        self._ended = asyncio.ensure_future(self._wait())

    @property
    def is_running(self) -> bool:
        """Whether it still runs."""
        return not self._ended.done()

    @property
    def exit_code(self) -> int | None:
        """Its status; None while it runs, or where it was killed."""
        return None if self._killed or self.is_running else self._ended.result()

    async def read(self, limit: int = 30_000) -> str:
        """Return the output since the last reading, at most so many characters of its end."""
        # What is written meanwhile is left for the next reading.
        result = await self._run(
            f"n=$(wc -c < {self.path}); echo $n; tail -c +{self._read + 1} {self.path}"
            f" | head -c $((n - {self._read})) | tail -c {4 * limit}"
        )
        size, _, text = result.stdout.partition("\n")
        if not size.strip().isdecimal():
            reason = result.stderr[:200]
            raise WorkspaceError(f"the output of job {self.id} cannot be read: {reason}")
        is_cut = int(size) - self._read > 4 * limit
        self._read = int(size)
        text = decode(text.encode(errors="surrogateescape"))
        if is_cut or len(text) > limit:
            return f"[... more output before; the whole is in {self.path} ...]\n{text[-limit:]}"
        return text

    async def wait(self) -> int | None:
        """Wait for its end and return its `exit_code`."""
        await asyncio.shield(self._ended)
        return self.exit_code

    async def kill(self) -> None:
        """End it and all that it started."""
        if self.is_running:
            self._killed = True
        with told("a background job"):
            if self._job.running:
                await self._job.kill()
        await self._run(_KILL.format(job=self.id))
        await self._ended

    async def _wait(self) -> int | None:
        """Return the status; None where the sandbox ended first."""
        try:
            return (await self._job.wait()).exit_code
        except SandboxError:
            return None


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn errors of the sandbox into those of a workspace."""
    try:
        yield
    except AgentFault as fault:
        raise WorkspaceError(f"{what}: {fault}") from fault
    except SandboxError as error:
        raise WorkspaceError(f"{what}: {error}", is_infrastructure=True) from error
    except ValueError as error:  # a command that is too long, or has a NUL
        raise WorkspaceError(f"{what}: {error}") from error
