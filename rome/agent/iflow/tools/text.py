"""Text files as tools see them: lines that end with a new line, and how they really lie on disk."""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import mimetypes
import os
import posixpath
import re

from rome.agent.iflow.events import FileSeen
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.tools.base import ToolContext, ToolError

MAX_FILE_BYTES = 4 << 20  # that a tool reads whole
MAX_DIFF_LINES = 3000  # that are compared line by line
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_LOOKED_AT = 8192  # bytes, to tell text from other data


@dataclasses.dataclass(frozen=True)
class Text:
    """The content of a text file."""

    text: str  # lines end with a new line character, unless the file mixes ends of lines
    # Of the file: utf-8, utf-16-le, utf-16-be, or latin-1 for what is none of these
    encoding: str = "utf-8"
    bom: bytes = b""  # the mark that the file begins with; empty for none
    newline: str = "\n"  # the end of a line in the file

    def encode(self) -> bytes:
        """Return the bytes of the file; ToolError where its encoding lacks a character."""
        text = self.text
        if self.newline != "\n":
            text = text.replace("\n", self.newline)
        try:
            return self.bom + text.encode(self.encoding)
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            what = f"the file is encoded as {self.encoding}, which has no {character!r}"
            raise ToolError(f"{what}; write it in another way, or convert it first") from error

    def with_text(self, text: str) -> Text:
        """Return the file with other text, in the same encoding and with the same ends of lines."""
        if self.newline != "\n":
            text = text.replace(self.newline, "\n")
        return dataclasses.replace(self, text=text)


def decode_text(data: bytes, path: str) -> Text:
    """Return the content of a text file; ToolError for other data, by what it seems to be."""
    bom, encoding = next((one for one in _BOMS if data.startswith(one[0])), (b"", "utf-8"))
    start = data[:_LOOKED_AT]
    controls = len(_CONTROL.findall(start))
    if not bom and (b"\0" in data or controls > len(start) // 20):
        kind = mimetypes.guess_type(path)[0] or "binary data"
        raise ToolError(f"{path} is {kind} of {len(data)} bytes, and no text")
    try:
        text = data[len(bom) :].decode(encoding)
    except UnicodeDecodeError as error:
        if bom:
            raise ToolError(f"{path} is no text in {encoding}: {error.reason}") from error
        encoding = "latin-1"  # which has a character for every byte
        text = data.decode(encoding)
    if "\r\n" in text and text.count("\r\n") == text.count("\n"):
        return Text(text.replace("\r\n", "\n"), encoding, bom, "\r\n")
    return Text(text, encoding, bom)


def key_of(workspace: Workspace, path: str) -> str:
    """Return the one name of a file under which it is noted as read: an absolute path."""
    if path.startswith("~") and not workspace.is_isolated:
        path = os.path.expanduser(path)
    return posixpath.normpath(posixpath.join(workspace.root, path))


def note_file(context: ToolContext, path: str, status: tuple[int, float] | None) -> None:
    """Note a file as the agent has seen it: its size, and the time of its last change."""
    if status is not None:
        key = key_of(context.workspace, path)
        context.read_files[key] = status
        context.emit(FileSeen(path=key, size=status[0], changed=status[1]))


async def read_text(context: ToolContext, path: str) -> Text | None:
    """Return a file that is to be changed; None where there is none.

    Raises:
      ToolError: the agent has not read it, it has changed since, or it is no text.
    """
    status = await context.workspace.stat(path)
    if status is None:
        return None
    known = context.read_files.get(key_of(context.workspace, path))
    if known is None:
        raise ToolError(f"{path} was not read yet; read it with read_file before changing it")
    if known != status:
        raise ToolError(f"{path} has changed since it was read; read it again, then change it")
    return decode_text(await context.workspace.read(path, MAX_FILE_BYTES), path)


def unified_diff(path: str, before: str, after: str) -> str:
    """Return what changes between two texts; "" for nothing."""
    old = before.splitlines(keepends=True)
    new = after.splitlines(keepends=True)
    # Most of a long file is equal at both ends, and slow to compare.
    start = _equal(old, new)
    end = _equal(old[start:][::-1], new[start:][::-1])
    start = max(0, start - 3)
    old = old[start : len(old) - max(0, end - 3)]
    new = new[start : len(new) - max(0, end - 3)]
    if old == new:
        return ""
    header = f"--- {path}\n+++ {path}\n"
    if max(len(old), len(new)) > MAX_DIFF_LINES:
        return f"{header}@@ {len(old)} lines from line {start + 1} become {len(new)} @@\n"
    lines = list(difflib.unified_diff(old, new, path, path))
    ended = [line if line.endswith("\n") else f"{line}\n\\ No newline at end\n" for line in lines]
    return header + "".join(_moved(line, start) for line in ended[2:])


def _moved(line: str, by: int) -> str:
    """Return a line of a diff; the head of a hunk counts from the file's beginning."""
    found = re.match(r"@@ -(\d+)((?:,\d+)?) \+(\d+)((?:,\d+)?) @@", line)
    if not found:
        return line
    return f"@@ -{int(found[1]) + by}{found[2]} +{int(found[3]) + by}{found[4]} @@\n"


def _equal(one: list[str], other: list[str]) -> int:
    """Return how many lines are equal from the start."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))
