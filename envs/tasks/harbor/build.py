"""Builds a task's environment in an embedded sandbox: interprets the common subset of its
Dockerfile against the machine's own programs.

FROM names an image that cannot be had here: the bases of BASES stand for what the machine has in
/usr, and what is missing is named. WORKDIR, ENV, ARG, COPY, ADD, RUN, USER and SHELL act; LABEL,
EXPOSE and the like have no effect; everything else is refused with file and line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import pathlib
import re
import shlex
import time
from collections.abc import Mapping

from envs.rock import CommandResult, Sandbox, SandboxFileError
from envs.rock.config import parse_grant
from envs.tasks.harbor import dockerfile, offline
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.load import line_of
from envs.tasks.harbor.paths import PathMap, root_of
from envs.tasks.harbor.task import HarborTask
from envs.tasks.terminal.shell import tier_environment

# Images for which the machine's own programs can stand -> the programs that must then be there.
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
CONVENTIONAL = (
    "data",
    "home",
    "mnt",
    "opt",
    "output",
    "outputs",
    "project",
    "repo",
    "results",
    "srv",
    "testbed",
    "var",
    "work",
    "workspace",
)
_IN_EVERY_IMAGE = ("home", "mnt", "opt", "root", "srv", "var")
_MADE = re.compile(
    r"(?:\bmkdir(?:\s+-\S+)*|\bcd|\bgit\s+init(?:\s+-\S+)*|\btouch|\btee(?:\s+-a)?|>>?|\s-C|\b(?:cp|mv)(?:\s+-\S+)*\s+\S+)\s*[\"']?(/[\w./-]+)"
)
_ACCOUNTS = re.compile(
    r"\b(?:useradd|adduser|groupadd|addgroup|usermod|chpasswd|chown|su|sudo|gosu)\b"
)
_WITHOUT_EFFECT = {"LABEL", "MAINTAINER", "EXPOSE", "STOPSIGNAL", "VOLUME", "ONBUILD"}
_NOT_RUN = {"CMD", "ENTRYPOINT", "HEALTHCHECK"}


@dataclasses.dataclass
class Built:
    """What the build left beside files: paths, variables (as the task writes them) and the working
    directory.

    `notes` say what was only approximated.
    """

    paths: PathMap
    env: dict[str, str]
    workdir: str
    notes: list[str]
    tier_env: dict[str, str]

    def inner_env(self) -> dict[str, str]:
        """The variables as commands in the sandbox see them."""
        return {
            **self.tier_env,
            **{name: self.paths.inward(value) for name, value in self.env.items()},
        }

    def command(self, text: str) -> str:
        """A command of the agent's, as it runs in the sandbox: in the working directory, wherever
        it went.
        """
        return (
            f"cd -- {shlex.quote(self.paths.place(self.workdir))} 2>"
            f" /dev/null\n{self.paths.inward(text)}"
        )


async def build(
    sandbox: Sandbox,
    task: HarborTask,
    images: Mapping[str, tuple[str, ...]] | None = None,
    egress: tuple[str, ...] | None = None,
) -> Built:
    """Raises UnsupportedError, BuildError or TaskError, with file and line; SandboxError for the
    machine's faults.

    images: more names of images for which this machine can stand, with the programs that must be
    there: an alias of an image that cannot be had. egress: what agent and tests will reach, where
    that is not what this sandbox does.
    """
    refuse_what_no_sandbox_has(task)
    environment = task.environment
    egress = sandbox.config.egress if egress is None else egress
    for step in (
        () if egress else [step for step in task.steps if step.verifier_environment is None]
    ):
        script = step.tests[step.test_script][0].decode(errors="replace")
        if need := offline.network_need(script):
            folder = task.path if step.test_script != "test.sh" else task.path / "tests"
            raise UnsupportedError(
                folder / step.test_script,
                need[0],
                f"`{need[1]}` needs the network, and the embedded sandbox has none",
            )
    file = environment.dockerfile_path or task.path
    if environment.dockerfile is None:
        text = f"FROM {environment.docker_image}\n" if environment.docker_image else "FROM ubuntu\n"
        file = task.path / ("task.toml" if task.format == "harbor" else "task.yaml")
    else:
        text = environment.dockerfile
    instructions = dockerfile.parse(text, file)
    await asyncio.to_thread(
        dict, environment.context
    )  # where it is made only now, not in the event loop's time
    builder = _Builder(
        sandbox,
        task,
        file,
        PathMap(sandbox.workspace, _roots(task, instructions)),
        {**BASES, **(images or {})},
        egress,
    )
    return await builder.run(instructions)


def refuse_what_no_sandbox_has(task: HarborTask) -> None:
    """UnsupportedError for what a task's settings ask for and one sandbox of ours cannot give, on
    whatever backend.
    """
    settings = task.path / ("task.toml" if task.format == "harbor" else "task.yaml")
    environment = task.environment
    if environment.compose_path is not None:
        raise UnsupportedError(
            environment.compose_path,
            1,
            "several containers (docker-compose); a task has one sandbox here",
        )
    if environment.gpus:
        raise UnsupportedError(
            settings,
            line_of(task, "environment", "gpus"),
            f"environment.gpus = {environment.gpus}; sandboxes see no GPU",
        )
    if environment.mcp_servers:
        raise UnsupportedError(
            settings,
            line_of(task, "environment", "mcp_servers"),
            "environment.mcp_servers; none are started here",
        )
    for step in task.steps:
        for phase, network in step.networks.items():
            apart = (
                phase == "verifier" and step.verifier_environment is not None
            )  # which has a sandbox and a policy of its own
            if not apart and network != (environment.network_mode, environment.allowed_hosts):
                raise UnsupportedError(
                    settings,
                    line_of(task, phase, "network_mode"),
                    f"{phase}.network_mode = {network[0]!r} beside environment.network_mode ="
                    f" {environment.network_mode!r}; a sandbox has one network policy for its whole"
                    " life",
                )


def egress_of(task: HarborTask, given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What the sandbox may reach, as SandboxConfig.egress has it: the task's allowed_hosts, at
    their ports or at 80 and 443; nothing for no-network.

    A public task reaches what `given` grants: a sandbox has no grant for the whole world. Raises
    TaskError for a host that no grant can name.
    """
    environment = task.environment
    if environment.network_mode == "public":
        return given
    if environment.network_mode == "no-network":
        return ()
    grants = tuple(
        grant
        for host in environment.allowed_hosts
        for grant in ([host] if re.search(r":\d+$", host) else [f"{host}:443", f"{host}:80"])
    )
    for grant in grants:
        try:
            parse_grant(grant)
        except ValueError as error:
            raise TaskError(
                task.path / "task.toml",
                line_of(task, "environment", "allowed_hosts"),
                f"environment.allowed_hosts: {error}",
            ) from error
    return grants


def _roots(task: HarborTask, instructions: list[Instruction]) -> set[str]:
    """First components of the folders that the task calls its own."""
    found = {root_of(task.environment.workdir)} if task.environment.workdir else set()
    for instruction in instructions:
        if instruction.keyword in ("WORKDIR", "COPY", "ADD", "VOLUME", "ENV", "ARG"):
            found |= {
                root_of(match)
                for match in re.findall(r"(?<![\w./:-])/[\w./-]+", instruction.arguments)
            }
        if instruction.keyword == "RUN":
            found |= {root_of(path) for path in _MADE.findall(instruction.arguments)}
    found |= {root_of(path) for step in task.steps for path in step.artifacts}
    told = "\n".join(step.instruction for step in task.steps)
    found |= {
        name for name in CONVENTIONAL if re.search(rf"(?<![\w./]){'/' + name}(?![\w-])", told)
    }
    return {name for name in found if name}


class _Builder:
    def __init__(
        self,
        sandbox: Sandbox,
        task: HarborTask,
        file: pathlib.Path,
        paths: PathMap,
        images: Mapping[str, tuple[str, ...]],
        egress: tuple[str, ...],
    ) -> None:
        self._sandbox = sandbox
        self._task = task
        self._file = file
        self._paths = paths
        self._images = images
        self._egress = egress
        self._context = _without_ignored(task)
        self._env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root"}
        self._arguments: dict[str, str] = {}
        self._workdir = "/"
        self._shell = ["/bin/sh", "-c"]
        self._based = False
        self._notes: list[str] = []
        self._deadline = time.monotonic() + task.environment.build_timeout

    async def run(self, instructions: list[Instruction]) -> Built:
        roots = [name for name in (*_IN_EVERY_IMAGE, "tmp") if name in self._paths.roots]
        await self._check(
            None,
            "mkdir -p"
            f" {' '.join(self._quoted(f'/{name}') for name in [*roots, 'logs/agent', 'logs/verifier', 'logs/artifacts'])}",
        )
        if self._task.environment.network_mode == "public" and not self._egress:
            self._notes.append(
                "network_mode is public, and the sandbox reaches nothing; SandboxConfig.egress can"
                " grant hosts"
            )
        for instruction in instructions:
            await self._instruction(instruction)
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
            tier_environment(self._sandbox),
        )

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

    # -- instructions
    # ---------------------------------------------------------------------------------------------

    async def _from(self, instruction: Instruction) -> None:
        if self._based:
            raise self._refused(instruction, "a second FROM (a build in stages)")
        self._based = True
        flags, rest = instruction.flags()
        words = dockerfile.substitute(rest, self._arguments).split()
        if not words or len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
            raise TaskError(
                self._file, instruction.line, f"FROM {rest[:60]!r} is not `FROM image [AS name]`"
            )
        name = re.sub(r"@sha256:\w+$|:[\w.-]+$", "", words[0])
        short = re.sub(r"^(?:docker\.io/)?(?:library/)?", "", name)
        known = next((image for image in (words[0], name, short) if image in self._images), None)
        if known is None:
            raise self._refused(
                instruction,
                f"the image {words[0]!r} (known are"
                f" {', '.join(image for image in self._images if '/' not in image)}; name what can"
                " stand for it with images={...: (programs,)})",
            )
        if missing := await self._missing(self._images[known]):
            raise self._refused(
                instruction,
                f"the image {words[0]!r}, for this machine lacks {', '.join(missing)} in /usr/bin",
            )
        self._note(instruction, f"{words[0]} is this machine's own /usr")
        self._arguments = {}  # those before FROM hold for FROM alone

    async def _arg(self, instruction: Instruction) -> None:
        for word in dockerfile.words(instruction, self._file, instruction.arguments):
            name, equals, value = word.partition("=")
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise TaskError(self._file, instruction.line, f"ARG {word[:40]!r} is no name")
            self._arguments[name] = self._filled(value) if equals else self._arguments.get(name, "")

    async def _set_env(self, instruction: Instruction) -> None:
        values = dockerfile.assignments(instruction, self._file)
        self._env |= {name: self._filled(value) for name, value in values.items()}

    async def _set_workdir(self, instruction: Instruction) -> None:
        self._workdir = self._absolute(self._filled(instruction.arguments.strip("\"'")))
        await self._make_workdir(instruction)

    async def _user(self, instruction: Instruction) -> None:
        name = self._filled(instruction.arguments).split(":")[0]
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
        if await self._is_installed(instruction, command):
            return
        if not self._sandbox.config.egress and (need := offline.need_in_rows(instruction.rows)):
            raise UnsupportedError(
                self._file,
                need[0],
                f"`{need[1]}` needs the network, and the embedded sandbox has none",
            )
        if account := _ACCOUNTS.search(command):
            raise UnsupportedError(
                self._file,
                instruction.line_of(_ACCOUNTS),
                f"`{account[0]}`; the embedded sandbox has one unprivileged user",
            )
        listed = dockerfile.json_list(command)
        inner = [self._paths.inward(word) for word in listed or [*self._shell, command]]
        await self._check(
            instruction, f"cd -- {self._quoted(self._workdir)} && exec {shlex.join(inner)}"
        )

    async def _add(self, instruction: Instruction) -> None:
        flags, rest = instruction.flags()
        if refused := set(flags) - {"chown", "chmod", "link"}:
            raise self._refused(instruction, f"{instruction.keyword} --{sorted(refused)[0]}")
        words = [self._filled(word) for word in dockerfile.words(instruction, self._file, rest)]
        if len(words) < 2:
            raise TaskError(
                self._file, instruction.line, f"{instruction.keyword} needs a source and a target"
            )
        *sources, target = words
        if remote := next((source for source in sources if re.match(r"\w+://|git@", source)), None):
            raise self._refused(instruction, f"{instruction.keyword} {remote} needs the network")
        found = [match for source in sources for match in self._matches(instruction, source)]
        mode = self._chmod(instruction, flags)
        place = self._place(instruction, self._absolute(target))
        into = (
            target.endswith(("/", "/."))
            or target in (".", "./")
            or len(found) > 1
            or (await self._execute(f"[ -d {shlex.quote(place)} ]")).exit_code == 0
        )
        for name, folder in found:
            await self._lay(instruction, name, folder, place, into, mode)

    # -- COPY and ADD
    # ---------------------------------------------------------------------------------------------

    async def _lay(
        self,
        instruction: Instruction,
        name: str,
        folder: bool,
        place: str,
        into: bool,
        mode: int | None,
    ) -> None:
        """One source.

        A folder's content goes into the target; a file becomes the target, or goes into it.
        """
        if folder:
            prefix = f"{name}/" if name else ""
            files = {
                f"{place}/{path.removeprefix(prefix)}": self._context[path]
                for path in self._context
                if path.startswith(prefix)
            }
        else:
            content, permissions = self._context[name]
            if instruction.keyword == "ADD" and _is_archive(content):
                await self._put(
                    instruction, {f"{self._paths.workspace}/.archive": (content, 0o600)}
                )
                await self._check(
                    instruction,
                    f"mkdir -p {shlex.quote(place)} && tar -xf {self._paths.workspace}/.archive -C"
                    f" {shlex.quote(place)} && rm {self._paths.workspace}/.archive",
                )
                return
            files = {
                f"{place}/{name.rsplit('/', 1)[-1]}" if into else place: (content, permissions)
            }
        await self._put(
            instruction,
            {
                path: (content, mode or permissions)
                for path, (content, permissions) in self._paths.scripts(files).items()
            },
        )

    async def _put(self, instruction: Instruction, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Writes files at places in the sandbox; the SDK writes below the workspace only, so others
        are moved.
        """
        inner = {
            path: content
            for path, content in files.items()
            if path.startswith(self._paths.workspace + "/")
        }
        try:
            await self._sandbox.write_files(inner)
            for path, content in files.items():
                if path not in inner:
                    await self._sandbox.write_files({".moved": content})
                    await self._check(
                        instruction,
                        f"mkdir -p {shlex.quote(path.rsplit('/', 1)[0])} && mv"
                        f" {self._paths.workspace}/.moved {shlex.quote(path)}",
                    )
        except SandboxFileError as error:
            raise BuildError(
                self._file,
                instruction.line,
                f"{instruction.keyword}: {self._paths.outward(str(error))}",
            ) from error

    def _matches(self, instruction: Instruction, source: str) -> list[tuple[str, bool]]:
        """(path in the context, whether a folder) of all that a source names."""
        parts = [part for part in source.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise TaskError(
                self._file,
                instruction.line,
                f"{instruction.keyword} {source} leaves the build context",
            )
        pattern = "/".join(parts)
        found = _find(self._context, pattern)
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

    # -- packages that are there already
    # ---------------------------------------------------------------------------------------------

    async def _is_installed(self, instruction: Instruction, command: str) -> bool:
        """Whether the command only installs Debian packages whose programs the machine has: then
        there is nothing to do.
        """
        names = offline.packages(command)
        if not names:
            return names == [] and bool(command.strip())
        programs = offline.programs_of(names)
        missing = await self._missing(
            sorted({program for needed in programs.values() for program in needed})
        )
        if lacking := [name for name, needed in programs.items() if set(needed) & set(missing)]:
            line = instruction.line_of(re.compile(rf"\b{re.escape(lacking[0])}\b"))
            raise UnsupportedError(
                self._file,
                line,
                f"`apt-get install {' '.join(lacking)}` needs the network, and this machine lacks"
                f" {', '.join(missing)}",
            )
        self._note(instruction, f"{' '.join(names)}: taken from this machine")
        return True

    async def _missing(self, programs: tuple[str, ...] | list[str]) -> list[str]:
        if not programs:
            return []
        result = await self._execute(
            f'for p in {" ".join(map(shlex.quote, programs))}; do command -v "$p" > /dev/null ||'
            ' echo "$p"; done'
        )
        return result.stdout.split()

    # -- small helpers
    # ---------------------------------------------------------------------------------------------

    async def _make_workdir(self, instruction: Instruction | None) -> None:
        await self._check(
            instruction, f"mkdir -p {shlex.quote(self._place(instruction, self._workdir))}"
        )

    def _filled(self, text: str) -> str:
        return dockerfile.substitute(text, {**self._arguments, **self._env})

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
        env = {
            name: self._paths.inward(value)
            for name, value in {
                **tier_environment(self._sandbox),
                **self._arguments,
                **self._env,
            }.items()
        }
        return await self._sandbox.execute(
            command, timeout=max(0.1, self._deadline - time.monotonic()), env=env
        )

    async def _check(self, instruction: Instruction | None, command: str) -> None:
        result = await self._execute(command)
        if result.exit_code != 0:
            why = (
                "ran out of the time of build_timeout_sec"
                if result.timed_out
                else f"ended with exit {result.exit_code}"
            )
            said = self._paths.outward((result.stdout + result.stderr).strip())[-500:]
            raise BuildError(
                self._file,
                instruction.line if instruction else 0,
                f"{instruction.keyword if instruction else 'setting up'} {why}: {said}",
            )

    def _refused(self, instruction: Instruction, what: str) -> UnsupportedError:
        return UnsupportedError(
            self._file, instruction.line, f"{what}; the embedded backend cannot"
        )

    def _note(self, instruction: Instruction, text: str) -> None:
        self._notes.append(f"line {instruction.line}: {text}")


def _is_archive(content: bytes) -> bool:
    return (
        content.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")) or content[257:262] == b"ustar"
    )


def _find(files: Mapping[str, object], pattern: str) -> list[tuple[str, bool]]:
    """(path, whether a folder) of the files and folders that a pattern names, component by
    component.
    """
    if pattern == "":
        return [("", True)]
    wanted = pattern.split("/")
    found: dict[str, bool] = {}
    for path in files:
        parts = path.split("/")
        if len(parts) >= len(wanted) and all(
            fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=False)
        ):
            found["/".join(parts[: len(wanted)])] = len(parts) > len(wanted)
    return list(found.items())


def _without_ignored(task: HarborTask) -> dict[str, tuple[bytes, int]]:
    """The build context without what its .dockerignore names."""
    files = dict(task.environment.context)
    ignored = files.pop(".dockerignore", (b"", 0))[0].decode(errors="replace")
    for number, row in enumerate(ignored.splitlines(), 1):
        pattern = row.strip().strip("/")
        if pattern.startswith("!") or "**" in pattern:
            raise UnsupportedError(
                (task.environment.dockerfile_path or task.path).parent / ".dockerignore",
                number,
                f"the pattern {pattern!r}; plain names and * are taken",
            )
        for name, folder in (
            _find(files, pattern) if pattern and not pattern.startswith("#") else []
        ):
            files = {
                path: content
                for path, content in files.items()
                if path != name and not (folder and path.startswith(f"{name}/"))
            }
    return files
