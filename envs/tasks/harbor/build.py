"""Builds a task's environment in an embedded sandbox.

The common subset of the task's Dockerfile is interpreted against the machine's own programs. The
image that FROM names is not fetched: for the images of BASES the machine's /usr is used, and
missing programs are named. WORKDIR, ENV, ARG, COPY, ADD, RUN, USER and SHELL take effect; LABEL,
EXPOSE and the like have none; everything else is refused with file and line.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from envs.rock import Sandbox
from envs.tasks.harbor import dockerfile
from envs.tasks.harbor.builder import Builder
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.environment import Built, conventional_roots, refuse_unsupported
from envs.tasks.harbor.paths import PathMap, root_of
from envs.tasks.harbor.preflight import refuse_tests_that_fetch
from envs.tasks.harbor.task import HarborTask

# Images that the machine's own programs can replace -> the programs that must be installed.
# Where one has Python as `python`, this machine has it as `python3` at least.
BASES: Mapping[str, tuple[str, ...]] = {
    "ubuntu": (),
    "debian": (),
    "bash": (),
    "buildpack-deps": ("gcc", "make"),
    "python": ("python3",),
    "node": ("node",),
    "gcc": ("gcc",),
    "perl": ("perl",),
    "golang": ("go",),
    "ruby": ("ruby",),
    "rust": ("cargo",),
    "ghcr.io/laude-institute/t-bench/ubuntu-24-04": (),
    "ghcr.io/laude-institute/t-bench/python-3-13": ("python3",),
}
# Working directories of base images, where they are not /.
WORKDIRS: Mapping[str, str] = {
    "ghcr.io/laude-institute/t-bench/ubuntu-24-04": "/app",
    "ghcr.io/laude-institute/t-bench/python-3-13": "/app",
    "golang": "/go",
}
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:-])/[\w./-]+")
# An absolute path that a shell command makes or enters.
_MADE = re.compile(
    r"(?:\bmkdir(?:\s+-\S+)*|\bcd|\bgit\s+init(?:\s+-\S+)*|\btouch|\btee(?:\s+-a)?|>>?|\s-C"
    r"|\b(?:cp|mv)(?:\s+-\S+)*\s+\S+)\s*[\"']?(/[\w./-]+)"
)


async def build(
    sandbox: Sandbox,
    task: HarborTask,
    images: Mapping[str, tuple[str, ...]] | None = None,
    egress: tuple[str, ...] | None = None,
    verifier_egress: tuple[str, ...] = (),
) -> Built:
    """Build a task's environment in a started sandbox.

    Args:
      sandbox: the sandbox.
      task: the task.
      images: more images that this machine's programs can replace, with the programs that must be
        installed.
      egress: the hosts that agent and tests will reach, if not those of this sandbox.
      verifier_egress: more hosts that the tests will reach.

    Raises:
      UnsupportedError: the task asks for something that this backend cannot do.
      BuildError: a build step failed.
      TaskError: the task is malformed. All three name file and line.
      SandboxError: a fault of the machine.
    """
    environment = task.environment
    if egress is None:
        egress = sandbox.config.egress
    refuse_unsupported(task, egress)
    if not egress and not verifier_egress:
        refuse_tests_that_fetch(task)
    file = environment.dockerfile_path or task.path
    text = environment.dockerfile
    if text is None:
        text = f"FROM {environment.docker_image}\n" if environment.docker_image else "FROM ubuntu\n"
        file = task.path / ("task.toml" if task.format == "harbor" else "task.yaml")
    instructions = dockerfile.parse(text, file)
    # A lazy context is made here, in a thread, so that the event loop does not wait for it.
    await asyncio.to_thread(dict, environment.context)
    paths = PathMap(sandbox.workspace, _roots(task, instructions))
    known = {**BASES, **(images or {})}
    builder = Builder(sandbox, task, file, paths, known, WORKDIRS, egress)
    return await builder.run(instructions)


def _roots(task: HarborTask, instructions: list[Instruction]) -> set[str]:
    """Return the first components of the folders that belong to the task."""
    paths = [task.environment.workdir] if task.environment.workdir else []
    for instruction in instructions:
        if instruction.keyword in ("WORKDIR", "COPY", "ADD", "VOLUME", "ENV", "ARG"):
            paths += _ABSOLUTE_PATH.findall(instruction.arguments)
        if instruction.keyword == "RUN":
            paths += _MADE.findall(instruction.arguments)
    for step in task.steps:
        paths += step.artifacts
    found = {root_of(path) for path in paths} | conventional_roots(task.steps)
    return {name for name in found if name}
