"""A task's environment on the Docker backend: its real Dockerfile, built by the engine.

The engine builds once for each content. The container's image is read-only, so the task's own
folders (/app, and those that its Dockerfile names) are copied from the image into the workspace
when an episode begins, and paths are rewritten as for the embedded backend (paths.py). Other parts
of the image are used in place and cannot be changed by the agent.

A base image that the engine lacks is taken from EnvHub (~/.rock) if that has it under this name,
and is pulled otherwise. Builds reach the network, as Harbor's do, unless told otherwise; the
sandbox reaches what the task's network_mode grants.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import shlex
import tempfile

from envs.rock import Sandbox, SandboxConfig
from envs.rock.errors import ImageError, SandboxError
from envs.tasks.harbor import dockerfile
from envs.tasks.harbor.environment import (
    UNREACHED_NETWORK,
    Built,
    conventional_roots,
    refuse_unsupported,
)
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.paths import PathMap, root_of
from envs.tasks.harbor.task import LINK, Files, HarborTask

COPY_SECONDS = 120.0
_FROM = re.compile(
    r"^(\s*FROM\s+(?:--platform=\S+\s+)?)([^\s$]+)(?=\s|$)", re.IGNORECASE | re.MULTILINE
)
# Lists that a RUN line clears: they belong to the system, and nobody else may read them whole.
_OF_APT = ("/var/lib/apt", "/var/cache/apt")
_STEP = re.compile(r"^Step (\d+)/\d+ :", re.MULTILINE)  # output of the classic builder
_PATHS = re.compile(r"(?<![\w./:$}-])/[\w./-]+")
_COPY = """\
for d in {roots}; do
    if [ -d "/$d" ] && [ -r "/$d" ]
        then cp -a "/$d" {workspace}/ || exit 1
        else mkdir -p {workspace}/"$d"
    fi
done
chmod -R u+rwX {workspace} && mkdir -p {places} || exit 1
# A link to a place of the task leads to the copy of that place.
find {workspace} -type l 2> /dev/null | while IFS= read -r link; do
    target=$(readlink "$link")
    for d in {roots}; do
        case $target in "/$d" | "/$d"/*) ln -sfn "{workspace}$target" "$link" ;; esac
    done
done
"""


async def build_image(
    task: HarborTask, config: SandboxConfig, build_egress: tuple[str, ...] | None = None
) -> str:
    """Return the name of the task's image.

    It is built from the Dockerfile; without one it is the task's docker_image, or the config's
    image.

    Args:
      task: the task.
      config: the config of the sandbox.
      build_egress: () keeps the network from RUN lines. Single hosts are refused, because a build
        of the engine reaches the whole network or none.

    Raises:
      UnsupportedError: the task asks for something that this backend cannot do.
      BuildError: a build step failed.
    """
    refuse_unsupported(task, config.egress)
    environment = task.environment
    if build_egress:
        raise UnsupportedError(
            environment.dockerfile_path or task.path,
            0,
            f"build_egress = {', '.join(build_egress)[:200]}; a build of the Docker engine has all"
            " of the network or none: leave it unset, or use the embedded backend",
        )
    if environment.dockerfile is None:
        return await _local(environment.docker_image) if environment.docker_image else config.image
    from envs.rock.images import build as images  # needs the optional package docker

    context = await asyncio.to_thread(dict, environment.context)
    names = {match[2]: await _local(match[2]) for match in _FROM.finditer(environment.dockerfile)}
    dockerfile_here = _FROM.sub(
        lambda match: f"{match[1]}{names[match[2]]}", environment.dockerfile
    )
    context["Dockerfile"] = (dockerfile_here.encode(), 0o644)
    with tempfile.TemporaryDirectory(prefix="harbor-context-") as folder:
        await asyncio.to_thread(_write, pathlib.Path(folder), context)
        try:
            return await images.build(
                folder,
                network=build_egress is None,
                timeout=environment.build_timeout,
                memory_mb=max(environment.memory_mb or 0, 2048),
            )
        except ImageError as error:
            raise BuildError(
                environment.dockerfile_path or task.path,
                _line_of_step(environment.dockerfile, error.log),
                str(error),
            ) from error


async def _local(image: str) -> str:
    """Return the name of the engine's or this machine's EnvHub's image, or the name itself."""
    from envs.rock.docker.engine import engine
    from envs.rock.images.local import docker_alias

    host = await asyncio.to_thread(engine)
    try:
        await host.call(host.client.inspect_image, image)
        return image
    except SandboxError:  # the engine lacks it, or cannot say
        return await asyncio.to_thread(docker_alias, image) or image


def _line_of_step(text: str, log: str) -> int:
    """Return the line of the instruction that the engine was at, or 0 where that is unknown."""
    steps = _STEP.findall(log)
    if not steps:
        return 0
    try:
        instruction = dockerfile.parse(text, pathlib.Path())[int(steps[-1]) - 1]
    except (TaskError, IndexError):  # the engine may accept what our parser refuses
        return 0
    return instruction.line


def _write(folder: pathlib.Path, files: Files) -> None:
    """Write a build context, its links last, so that nothing is written through one."""
    for name, (content, mode) in sorted(files.items(), key=lambda item: item[1][1] == LINK):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):  # an empty folder
            path.mkdir(exist_ok=True)
        elif mode == LINK:
            os.symlink(content, bytes(path))
        else:
            path.write_bytes(content)
            path.chmod(mode)


async def enter(
    sandbox: Sandbox, task: HarborTask, own: tuple[str, ...] = ("logs", "tests", "solution", "root")
) -> Built:
    """Copy the task's folders into the workspace of a sandbox that runs the task's image.

    Args:
      sandbox: the sandbox.
      task: the task.
      own: folders that are not copied from the image.

    Raises:
      BuildError: a folder could not be copied.
    """
    from envs.rock.docker.engine import engine

    environment = task.environment
    host = await asyncio.to_thread(engine)
    settings = (await host.call(host.client.inspect_image, sandbox.config.image))["Config"]
    variables = dict(entry.partition("=")[::2] for entry in settings.get("Env") or ())
    workdir = environment.workdir or settings.get("WorkingDir") or "/app"
    in_dockerfile = _PATHS.findall(environment.dockerfile or "")
    mentioned = [workdir, *(path for path in in_dockerfile if not path.startswith(_OF_APT))]
    for step in task.steps:
        mentioned += step.artifacts
    roots = {root_of(path) for path in mentioned} | conventional_roots(task.steps)
    paths = PathMap(sandbox.workspace, {name for name in roots if name})
    copied = [name for name in paths.roots if name not in own]
    places = [
        paths.place(place)
        for place in (workdir, "/root", "/logs/agent", "/logs/verifier", "/logs/artifacts")
    ]
    script = _COPY.format(
        roots=shlex.join(copied),
        workspace=shlex.quote(sandbox.workspace),
        places=shlex.join(places),
    )
    result = await sandbox.execute(script, timeout=min(COPY_SECONDS, environment.build_timeout))
    if result.exit_code != 0:
        raise BuildError(
            environment.dockerfile_path or task.path,
            0,
            f"its folders {', '.join(copied)} could not be copied into the sandbox:"
            f" {result.stderr.strip()[-300:]}",
        )
    notes = [f"/{name} is a copy in the sandbox's memory" for name in copied]
    if environment.network_mode == "public" and not sandbox.config.egress:
        notes.append(UNREACHED_NETWORK)
    defaults = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    env = {**defaults, **variables, **environment.env}
    return Built(paths, env, workdir, notes, tier_env={})
