"""A verifier in an environment of its own (environment_mode = "separate"): nothing of the agent's
reaches it but what the task calls artifacts.

tests/ defines that environment as environment/ does the agent's, and its image brings
/tests/test.sh. Each grading has a fresh sandbox with limits and a network policy of its own. Of the
agent's sandbox, whose processes are dead, regular files and directories are taken by way of this
process: /logs/artifacts and the declared paths. A path that is not there, a link or something else
is not taken, and the tests find it missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping

from envs.rock import Sandbox, SandboxConfig, SandboxError, SandboxFileError
from envs.tasks.harbor.build import Built, build
from envs.tasks.harbor.containers import build_image, enter
from envs.tasks.harbor.errors import BuildError, TaskError
from envs.tasks.harbor.grade import READ_TIMEOUT_SECONDS, SUMMARY_BYTES, Grade, assignments, judge
from envs.tasks.harbor.task import HarborTask, Step

MAX_ARTIFACT_BYTES = 256 << 20  # of one artifact
ALWAYS = "/logs/artifacts"
_MOVED = ".rock-artifact"  # in the workspace: the SDK reads and writes there only
_RUN = """\
mkdir -p {workspace}/logs/verifier && cd -- {workdir} && scratch="$(mktemp -d)" || exit 97
/usr/bin/env -i {variables} HOME="$scratch" /bin/bash {script} > "$scratch/.output" 2>&1 < /dev/null
ended=$?
/usr/bin/tail -c {bytes} "$scratch/.output"
exit $ended
"""


async def grade_apart(
    agents: Sandbox,
    task: HarborTask,
    step: Step,
    built: Built,
    config_of: Callable[[HarborTask], SandboxConfig],
    images: Mapping[str, tuple[str, ...]] | None,
    build_egress: tuple[str, ...] | None,
) -> Grade:
    """As grade.grade, over there.

    Raises SandboxError also where the verifier's environment cannot be had: that is no verdict.

    agents, built: the agent's sandbox, whose processes are dead, and where its files are.
    config_of: the limits and the network of a task.
    """
    apart = _as_task(task, step)
    with tempfile.TemporaryDirectory(prefix="artifacts-") as folder:
        taken = {
            path: local
            for number, path in enumerate(dict.fromkeys((ALWAYS, *step.artifacts)))
            if (local := await _take(agents, built, path, pathlib.Path(folder, str(number))))
        }
        try:
            async with _environment(
                apart, dataclasses.replace(config_of(apart), label=task.name), images, build_egress
            ) as (sandbox, there):
                for path, local in taken.items():
                    if fault := await _put(sandbox, there, path, local):
                        return Grade(
                            0.0,
                            {},
                            f"{step.name}: the artifact {path} cannot be laid into the verifier's"
                            f" sandbox: {fault}",
                        )  # the agent made it so
                return await _run(sandbox, step, there)
        except TaskError as error:
            raise SandboxError(f"the verifier's environment: {error}") from error


def _as_task(task: HarborTask, step: Step) -> HarborTask:
    """The verifier's environment as that of a task, with the network policy of the verifier's
    phase.
    """
    mode, hosts = step.networks.get(
        "verifier",
        (step.verifier_environment.network_mode, step.verifier_environment.allowed_hosts),
    )
    environment = dataclasses.replace(
        step.verifier_environment, network_mode=mode, allowed_hosts=hosts
    )
    return dataclasses.replace(
        task, environment=environment, steps=(dataclasses.replace(step, networks={}),)
    )


@contextlib.asynccontextmanager
async def _environment(
    task: HarborTask,
    config: SandboxConfig,
    images: Mapping[str, tuple[str, ...]] | None,
    build_egress: tuple[str, ...] | None,
) -> AsyncIterator[tuple[Sandbox, Built]]:
    docker = config.backend == "docker"
    building = (
        dataclasses.replace(config, image=await build_image(task, config, build_egress))
        if docker
        else config
        if build_egress is None
        else dataclasses.replace(config, egress=build_egress)
    )
    async with contextlib.AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(building))
        there = (
            await enter(sandbox, task, own=("logs", "solution", "root"))
            if docker
            else await build(sandbox, task, images, config.egress)
        )
        if sandbox.config.egress != config.egress:
            snapshot = await sandbox.snapshot()
            stack.push_async_callback(snapshot.delete)
            sandbox = await stack.enter_async_context(Sandbox(config, snapshot))
        step = task.steps[0]
        place = there.paths.place("/tests")
        with contextlib.suppress(SandboxFileError):
            laid = {entry.path for entry in await sandbox.list_files(place) if entry.kind == "file"}
            rewritten = there.paths.scripts(
                step.tests, everything=True
            )  # the image has them as they were written
            await sandbox.write_files(
                {f"{place}/{name}": rewritten[name] for name in laid & rewritten.keys()}
            )
        if (
            await sandbox.execute(
                f"[ -f {shlex.quote(f'{place}/{step.test_script}')} ]", timeout=READ_TIMEOUT_SECONDS
            )
        ).exit_code:
            raise BuildError(
                task.environment.dockerfile_path or task.path,
                0,
                f"what is built from it has no /tests/{step.test_script}; COPY it there",
            )
        yield sandbox, there


async def _take(
    sandbox: Sandbox, built: Built, path: str, local: pathlib.Path
) -> pathlib.Path | None:
    """An artifact, copied to `local`; None where there is none that can be copied."""
    try:
        place = built.paths.place(path)
        if not place.startswith(f"{sandbox.workspace}/"):
            await sandbox.execute(
                f"rm -rf {_MOVED}; cp -RP -- {shlex.quote(place)} {_MOVED}",
                timeout=READ_TIMEOUT_SECONDS,
            )
            place = _MOVED
        await sandbox.download(place, local, MAX_ARTIFACT_BYTES)
        if place == _MOVED:
            await sandbox.execute(f"rm -rf {_MOVED}", timeout=READ_TIMEOUT_SECONDS)
        return local
    except (
        SandboxFileError,
        ValueError,
        OSError,
    ):  # not there, too large, in a place that is the machine's own, of names too long for this host
        return None


async def _put(sandbox: Sandbox, built: Built, path: str, local: pathlib.Path) -> str:
    """ "", or why it cannot be."""
    place = built.paths.place(path)
    inside = place.startswith(f"{sandbox.workspace}/")
    try:
        await sandbox.upload(local, place if inside else _MOVED)
    except SandboxFileError as error:
        return built.paths.outward(str(error))
    if inside:
        return ""
    parent = shlex.quote(place.rpartition("/")[0])
    moved = await sandbox.execute(
        f"mkdir -p {parent} && mv -T {_MOVED} {shlex.quote(place)}", timeout=READ_TIMEOUT_SECONDS
    )
    return moved.stderr.strip()[-300:] if moved.exit_code else ""


async def _run(sandbox: Sandbox, step: Step, built: Built) -> Grade:
    """The tests, in a sandbox where no agent was.

    What they start of its programs has its rights, as in grade.py.
    """
    script = _RUN.format(
        workspace=shlex.quote(sandbox.workspace),
        workdir=shlex.quote(built.paths.place(built.workdir)),
        variables=assignments(step, built),
        script=shlex.quote(built.paths.place(f"/tests/{step.test_script}")),
        bytes=SUMMARY_BYTES,
    )
    return await judge(
        sandbox, step, built, await sandbox.execute(script, timeout=step.verifier_timeout)
    )
