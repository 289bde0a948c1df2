"""Runs commands: in the shell that keeps its state, or in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.events import JobFinished, JobStarted, ToolOutput
from rome.agent.iflow.places.output import LiveOutput
from rome.agent.iflow.places.workspace import BackgroundJob, CommandOutput
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

DEFAULT_SECONDS = 120.0
MAX_SECONDS = 600.0
_JOB = of("string", "Id of the job.")


class ShellTool(Tool):
    """Runs a command, for `seconds` where the call names no limit."""

    name = "shell"
    description = (
        "Run a command in bash. Directory, variables and functions stay for the next one. There is"
        " no input, and a command that takes long is ended: name a `timeout`, or let it run in the"
        " background."
    )
    accesses = "execute"
    parameters = takes(
        "command",
        command=of("string", "Text for bash."),
        timeout=of("number", "Seconds, after which it is ended."),
        background=of("boolean", "Let it run on its own, as a job, such as a server."),
    )

    def __init__(self, seconds: float = DEFAULT_SECONDS, max_seconds: float = MAX_SECONDS) -> None:
        self._seconds = min(seconds, max_seconds)
        self._max_seconds = max_seconds
        self._watching: set[asyncio.Task[None]] = set()

    def summary(self, arguments: Mapping[str, Any]) -> str:
        command = str(arguments.get("command", "")).strip()
        first, _, rest = command.partition("\n")
        return f"$ {first}{' ...' if rest else ''}{' &' if arguments.get('background') else ''}"

    def paths(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return no files: what a command touches is in its text."""
        return ()

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        command = arguments["command"]
        if not command.strip():
            raise ToolError("the command is empty")
        if arguments.get("background", False):
            return await self._start_job(command, context)
        seconds = arguments.get("timeout", self._seconds)
        if not 0 < seconds <= self._max_seconds:
            raise ToolError(
                f"timeout must be above 0 and at most {self._max_seconds:g} seconds, not"
                f" {seconds:g}; run what takes longer with background: true"
            )
        id = context.call.id
        live = LiveOutput(lambda text: context.emit(ToolOutput(call_id=id, text=text)))
        try:
            done = await context.workspace.execute(command, timeout=seconds, on_output=live.write)
        finally:
            live.close()
        return ToolResult(
            describe(done, seconds), exit_code=done.exit_code, file=done.file, denials=done.denials
        )

    async def _start_job(self, command: str, context: ToolContext) -> ToolResult:
        job = await context.workspace.spawn(command)
        context.emit(JobStarted(job=job.id, command=command, call_id=context.call.id))
        watching = asyncio.ensure_future(_watch(job, context))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        return ToolResult(
            f"job {job.id} runs in the background; shell_output shows what it writes, and you are"
            " told when it ends"
        )


class ShellOutputTool(Tool):
    """Shows what a job wrote."""

    name = "shell_output"
    description = "Show what a background job wrote since the last time, and whether it runs."
    parameters = takes(
        "job",
        job=_JOB,
        wait=of("number", "Wait up to so many seconds for its end.", minimum=0, maximum=60),
    )
    is_parallel = True

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        job = _job(arguments, context)
        wait = arguments.get("wait", 0.0)
        if wait:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.wait(), wait)
        output = (await job.read()).rstrip("\n")
        status = f"[job {job.id} {describe_status(job)}]"
        return ToolResult(f"{output}\n{status}" if output else f"(no new output)\n{status}")


class ShellKillTool(Tool):
    """Ends a job."""

    name = "shell_kill"
    description = "End a background job and all that it started."
    parameters = takes("job", job=_JOB)

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        job = _job(arguments, context)
        if not job.is_running:
            return ToolResult(f"job {job.id} {describe_status(job)} already")
        await job.kill()
        return ToolResult(f"job {job.id} was ended")


class ShellListTool(Tool):
    """Lists the jobs."""

    name = "shell_list"
    description = "List the background jobs."
    is_parallel = True

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        lines = [
            f"{job.id} ({describe_status(job)}): {job.command.strip().partition(chr(10))[0][:200]}"
            for job in context.workspace.jobs.values()
        ]
        return ToolResult("\n".join(lines) or "(no jobs)")


def describe(done: CommandOutput, seconds: float) -> str:
    """Return a command's output for the model, and how it ended where that is of interest."""
    lines = [done.output.rstrip("\n")] if done.output.strip("\n") else []
    if done.exit_code is None:
        lines.append(
            f"[ended after {seconds:g} seconds; run what takes longer with background: true]"
        )
    elif done.exit_code != 0:
        lines.append(f"[exit {done.exit_code}]")
    if done.note:
        lines.append(f"[{done.note}]")
    return "\n".join(lines) or "(no output)"


def describe_status(job: BackgroundJob) -> str:
    """Return whether a job runs, or how it ended."""
    if job.is_running:
        return "runs"
    return "was ended" if job.exit_code is None else f"ended with status {job.exit_code}"


def _job(arguments: Mapping[str, Any], context: ToolContext) -> BackgroundJob:
    jobs = context.workspace.jobs
    job = jobs.get(arguments["job"])
    if job is None:
        known = ", ".join(jobs) or "none"
        raise ToolError(f"there is no job {arguments['job']!r}; there are {known}")
    return job


async def _watch(job: BackgroundJob, context: ToolContext) -> None:
    """Tell the session when a job ends."""
    code = await job.wait()
    context.emit(JobFinished(job=job.id, exit_code=code))
