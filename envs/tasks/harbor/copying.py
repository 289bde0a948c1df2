"""COPY and ADD: files, folders, links and archives of a build context, copied into the sandbox."""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from collections.abc import Mapping

from envs.tasks.harbor import dockerfile
from envs.tasks.harbor.build_state import BuildState
from envs.tasks.harbor.context import find, is_archive
from envs.tasks.harbor.dockerfile import Instruction
from envs.tasks.harbor.task import LINK

COMMANDS_AT_ONCE = 100  # folders and links that one shell makes


class Copier:
    """Copies from the context of one task to where the state of its build says."""

    def __init__(self, state: BuildState, context: Mapping[str, tuple[bytes, int]]) -> None:
        self._state = state
        self._context = context

    async def add(self, instruction: Instruction) -> None:
        """Run a COPY or an ADD.

        Raises:
          UnsupportedError, BuildError, TaskError: see `build`.
        """
        flags, rest = instruction.flags()
        if refused := set(flags) - {"chown", "chmod", "link"}:
            raise self._state.refused(instruction, f"{instruction.keyword} --{sorted(refused)[0]}")
        words = dockerfile.paths(instruction, self._state.file, rest, self._state.variables)
        if len(words) < 2:
            raise self._state.malformed(
                instruction, f"{instruction.keyword} needs a source and a target"
            )
        *sources, target = words
        for source in sources:
            if re.match(r"\w+://|git@", source):
                raise self._state.refused(
                    instruction, f"{instruction.keyword} {source} needs the network"
                )
        names_folder = target.endswith(("/", "/.")) or target in (".", "./")
        if len(sources) > 1 and not names_folder:
            message = f"{instruction.keyword} of several sources needs a target that ends with /"
            raise self._state.malformed(instruction, message)
        found = [match for source in sources for match in self._matches(instruction, source)]
        mode = self._chmod(instruction, flags)
        place = self._state.place(instruction, self._state.absolute(target))
        into = names_folder or len(found) > 1 or await self._is_folder(place)
        for name, is_folder in found:
            if is_folder:
                await self._copy_folder(instruction, name, place, mode)
            else:
                await self._copy_file(instruction, name, place, into, mode)

    async def _is_folder(self, place: str) -> bool:
        result = await self._state.execute(f"[ -d {shlex.quote(place)} ]")
        return result.exit_code == 0

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
            await self._state.check(
                instruction, " && ".join(commands[start : start + COMMANDS_AT_ONCE])
            )

    def _link(self, place: str, content: bytes) -> str:
        """Return the shell text that makes a link; an absolute one leads to the mapped path."""
        target = os.fsdecode(content)
        if target.startswith("/"):
            target = self._state.paths.inward(target)
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
        archive = f"{self._state.paths.workspace}/.archive"
        folder = shlex.quote(place)
        await self._state.put(instruction, {archive: (content, 0o600)})
        await self._state.check(
            instruction, f"mkdir -p {folder} && tar -xf {archive} -C {folder} && rm {archive}"
        )

    async def _write(
        self,
        instruction: Instruction,
        files: Mapping[str, tuple[bytes, int]],
        mode: int | None,
    ) -> None:
        """Write files with the paths in their scripts rewritten, all with this mode if given."""
        rewritten = self._state.paths.scripts(files)
        await self._state.put(
            instruction,
            {
                path: (content, mode or permissions)
                for path, (content, permissions) in rewritten.items()
            },
        )

    def _matches(self, instruction: Instruction, source: str) -> list[tuple[str, bool]]:
        """Return the files and folders that a source names, as (path, whether it is a folder)."""
        # As Docker does it: the context is the root, and .. does not lead out of it.
        found = find(self._context, posixpath.normpath(f"/{source}").lstrip("/"))
        if not found:
            raise self._state.malformed(
                instruction, f"{instruction.keyword} {source}: no such file in the build context"
            )
        return found

    def _chmod(self, instruction: Instruction, flags: dict[str, str]) -> int | None:
        if "chmod" not in flags:
            return None
        if not re.fullmatch(r"0?[0-7]{3}", flags["chmod"]):
            raise self._state.refused(
                instruction, f"--chmod={flags['chmod']} (three octal digits are taken)"
            )
        return int(flags["chmod"], 8)
