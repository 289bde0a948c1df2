"""The interpreter of a Dockerfile: runs its instructions one by one in an embedded sandbox."""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
import shlex
import time
from collections.abc import Iterable, Mapping

from envs.rock import CommandResult, Sandbox, SandboxFileError
from envs.rock.host.fenced import WITHOUT_ETC
from envs.tasks.harbor import dockerfile, installs, toolchain
from envs.tasks.harbor.context import find, is_archive, without_ignored
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.environment import UNREACHED_NETWORK, Built
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.image_names import find_image
from envs.tasks.harbor.paths import PathMap
from envs.tasks.harbor.task import LINK, HarborTask

COMMANDS_AT_ONCE = 100  # folders and links that one shell makes
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
        self._file = file
        self._paths = paths
        self._images = images
        self._workdirs = workdirs
        self._egress = egress
        self._context = without_ignored(task.environment.context)
        self._env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root"}
        self._global_arguments: dict[str, str] = {}  # of ARG before FROM
        self._arguments: dict[str, str] = {}  # of ARG
        self._has_shims = False
        self._shims_first = ""  # shell text that puts the stand-ins of toolchain.py into the PATH
        self._workdir = "/"
        self._shell = ["/bin/sh", "-c"]
        self._has_base = False
        self._notes: list[str] = []
        self._deadline = time.monotonic() + task.environment.build_timeout

    async def run(self, instructions: list[Instruction]) -> Built:
        """Run the instructions and return the record of the build.

        Raises:
          UnsupportedError, BuildError, TaskError: see `build`.
        """
        await self._make_folders()
        if self._task.environment.network_mode == "public" and not self._egress:
            self._notes.append(UNREACHED_NETWORK)
        for instruction in _of_last_stage(instructions):
            await self._instruction(instruction)
        if self._has_shims:
            await self._check(None, f"rm -rf {self._sandbox.workspace}/{SHIMS}")
        if workdir := self._task.environment.workdir:
            self._workdir = workdir
            await self._make_workdir(None)
        elif not any(instruction.keyword == "WORKDIR" for instruction in instructions):
            self._workdir = "/app"  # Harbor's own default images have it
            await self._make_workdir(None)
        return Built(
            self._paths,
            {**self._env, **self._task.environment.env},
            self._workdir,
            self._notes,
            # The sandbox gives them to its commands, but tests begin with an empty environment.
            WITHOUT_ETC if self._sandbox.tier == "landlock" else {},
        )

    async def _make_folders(self) -> None:
        """Make the folders that every image has, and those of Harbor's logs."""
        names = [name for name in (*_IN_EVERY_IMAGE, "tmp") if name in self._paths.roots]
        names += ["logs/agent", "logs/verifier", "logs/artifacts"]
        places = " ".join(self._quoted(f"/{name}") for name in names)
        await self._check(None, f"mkdir -p {places}")

    async def _instruction(self, instruction: Instruction) -> None:
        keyword = instruction.keyword
        if keyword in _WITHOUT_EFFECT:
            return
        if keyword in _NOT_RUN:
            self._note(instruction, f"{keyword} is not run")
            return
        act = {
            "FROM": self._from,
            "ARG": self._arg,
            "ENV": self._set_env,
            "WORKDIR": self._set_workdir,
            "USER": self._user,
            "SHELL": self._set_shell,
            "RUN": self._run,
            "COPY": self._add,
            "ADD": self._add,
        }[keyword]
        await act(instruction)

    # -- Instructions
    # ---------------------------------------------------------------------------------------------

    async def _from(self, instruction: Instruction) -> None:
        if self._has_base:
            raise self._refused(instruction, "a second FROM (a build in stages)")
        self._has_base = True
        _, rest = instruction.flags()
        words = dockerfile.filled(instruction, self._file, rest, self._arguments).split()
        names_stage = len(words) == 3 and words[1].upper() == "AS"
        if len(words) != 1 and not names_stage:
            raise TaskError(
                self._file, instruction.line, f"FROM {rest[:60]!r} is not `FROM image [AS name]`"
            )
        image = words[0]
        known = find_image(image, self._images)
        if known is None:
            listed = ", ".join(name for name in self._images if "/" not in name)
            raise self._refused(
                instruction,
                f"the image {image!r} (known are {listed}; name what can stand for it with"
                " images={...: (programs,)})",
            )
        if missing := await self._missing(self._images[known]):
            raise self._refused(
                instruction,
                f"the image {image!r}, for this machine lacks {', '.join(missing)} in /usr/bin",
            )
        self._note(instruction, f"{image} is this machine's own /usr")
        # An ARG before FROM is valid for FROM; after it, where an ARG without a value names it.
        self._global_arguments = self._arguments
        self._arguments = {}
        if "python3" in self._images[known]:
            await self._add_python(instruction)
        if known in self._workdirs:
            self._workdir = self._workdirs[known]
            await self._make_workdir(instruction)

    async def _add_python(self, instruction: Instruction) -> None:
        """Let `python` be the machine's `python3`, as in the image."""
        if PYTHON_FOLDER in self._env["PATH"] or not await self._missing(["python"]):
            return
        folder = self._quoted(PYTHON_FOLDER)
        link = 'ln -sf "$(PATH="${ROCK_PATH:-$PATH}" command -v python3)"'
        await self._check(instruction, f"mkdir -p {folder} && {link} {folder}/python")
        self._env["PATH"] += f":{PYTHON_FOLDER}"

    async def _arg(self, instruction: Instruction) -> None:
        for word in dockerfile.split_words(instruction.arguments):
            name, equals, value = word.partition("=")
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise TaskError(self._file, instruction.line, f"ARG {word[:40]!r} is not a name")
            given = _PREDEFINED | self._global_arguments
            if equals:
                self._arguments[name] = self._filled(instruction, value)
            elif name in given and self._has_base:
                self._arguments[name] = given[name]

    async def _set_env(self, instruction: Instruction) -> None:
        self._env |= dockerfile.assignments(instruction, self._file, self._variables)

    async def _set_workdir(self, instruction: Instruction) -> None:
        self._workdir = self._absolute(self._filled(instruction, instruction.arguments))
        await self._make_workdir(instruction)

    async def _user(self, instruction: Instruction) -> None:
        name = self._filled(instruction, instruction.arguments).split(":")[0]
        self._env["USER"] = name
        if name not in ("root", "0"):
            self._note(
                instruction, f"USER {name}: the sandbox has one user, which may do what {name} may"
            )

    async def _set_shell(self, instruction: Instruction) -> None:
        words = dockerfile.json_list(instruction.arguments)
        if words is None:
            raise TaskError(self._file, instruction.line, "SHELL needs a JSON list of texts")
        self._shell = words

    async def _run(self, instruction: Instruction) -> None:
        flags, command = instruction.flags()
        if set(flags) - {"network"} or flags.get("network", "none") not in ("none", "default"):
            raise self._refused(instruction, f"RUN --{next(iter(flags))}")
        if not self._sandbox.config.egress:
            await self._refuse_missing(instruction)
            if _PYTHON_LINK.search(command):
                await self._add_python(instruction)
                command = _PYTHON_LINK.sub("true", command)
        if account := _ACCOUNTS.search(command):
            raise UnsupportedError(
                self._file,
                instruction.line_of(_ACCOUNTS),
                f"`{account[0]}`; the embedded sandbox has one unprivileged user",
            )
        words = dockerfile.json_list(command) or [*self._shell, command]
        inner = shlex.join(self._paths.inward(word) for word in words)
        await self._check(instruction, f"cd -- {self._quoted(self._workdir)} && exec {inner}")

    async def _add(self, instruction: Instruction) -> None:
        flags, rest = instruction.flags()
        if refused := set(flags) - {"chown", "chmod", "link"}:
            raise self._refused(instruction, f"{instruction.keyword} --{sorted(refused)[0]}")
        words = dockerfile.paths(instruction, self._file, rest, self._variables)
        if len(words) < 2:
            raise TaskError(
                self._file, instruction.line, f"{instruction.keyword} needs a source and a target"
            )
        *sources, target = words
        for source in sources:
            if re.match(r"\w+://|git@", source):
                raise self._refused(
                    instruction, f"{instruction.keyword} {source} needs the network"
                )
        names_folder = target.endswith(("/", "/.")) or target in (".", "./")
        if len(sources) > 1 and not names_folder:
            message = f"{instruction.keyword} of several sources needs a target that ends with /"
            raise TaskError(self._file, instruction.line, message)
        found = [match for source in sources for match in self._matches(instruction, source)]
        mode = self._chmod(instruction, flags)
        place = self._place(instruction, self._absolute(target))
        into = names_folder or len(found) > 1 or await self._is_folder(place)
        for name, is_folder in found:
            if is_folder:
                await self._copy_folder(instruction, name, place, mode)
            else:
                await self._copy_file(instruction, name, place, into, mode)

    async def _is_folder(self, place: str) -> bool:
        result = await self._execute(f"[ -d {shlex.quote(place)} ]")
        return result.exit_code == 0

    # -- COPY and ADD
    # ---------------------------------------------------------------------------------------------

    async def _copy_folder(
        self, instruction: Instruction, name: str, place: str, mode: int | None
    ) -> None:
        """Copy the content of a folder of the context into the target."""
        prefix = f"{name}/" if name else ""
        files = {}
        commands = []  # that make what the SDK does not write
        for path, (content, permissions) in self._context.items():
            target = f"{place}/{path.removeprefix(prefix)}"
            if not path.startswith(prefix):
                continue
            if path.endswith("/"):
                commands.append(f"mkdir -p -- {shlex.quote(target)}")
            elif permissions == LINK:
                commands.append(self._link(target, content))
            else:
                files[target] = (content, permissions)
        await self._write(instruction, files, mode)
        for start in range(0, len(commands), COMMANDS_AT_ONCE):
            await self._check(instruction, " && ".join(commands[start : start + COMMANDS_AT_ONCE]))

    def _link(self, place: str, content: bytes) -> str:
        """Return the shell text that makes a link; an absolute one leads to the mapped path."""
        target = os.fsdecode(content)
        if target.startswith("/"):
            target = self._paths.inward(target)
        parent = shlex.quote(place.rsplit("/", 1)[0])
        return f"mkdir -p -- {parent} && ln -sfn -- {shlex.quote(target)} {shlex.quote(place)}"

    async def _copy_file(
        self, instruction: Instruction, name: str, place: str, into: bool, mode: int | None
    ) -> None:
        """Copy a file of the context to the target, or into it; ADD unpacks an archive there."""
        content, permissions = self._context[name]
        if instruction.keyword == "ADD" and is_archive(content):
            await self._unpack(instruction, content, place)
            return
        target = f"{place}/{name.rsplit('/', 1)[-1]}" if into else place
        await self._write(instruction, {target: (content, permissions)}, mode)

    async def _unpack(self, instruction: Instruction, content: bytes, place: str) -> None:
        archive = f"{self._paths.workspace}/.archive"
        folder = shlex.quote(place)
        await self._put(instruction, {archive: (content, 0o600)})
        await self._check(
            instruction, f"mkdir -p {folder} && tar -xf {archive} -C {folder} && rm {archive}"
        )

    async def _write(
        self,
        instruction: Instruction,
        files: Mapping[str, tuple[bytes, int]],
        mode: int | None,
    ) -> None:
        """Write files with the paths in their scripts rewritten, all with this mode if given."""
        rewritten = self._paths.scripts(files)
        await self._put(
            instruction,
            {
                path: (content, mode or permissions)
                for path, (content, permissions) in rewritten.items()
            },
        )

    async def _put(self, instruction: Instruction, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Write files at places in the sandbox.

        The SDK writes only below the workspace; files for other places are moved from there.
        """
        workspace = f"{self._paths.workspace}/"
        inner = {path: content for path, content in files.items() if path.startswith(workspace)}
        outer = {path: content for path, content in files.items() if path not in inner}
        try:
            await self._sandbox.write_files(inner)
            for path, content in outer.items():
                await self._sandbox.write_files({".moved": content})
                parent = shlex.quote(path.rsplit("/", 1)[0])
                await self._check(
                    instruction, f"mkdir -p {parent} && mv {workspace}.moved {shlex.quote(path)}"
                )
        except SandboxFileError as error:
            raise BuildError(
                self._file,
                instruction.line,
                f"{instruction.keyword}: {self._paths.outward(str(error))}",
            ) from error

    def _matches(self, instruction: Instruction, source: str) -> list[tuple[str, bool]]:
        """Return the files and folders that a source names, as (path, whether it is a folder)."""
        # As Docker does it: the context is the root, and .. does not lead out of it.
        found = find(self._context, posixpath.normpath(f"/{source}").lstrip("/"))
        if not found:
            raise TaskError(
                self._file,
                instruction.line,
                f"{instruction.keyword} {source}: no such file in the build context",
            )
        return found

    def _chmod(self, instruction: Instruction, flags: dict[str, str]) -> int | None:
        if "chmod" not in flags:
            return None
        if not re.fullmatch(r"0?[0-7]{3}", flags["chmod"]):
            raise self._refused(
                instruction, f"--chmod={flags['chmod']} (three octal digits are taken)"
            )
        return int(flags["chmod"], 8)

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
        path = self._paths.inward(self._env["PATH"])
        missing, _ = await toolchain.find_missing(
            self._sandbox, needs, by_verifier=False, path=path
        )
        if missing is not None:
            message = toolchain.explain(missing, "the build", "", is_container=False)
            raise UnsupportedError(self._file, missing.need.line, message)
        for need in needs:
            self._note(instruction, f"{need.name}: taken from this machine")
        await self._lay_shims(instruction)

    async def _lay_shims(self, instruction: Instruction) -> None:
        if self._has_shims:
            return
        workspace = self._sandbox.workspace
        folder = shlex.quote(f"{workspace}/{SHIMS}")
        archive = f"{workspace}/{SHIMS}/shims.tar"
        await self._put(instruction, {archive: (toolchain.shims(), 0o644)})
        laid = toolchain.lay(folder, shlex.quote(archive), self._quoted("/root"), '"$PATH"')
        await self._check(instruction, laid)
        self._shims_first = (
            f'export ROCK_PATH="$PATH" ROCK_ROOT={self._quoted("/root")}'
            f' ROCK_PYTHON="$(command -v python3)" PATH={folder}:"$PATH"\n'
        )
        self._has_shims = True

    async def _missing(self, programs: Iterable[str]) -> list[str]:
        """Return the programs that are not installed."""
        listed = " ".join(map(shlex.quote, programs))
        if not listed:
            return []
        result = await self._execute(
            'PATH="${ROCK_PATH:-$PATH}"\n'  # the stand-ins do not count
            f'for p in {listed}; do command -v "$p" > /dev/null || echo "$p"; done'
        )
        return result.stdout.split()

    # -- Helpers
    # ---------------------------------------------------------------------------------------------

    async def _make_workdir(self, instruction: Instruction | None) -> None:
        place = shlex.quote(self._place(instruction, self._workdir))
        await self._check(instruction, f"mkdir -p {place}")

    @property
    def _variables(self) -> dict[str, str]:
        return {**self._arguments, **self._env}

    def _filled(self, instruction: Instruction, word: str) -> str:
        return dockerfile.filled(instruction, self._file, word, self._variables)

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._workdir.rstrip('/')}/{path}"

    def _quoted(self, path: str) -> str:
        return shlex.quote(self._paths.place(path))

    def _place(self, instruction: Instruction | None, path: str) -> str:
        try:
            return self._paths.place(path)
        except ValueError as error:
            raise UnsupportedError(
                self._file, instruction.line if instruction else 0, f"{error}"
            ) from None

    async def _execute(self, command: str) -> CommandResult:
        variables = {**self._arguments, **self._env}
        env = {name: self._paths.inward(value) for name, value in variables.items()}
        if self._has_shims:
            command = self._shims_first + command
        left = max(0.1, self._deadline - time.monotonic())
        return await self._sandbox.execute(command, timeout=left, env=env)

    async def _check(self, instruction: Instruction | None, command: str) -> None:
        """Run a command of the build. Raises BuildError where it fails."""
        result = await self._execute(command)
        if result.exit_code == 0:
            return
        why = f"ended with exit {result.exit_code}"
        if result.timed_out:
            why = "ran out of the time of build_timeout_sec"
        output = self._paths.outward((result.stdout + result.stderr).strip())[-500:]
        raise BuildError(
            self._file,
            instruction.line if instruction else 0,
            f"{instruction.keyword if instruction else 'setting up'} {why}: {output}",
        )

    def _refused(self, instruction: Instruction, what: str) -> UnsupportedError:
        return UnsupportedError(
            self._file, instruction.line, f"{what}; the embedded backend cannot"
        )

    def _note(self, instruction: Instruction, text: str) -> None:
        self._notes.append(f"line {instruction.line}: {text}")
