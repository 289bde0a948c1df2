"""A verifier in an environment of its own (environment_mode = "separate").

Of the agent's files it sees only those that the task calls artifacts. tests/ defines its
environment as environment/ defines the agent's, and its image contains /tests/test.sh. Each grading
gets a fresh sandbox with its own limits and network policy. The agent's processes are dead by then.
Regular files and directories among the artifacts (/logs/artifacts and the declared paths) are
copied through this process. A missing path, a link or anything else is not copied, and the tests
find it missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping

from envs.rock import Sandbox, SandboxConfig, SandboxError, SandboxFileError
from envs.tasks.harbor import toolchain
from envs.tasks.harbor.build import build
from envs.tasks.harbor.containers import build_image, enter
from envs.tasks.harbor.environment import Built, execution
from envs.tasks.harbor.errors import BuildError, TaskError
from envs.tasks.harbor.grade import (
    OUTPUT_BYTES,
    READ_TIMEOUT_SECONDS,
    Grade,
    assignments,
    judge,
    path_of_tests,
)
from envs.tasks.harbor.preflight import refuse_own_tests_without_tools
from envs.tasks.harbor.task import HarborTask, Step

MAX_ARTIFACT_BYTES = 256 << 20  # for one artifact
ALWAYS = "/logs/artifacts"
SHIMS = ".rock-shims.tar"
_MOVED = ".rock-artifact"  # in the workspace: the SDK reads and writes there only
# An artifact such as /logs brings what the agent wrote where the reward is read.
_RUN = """\
cd -- {workspace} && chmod -Rf u+rwX logs/verifier; rm -rf logs/verifier
mkdir -p logs logs/verifier && [ -z "$(ls -A logs/verifier)" ] && chmod +x {script} || exit 97
cd -- {workdir} && scratch="$(mktemp -d)" || exit 97
{shims}
/usr/bin/env -i {variables} HOME="$scratch" PATH="$scratch/bin:$ROCK_PATH" \\
    ROCK_PATH="$ROCK_PATH" ROCK_ROOT="$ROCK_ROOT" ROCK_PYTHON="$ROCK_PYTHON" \\
    {command} > "$scratch/.output" 2>&1 < /dev/null
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
    """Run the step's tests in a sandbox of their own; the counterpart of `grade.grade`.

    Args:
      agents: the agent's sandbox, whose processes are dead.
      task: the task.
      step: the step to grade.
      built: where the agent's files are.
      config_of: returns the limits and the network policy of a task.
      images: see `build`.
      build_egress: see `HarborEnv`.

    Raises:
      SandboxError: a fault of the machine, also where the verifier's environment could not be
        built: that is no verdict.
    """
    apart = _as_task(task, step)
    config = dataclasses.replace(config_of(apart), label=task.name)
    with tempfile.TemporaryDirectory(prefix="artifacts-") as folder:
        taken = {}
        for number, path in enumerate(dict.fromkeys((ALWAYS, *step.artifacts))):
            local = pathlib.Path(folder, str(number))
            if await _take(agents, built, path, local):
                taken[path] = local
        try:
            async with _environment(apart, config, images, build_egress) as (sandbox, there):
                for path, local in taken.items():
                    if fault := await _put(sandbox, there, path, local):
                        # The agent made the artifact as it is.
                        note = (
                            f"{step.name}: the artifact {path} cannot be laid into the verifier's"
                            f" sandbox: {fault}"
                        )
                        return Grade(0.0, {}, note)
                return await _run(sandbox, step, there)
        except TaskError as error:
            raise SandboxError(f"the verifier's environment: {error}") from error


def _as_task(task: HarborTask, step: Step) -> HarborTask:
    """Return the verifier's environment as that of a task, with the network policy of its phase."""
    own = step.verifier_environment
    mode, hosts = step.networks.get("verifier", (own.network_mode, own.allowed_hosts))
    environment = dataclasses.replace(own, network_mode=mode, allowed_hosts=hosts)
    only_step = dataclasses.replace(step, networks={})
    return dataclasses.replace(task, environment=environment, steps=(only_step,))


@contextlib.asynccontextmanager
async def _environment(
    task: HarborTask,
    config: SandboxConfig,
    images: Mapping[str, tuple[str, ...]] | None,
    build_egress: tuple[str, ...] | None,
) -> AsyncIterator[tuple[Sandbox, Built]]:
    """Yield a sandbox with the verifier's environment, and where its files are."""
    async with contextlib.AsyncExitStack() as stack:
        if config.backend == "docker":
            image = await build_image(task, config, build_egress)
            building = dataclasses.replace(config, image=image)
            sandbox = await stack.enter_async_context(Sandbox(building))
            there = await enter(sandbox, task, own=("logs", "solution", "root"))
        else:
            building = config
            if build_egress is not None:
                building = dataclasses.replace(config, egress=build_egress)
            sandbox = await stack.enter_async_context(Sandbox(building))
            there = await build(sandbox, task, images, config.egress)
        if sandbox.config.egress != config.egress:
            snapshot = await sandbox.snapshot()
            stack.push_async_callback(snapshot.delete)
            sandbox = await stack.enter_async_context(Sandbox(config, snapshot))
        await _rewrite_tests(sandbox, task.steps[0], there)
        await _check_test_script(sandbox, task, there)
        await refuse_own_tests_without_tools(sandbox, task, task.steps[0], there)
        await sandbox.write_files({SHIMS: toolchain.shims(bool(sandbox.config.egress))})
        yield sandbox, there


async def _rewrite_tests(sandbox: Sandbox, step: Step, built: Built) -> None:
    """Rewrite paths in those of the tests' files that the image contains."""
    place = built.paths.place("/tests")
    with contextlib.suppress(SandboxFileError):
        entries = await sandbox.list_files(place)
        rewritten = built.paths.scripts(step.tests, everything=True)
        names = rewritten.keys() & {entry.path for entry in entries if entry.kind == "file"}
        await sandbox.write_files({f"{place}/{name}": rewritten[name] for name in names})


async def _check_test_script(sandbox: Sandbox, task: HarborTask, built: Built) -> None:
    script = task.steps[0].test_script
    path = shlex.quote(f"{built.paths.place('/tests')}/{script}")
    result = await sandbox.execute(f"[ -f {path} ]", timeout=READ_TIMEOUT_SECONDS)
    if result.exit_code:
        raise BuildError(
            task.environment.dockerfile_path or task.path,
            0,
            f"what is built from it has no /tests/{script}; COPY it there",
        )


async def _take(
    sandbox: Sandbox, built: Built, path: str, local: pathlib.Path
) -> pathlib.Path | None:
    """Copy an artifact to `local`; return None where there is none that can be copied."""
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
    # It is missing or too large, lies in a place of the machine's own, or has a name that is too
    # long for this host.
    except (SandboxFileError, ValueError, OSError):
        return None


async def _put(sandbox: Sandbox, built: Built, path: str, local: pathlib.Path) -> str:
    """Write an artifact into the verifier's sandbox; return the fault, or an empty text."""
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
    """Run the tests in a sandbox where no agent was.

    Programs of the agent's that they start have their rights, as in grade.py.
    """
    place = built.paths.place(f"/tests/{step.test_script}")
    script = _RUN.format(
        workspace=shlex.quote(sandbox.workspace),
        workdir=shlex.quote(built.paths.place(built.workdir)),
        variables=assignments(step, built),
        script=shlex.quote(place),
        shims=toolchain.lay(
            '"$scratch/bin"',
            shlex.quote(f"{sandbox.workspace}/{SHIMS}"),
            shlex.quote(built.paths.place("/root")),
            shlex.quote(path_of_tests(built)),
        ),
        command=execution(place, step.tests[step.test_script][0]),
        bytes=OUTPUT_BYTES,
    )
    return await judge(
        sandbox, step, built, await sandbox.execute(script, timeout=step.verifier_timeout)
    )
