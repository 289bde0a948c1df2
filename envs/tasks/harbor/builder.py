"""The interpreter of a Dockerfile: runs its instructions one by one in an embedded sandbox."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping

from envs.rock import Sandbox
from envs.rock.host.fenced import WITHOUT_ETC
from envs.tasks.harbor import dockerfile, installs, toolchain
from envs.tasks.harbor.build_state import BuildState
from envs.tasks.harbor.context import without_ignored
from envs.tasks.harbor.copying import Copier
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.environment import UNREACHED_NETWORK, Built
from envs.tasks.harbor.errors import UnsupportedError
from envs.tasks.harbor.image_names import find_image
from envs.tasks.harbor.paths import PathMap
from envs.tasks.harbor.task import HarborTask

_IN_EVERY_IMAGE = ("home", "mnt", "opt", "root", "srv", "var")
_ACCOUNTS = re.compile(
    r"\b(?:useradd|adduser|groupadd|addgroup|usermod|chpasswd|chown|su|sudo|gosu)\b"
)
# Links to `python`, which images with Python have here already.
_PYTHON_LINK = re.compile(r"\bln\s+-\S+\s+\S*/python3[\d.]*\s+/usr/(?:local/)?bin/python\b")
PYTHON_FOLDER = "/root/.local/bin"  # of `python`, where the sandbox has only `python3`
SHIMS = ".rock-shims"  # in the workspace, while a build runs
# What BuildKit gives to an ARG of this name.
_PLATFORM = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
_PREDEFINED = {
    f"{whose}{part}": value
    for whose in ("TARGET", "BUILD")
    for part, value in (("PLATFORM", f"linux/{_PLATFORM}"), ("OS", "linux"), ("ARCH", _PLATFORM))
}
_WITHOUT_EFFECT = {"LABEL", "MAINTAINER", "EXPOSE", "STOPSIGNAL", "VOLUME", "ONBUILD"}
_NOT_RUN = {"CMD", "ENTRYPOINT", "HEALTHCHECK"}


def _of_last_stage(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions that the result comes from, where no other stage is used for it.

    The ARGs before the first FROM belong to every stage.
    """
    starts = [index for index, one in enumerate(instructions) if one.keyword == "FROM"]
    names = [words[-1] for index in starts if (words := instructions[index].arguments.split())]
    last = instructions[starts[-1] :]
    base = last[0].flags()[1].split()[:1]
    uses_stage = any("from" in one.flags()[0] for one in last if one.keyword in ("COPY", "ADD"))
    if len(starts) == 1 or uses_stage or (base and base[0] in names[:-1]):
        return instructions
    return instructions[: starts[0]] + last


class Builder:
    """Runs the instructions of one task's Dockerfile in one sandbox."""

    def __init__(
        self,
        sandbox: Sandbox,
        task: HarborTask,
        file: pathlib.Path,
        paths: PathMap,
        images: Mapping[str, tuple[str, ...]],
        workdirs: Mapping[str, str],
        egress: tuple[str, ...],
    ) -> None:
        """Prepare a build.

        Args:
          sandbox: the sandbox, started.
          task: the task.
          file: the Dockerfile's path, for messages.
          paths: maps the task's paths into the workspace.
          images: the images that FROM may name, with the programs that must be installed.
          workdirs: the working directories of images, where they are not /.
          egress: the hosts that agent and tests will reach.
        """
        self._sandbox = sandbox
        self._task = task
        self._paths = paths
        self._images = images
        self._workdirs = workdirs
        self._egress = egress
        self._state = BuildState(sandbox, file, paths, task.environment.build_timeout)
        self._copier = Copier(self._state, without_ignored(task.environment.context))
        self._global_arguments: dict[str, str] = {}  # of ARG before FROM
        self._has_shims = False
        self._shell = ["/bin/sh", "-c"]
        self._has_base = False

    async def run(self, instructions: list[Instruction]) -> Built:
        """Run the instructions and return the record of the build.

        Raises:
          UnsupportedError, BuildError, TaskError: see `build`.
        """
        await self._make_folders()
        if self._task.environment.network_mode == "public" and not self._egress:
            self._state.notes.append(UNREACHED_NETWORK)
        for instruction in _of_last_stage(instructions):
            await self._instruction(instruction)
        if self._has_shims:
            await self._state.check(None, f"rm -rf {self._sandbox.workspace}/{SHIMS}")
        if workdir := self._task.environment.workdir:
            self._state.workdir = workdir
            await self._make_workdir(None)
        elif not any(instruction.keyword == "WORKDIR" for instruction in instructions):
            self._state.workdir = "/app"  # Harbor's own default images have it
            await self._make_workdir(None)
        return Built(
            self._paths,
            {**self._state.env, **self._task.environment.env},
            self._state.workdir,
            self._state.notes,
            # The sandbox gives them to its commands, but tests begin with an empty environment.
            WITHOUT_ETC if self._sandbox.tier == "landlock" else {},
        )

    async def _make_folders(self) -> None:
        """Make the folders that every image has, and those of Harbor's logs."""
        names = [name for name in (*_IN_EVERY_IMAGE, "tmp") if name in self._paths.roots]
        names += ["logs/agent", "logs/verifier", "logs/artifacts"]
        places = " ".join(self._state.quoted(f"/{name}") for name in names)
        await self._state.check(None, f"mkdir -p {places}")

    async def _instruction(self, instruction: Instruction) -> None:
        keyword = instruction.keyword
        if keyword in _WITHOUT_EFFECT:
            return
        if keyword in _NOT_RUN:
            self._state.note(instruction, f"{keyword} is not run")
            return
        act = {
            "FROM": self._from,
            "ARG": self._arg,
            "ENV": self._set_env,
            "WORKDIR": self._set_workdir,
            "USER": self._user,
            "SHELL": self._set_shell,
            "RUN": self._run,
            "COPY": self._copier.add,
            "ADD": self._copier.add,
        }[keyword]
        await act(instruction)

    # -- Instructions
    # ---------------------------------------------------------------------------------------------

    async def _from(self, instruction: Instruction) -> None:
        if self._has_base:
            raise self._state.refused(instruction, "a second FROM (a build in stages)")
        self._has_base = True
        _, rest = instruction.flags()
        words = dockerfile.filled(
            instruction, self._state.file, rest, self._state.arguments
        ).split()
        names_stage = len(words) == 3 and words[1].upper() == "AS"
        if len(words) != 1 and not names_stage:
            raise self._state.malformed(
                instruction, f"FROM {rest[:60]!r} is not `FROM image [AS name]`"
            )
        image = words[0]
        known = find_image(image, self._images)
        if known is None:
            listed = ", ".join(name for name in self._images if "/" not in name)
            raise self._state.refused(
                instruction,
                f"the image {image!r} (known are {listed}; name what can stand for it with"
                " images={...: (programs,)})",
            )
        if missing := await self._missing(self._images[known]):
            raise self._state.refused(
                instruction,
                f"the image {image!r}, for this machine lacks {', '.join(missing)} in /usr/bin",
            )
        self._state.note(instruction, f"{image} is this machine's own /usr")
        # An ARG before FROM is valid for FROM; after it, where an ARG without a value names it.
        self._global_arguments = self._state.arguments
        self._state.arguments = {}
        if "python3" in self._images[known]:
            await self._add_python(instruction)
        if known in self._workdirs:
            self._state.workdir = self._workdirs[known]
            await self._make_workdir(instruction)

    async def _add_python(self, instruction: Instruction) -> None:
        """Let `python` be the machine's `python3`, as in the image."""
        if PYTHON_FOLDER in self._state.env["PATH"] or not await self._missing(["python"]):
            return
        folder = self._state.quoted(PYTHON_FOLDER)
        link = 'ln -sf "$(PATH="${ROCK_PATH:-$PATH}" command -v python3)"'
        await self._state.check(instruction, f"mkdir -p {folder} && {link} {folder}/python")
        self._state.env["PATH"] += f":{PYTHON_FOLDER}"

    async def _arg(self, instruction: Instruction) -> None:
        for word in dockerfile.split_words(instruction.arguments):
            name, equals, value = word.partition("=")
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise self._state.malformed(instruction, f"ARG {word[:40]!r} is not a name")
            given = _PREDEFINED | self._global_arguments
            if equals:
                self._state.arguments[name] = self._state.filled(instruction, value)
            elif name in given and self._has_base:
                self._state.arguments[name] = given[name]

    async def _set_env(self, instruction: Instruction) -> None:
        self._state.env |= dockerfile.assignments(
            instruction, self._state.file, self._state.variables
        )

    async def _set_workdir(self, instruction: Instruction) -> None:
        self._state.workdir = self._state.absolute(
            self._state.filled(instruction, instruction.arguments)
        )
        await self._make_workdir(instruction)

    async def _make_workdir(self, instruction: Instruction | None) -> None:
        place = shlex.quote(self._state.place(instruction, self._state.workdir))
        await self._state.check(instruction, f"mkdir -p {place}")

    async def _user(self, instruction: Instruction) -> None:
        name = self._state.filled(instruction, instruction.arguments).split(":")[0]
        self._state.env["USER"] = name
        if name not in ("root", "0"):
            self._state.note(
                instruction, f"USER {name}: the sandbox has one user, which may do what {name} may"
            )

    async def _set_shell(self, instruction: Instruction) -> None:
        words = dockerfile.json_list(instruction.arguments)
        if words is None:
            raise self._state.malformed(instruction, "SHELL needs a JSON list of texts")
        self._shell = words

    async def _run(self, instruction: Instruction) -> None:
        flags, command = instruction.flags()
        if set(flags) - {"network"} or flags.get("network", "none") not in ("none", "default"):
            raise self._state.refused(instruction, f"RUN --{next(iter(flags))}")
        if not self._sandbox.config.egress:
            await self._refuse_missing(instruction)
            if _PYTHON_LINK.search(command):
                await self._add_python(instruction)
                command = _PYTHON_LINK.sub("true", command)
        if account := _ACCOUNTS.search(command):
            raise UnsupportedError(
                self._state.file,
                instruction.line_of(_ACCOUNTS),
                f"`{account[0]}`; the embedded sandbox has one unprivileged user",
            )
        words = dockerfile.json_list(command) or [*self._shell, command]
        inner = shlex.join(self._paths.inward(word) for word in words)
        await self._state.check(
            instruction, f"cd -- {self._state.quoted(self._state.workdir)} && exec {inner}"
        )

    # -- Packages that are installed already
    # ---------------------------------------------------------------------------------------------

    async def _refuse_missing(self, instruction: Instruction) -> None:
        """Refuse a command that installs what is not there; make it believe that all is installed.

        Raises:
          UnsupportedError: names what is missing.
        """
        number, first = instruction.rows[0]
        without_keyword = re.sub(r"^\s*RUN\s+(?:--\S+\s+)*", "", first, flags=re.IGNORECASE)
        rows = [(number, without_keyword), *instruction.rows[1:]]
        needs = installs.needs_of_rows(rows)
        # Its packages may be for the tests alone, which have tools of their own.
        needs = [need for need in needs if not need.name.startswith("pytest")]
        if not needs and not installs.calls_installer(rows):
            return
        path = self._paths.inward(self._state.env["PATH"])
        missing, _ = await toolchain.find_missing(
            self._sandbox, needs, by_verifier=False, path=path
        )
        if missing is not None:
            message = toolchain.explain(missing, "the build", "", is_container=False)
            raise UnsupportedError(self._state.file, missing.need.line, message)
        for need in needs:
            self._state.note(instruction, f"{need.name}: taken from this machine")
        await self._lay_shims(instruction)

    async def _lay_shims(self, instruction: Instruction) -> None:
        if self._has_shims:
            return
        workspace = self._sandbox.workspace
        folder = shlex.quote(f"{workspace}/{SHIMS}")
        archive = f"{workspace}/{SHIMS}/shims.tar"
        await self._state.put(instruction, {archive: (toolchain.shims(), 0o644)})
        laid = toolchain.lay(folder, shlex.quote(archive), self._state.quoted("/root"), '"$PATH"')
        await self._state.check(instruction, laid)
        # Every later command finds the stand-ins of toolchain.py first.
        self._state.preamble = (
            f'export ROCK_PATH="$PATH" ROCK_ROOT={self._state.quoted("/root")}'
            f' ROCK_PYTHON="$(command -v python3)" PATH={folder}:"$PATH"\n'
        )
        self._has_shims = True

    async def _missing(self, programs: Iterable[str]) -> list[str]:
        """Return the programs that are not installed."""
        listed = " ".join(map(shlex.quote, programs))
        if not listed:
            return []
        result = await self._state.execute(
            'PATH="${ROCK_PATH:-$PATH}"\n'  # the stand-ins do not count
            f'for p in {listed}; do command -v "$p" > /dev/null || echo "$p"; done'
        )
        return result.stdout.split()
