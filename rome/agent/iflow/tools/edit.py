"""Changes parts of a file: one by one, or several that are made together or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.tools.base import Access, Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.agent.iflow.tools.matching import apply_edit
from rome.agent.iflow.tools.text import Text, key_of, read_text, unified_diff, write_text

MAX_REMEMBERED = 100  # failed edits
_PATH = of("string", "File, relative to the project or absolute.")
_OLD = of("string", "Text to replace, exactly as it stands in the file.")
_NEW = of("string", "Text that takes its place.")
_ALL = of("boolean", "Replace it wherever it stands; default false.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What an edit would make of a file; `before` is None for a new one."""

    before: Text | None
    after: Text
    notes: tuple[str, ...]


class EditTool(Tool):
    """Replaces a piece of text."""

    name = "edit"
    description = (
        "Replace a piece of text in a file that was read before. old_string must stand in the file"
        " exactly once, or set replace_all. An empty old_string creates a new file."
    )
    parameters = takes(
        *("path", "old_string", "new_string"),
        path=_PATH,
        old_string=_OLD,
        new_string=_NEW,
        replace_all=_ALL,
    )
    accesses: ClassVar[Access] = "write"

    def __init__(self) -> None:
        # What failed, and the state of the file then.
        self._failed: dict[tuple[str, str], tuple[int, float] | None] = {}

    def edits(self, arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the replacements of a call, in order."""
        return [arguments]

    async def preview(self, arguments: Mapping[str, Any], context: ToolContext) -> str:
        """Return the diff that a call would make; "" where it would fail."""
        try:
            plan = await self._plan(arguments, context)
        except (ToolError, WorkspaceError):
            return ""
        return _diff(arguments["path"], plan)

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Make the change."""
        path = arguments["path"]
        identity = (key_of(context.workspace, path), repr(self.edits(arguments)))
        status = await context.workspace.stat(path)
        try:
            plan = await self._plan(arguments, context)
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
        await write_text(context, path, plan.after)
        count = len(self.edits(arguments))
        done = f"{path} was {'created' if plan.before is None else 'changed'}"
        if count > 1:
            done += f" by {count} edits"
        output = "; ".join([done, *plan.notes])
        return ToolResult(output, changed=(path,), diff=_diff(path, plan))

    async def _plan(self, arguments: Mapping[str, Any], context: ToolContext) -> _Plan:
        """Return what the edits make of the file.

        Raises:
          ToolError: one of them cannot be made.
        """
        path = arguments["path"]
        edits = self.edits(arguments)
        if not edits:
            raise ToolError("edits is empty; give at least one")
        before = await read_text(context, path)
        if before is None and edits[0]["old_string"]:
            raise ToolError(
                f"there is no file {path}; an empty old_string creates it, list_directory and glob"
                " show what is there"
            )
        content = before
        notes = []
        for number, edit in enumerate(edits, 1):
            try:
                content, note = _apply(content, edit)
            except ToolError as error:
                if len(edits) == 1:
                    raise
                raise ToolError(
                    f"edit {number} of {len(edits)} cannot be made, so none was: {error}"
                ) from error
            if note:
                notes.append(note if len(edits) == 1 else f"edit {number} {note}")
        assert content is not None
        return _Plan(before, content, tuple(notes))


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
        path=_PATH,
        edits=of(
            "array",
            items=takes(
                "old_string", "new_string", old_string=_OLD, new_string=_NEW, replace_all=_ALL
            ),
        ),
    )

    def edits(self, arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the replacements of a call, in order.

        Raises:
          ToolError: one of them is none.
        """
        for number, edit in enumerate(arguments["edits"], 1):
            names = ("old_string", "new_string")
            if not isinstance(edit, dict) or not all(isinstance(edit.get(n), str) for n in names):
                raise ToolError(f"edit {number} needs old_string and new_string, both text")
            if not isinstance(edit.get("replace_all", False), bool):
                raise ToolError(f"replace_all of edit {number} must be true or false")
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


def _diff(path: str, plan: _Plan) -> str:
    return unified_diff(path, plan.before.text if plan.before else "", plan.after.text)
