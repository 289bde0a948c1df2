"""Changes files: whole, or parts of one that are replaced together or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.agent.iflow.tools.matching import apply_edit
from rome.agent.iflow.tools.text import Text, key_of, note_file, read_text, unified_diff

MAX_REMEMBERED = 100  # failed edits
PATH = of("string", "File, relative to the project or absolute.")
_EDIT = {
    "old_string": of("string", "Text to replace, exactly as it stands in the file."),
    "new_string": of("string", "Text that takes its place."),
    "replace_all": of("boolean", "Replace it wherever it stands; default false."),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call would make of a file; `before` is None for a new one."""

    before: Text | None
    after: Text
    said: str  # to the model, once it is done

    def diff(self, path: str) -> str:
        """Return what changes, as a unified diff."""
        return unified_diff(path, self.before.text if self.before else "", self.after.text)


class ChangeTool(Tool):
    """A tool that changes one file, to derive from."""

    accesses = "write"

    async def plan(self, arguments: Mapping[str, Any], context: ToolContext) -> Plan:
        """Return what a call would make of its file; ToolError where it cannot be made."""
        raise NotImplementedError(f"{type(self).__name__} plans nothing")

    async def preview(self, arguments: Mapping[str, Any], context: ToolContext) -> str:
        try:
            plan = await self.plan(arguments, context)
        except (ToolError, WorkspaceError):
            return ""
        return plan.diff(arguments["path"])

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        path = arguments["path"]
        plan = await self.plan(arguments, context)
        await context.workspace.write(path, plan.after.encode())
        note_file(context, path, await context.workspace.stat(path))
        return ToolResult(plan.said, changed=(path,), diff=plan.diff(path))


class WriteFileTool(ChangeTool):
    """Writes a file whole."""

    name = "write_file"
    description = (
        "Write a text file whole; folders above it are made. A file that is there must have been"
        " read before."
    )
    parameters = takes(
        "path", "content", path=PATH, content=of("string", "The whole text of the file.")
    )

    async def plan(self, arguments: Mapping[str, Any], context: ToolContext) -> Plan:
        path = arguments["path"]
        before = await read_text(context, path)
        after = (before or Text("")).with_text(arguments["content"])
        after.encode()  # raises where the file's encoding cannot have it
        lines = len(after.text.removesuffix("\n").split("\n")) if after.text else 0
        done = "created" if before is None else "written"
        return Plan(before, after, f"{path} was {done}: {lines} lines")


class EditTool(ChangeTool):
    """Replaces a piece of text."""

    name = "edit"
    description = (
        "Replace a piece of text in a file that was read before. old_string must stand in the file"
        " exactly once, or set replace_all. An empty old_string creates a new file."
    )
    parameters = takes("path", "old_string", "new_string", path=PATH, **_EDIT)

    def __init__(self) -> None:
        # What failed, and the state of the file then.
        self._failed: dict[tuple[str, str], tuple[int, float] | None] = {}

    def edits(self, arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the replacements of a call, in order."""
        return [arguments]

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        path = arguments["path"]
        identity = (key_of(context.workspace, path), repr(self.edits(arguments)))
        status = await context.workspace.stat(path)
        try:
            return await super().run(arguments, context)
        except ToolError as error:
            if identity in self._failed and self._failed[identity] == status:
                raise ToolError(
                    f"{error}\nThe very same edit failed before, and the file is as it was: do not"
                    " send it again. Read the file and copy the text from there, or write the file"
                    " whole with write_file."
                ) from error
            while len(self._failed) >= MAX_REMEMBERED:
                del self._failed[next(iter(self._failed))]
            self._failed[identity] = status
            raise

    async def plan(self, arguments: Mapping[str, Any], context: ToolContext) -> Plan:
        path = arguments["path"]
        edits = self.edits(arguments)
        if not edits:
            raise ToolError("edits is empty; give at least one")
        before = await read_text(context, path)
        if before is None and edits[0]["old_string"]:
            raise ToolError(f"there is no file {path}; an empty old_string creates it")
        content = before
        said = [f"{path} was {'created' if before is None else 'changed'}"]
        if len(edits) > 1:
            said[0] += f" by {len(edits)} edits"
        for number, edit in enumerate(edits, 1):
            try:
                content, note = _apply(content, edit)
            except ToolError as error:
                if len(edits) == 1:
                    raise
                text = f"edit {number} of {len(edits)} cannot be made, so none was: {error}"
                raise ToolError(text) from error
            if note:
                said.append(note if len(edits) == 1 else f"edit {number} {note}")
        assert content is not None
        return Plan(before, content, "; ".join(said))


class MultiEditTool(EditTool):
    """Replaces several pieces of text of one file, all or none."""

    name = "multi_edit"
    description = (
        "Make several replacements in one file that was read before, one after the other; if one"
        " fails, none is made. Each is as in edit."
    )
    parameters = takes(
        "path",
        "edits",
        path=PATH,
        edits=of("array", items=takes("old_string", "new_string", **_EDIT)),
    )

    def edits(self, arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        edits: Sequence[Mapping[str, Any]] = arguments["edits"]
        return edits


def _apply(content: Text | None, edit: Mapping[str, Any]) -> tuple[Text, str]:
    """Return a file after a replacement, and a note for the model."""
    old = edit["old_string"]
    new = edit["new_string"]
    if content is None:
        return Text(new), ""
    if not old:
        raise ToolError("the file is there already; give the text that is to be replaced")
    given_old = content.with_text(old).text
    given_new = content.with_text(new).text
    replace_all = edit.get("replace_all", False)
    text, note = apply_edit(content.text, given_old, given_new, replace_all=replace_all)
    return content.with_text(text), note
