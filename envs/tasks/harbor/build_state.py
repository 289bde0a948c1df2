"""What the instructions of a build share: its variables and folder, and commands in its sandbox."""

from __future__ import annotations

import pathlib
import shlex
import time
from collections.abc import Mapping

from envs.rock import CommandResult, Sandbox, SandboxFileError
from envs.tasks.harbor import dockerfile
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.paths import PathMap


class BuildState:
    """The sandbox of one build, and what its instructions have set so far."""

    def __init__(
        self, sandbox: Sandbox, file: pathlib.Path, paths: PathMap, timeout: float
    ) -> None:
        """Begin a build.

        Args:
          sandbox: the sandbox, started.
          file: the Dockerfile's path, for messages.
          paths: maps the task's paths into the workspace.
          timeout: the seconds that all commands of the build may take together.
        """
        self._sandbox = sandbox
        self.file = file
        self.paths = paths
        self.env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root"}
        self.arguments: dict[str, str] = {}  # of ARG
        self.workdir = "/"
        self.notes: list[str] = []
        self.preamble = ""  # shell text before every command
        self._deadline = time.monotonic() + timeout

    @property
    def variables(self) -> dict[str, str]:
        """Return what ARG and ENV have set; ENV wins."""
        return {**self.arguments, **self.env}

    def filled(self, instruction: Instruction, word: str) -> str:
        """Return a word with the values of its variables."""
        return dockerfile.filled(instruction, self.file, word, self.variables)

    def absolute(self, path: str) -> str:
        """Return a path of the image, a relative one below the working directory."""
        return path if path.startswith("/") else f"{self.workdir.rstrip('/')}/{path}"

    def quoted(self, path: str) -> str:
        """Return the place of an absolute path in the sandbox, quoted for a shell."""
        return shlex.quote(self.paths.place(path))

    def place(self, instruction: Instruction | None, path: str) -> str:
        """Return the place of a path in the sandbox. Raises UnsupportedError where it has none."""
        try:
            return self.paths.place(path)
        except ValueError as error:
            raise UnsupportedError(
                self.file, instruction.line if instruction else 0, f"{error}"
            ) from None

    async def execute(self, command: str) -> CommandResult:
        """Run a command with the variables that are set, within what is left of the time."""
        env = {name: self.paths.inward(value) for name, value in self.variables.items()}
        left = max(0.1, self._deadline - time.monotonic())
        return await self._sandbox.execute(self.preamble + command, timeout=left, env=env)

    async def check(self, instruction: Instruction | None, command: str) -> None:
        """Run a command of the build. Raises BuildError where it fails."""
        result = await self.execute(command)
        if result.exit_code == 0:
            return
        why = f"ended with exit {result.exit_code}"
        if result.timed_out:
            why = "ran out of the time of build_timeout_sec"
        output = self.paths.outward((result.stdout + result.stderr).strip())[-500:]
        raise BuildError(
            self.file,
            instruction.line if instruction else 0,
            f"{instruction.keyword if instruction else 'setting up'} {why}: {output}",
        )

    def refused(self, instruction: Instruction, what: str) -> UnsupportedError:
        """Return the error of something that only a real image builder can do."""
        return UnsupportedError(self.file, instruction.line, f"{what}; the embedded backend cannot")

    def malformed(self, instruction: Instruction, what: str) -> TaskError:
        """Return the error of an instruction that no builder would take."""
        return TaskError(self.file, instruction.line, what)

    def note(self, instruction: Instruction, text: str) -> None:
        """Add a note to the record of the build."""
        self.notes.append(f"line {instruction.line}: {text}")

    async def put(self, instruction: Instruction, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Write files at places in the sandbox.

        The SDK writes only below the workspace; files for other places are moved from there.
        """
        workspace = f"{self.paths.workspace}/"
        inner = {path: content for path, content in files.items() if path.startswith(workspace)}
        outer = {path: content for path, content in files.items() if path not in inner}
        try:
            await self._sandbox.write_files(inner)
            for path, content in outer.items():
                await self._sandbox.write_files({".moved": content})
                parent = shlex.quote(path.rsplit("/", 1)[0])
                await self.check(
                    instruction, f"mkdir -p {parent} && mv {workspace}.moved {shlex.quote(path)}"
                )
        except SandboxFileError as error:
            raise BuildError(
                self.file,
                instruction.line,
                f"{instruction.keyword}: {self.paths.outward(str(error))}",
            ) from error
