"""What is kept of a command's output: head and tail for the model, the whole in a file."""

from __future__ import annotations

import asyncio
import codecs
import pathlib
import re
from collections.abc import Callable
from typing import IO

HEAD_CHARACTERS = 10_000
TAIL_CHARACTERS = 20_000
# A command that writes more is ended. A sandbox's own limit is about the same.
MAX_OUTPUT_BYTES = 64 << 20
LIVE_SECONDS = 0.2  # between two pieces of a running command's output that are told
LIVE_BYTES = 4000  # of such a piece
# Of UTF-8, so that no head or tail is short of characters.
_HEAD_BYTES = 4 * HEAD_CHARACTERS
_TAIL_BYTES = 4 * TAIL_CHARACTERS
# Colours, movements of the cursor and titles of windows, which say nothing to a model.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9])")
# A line that was written over: only what stood there last is kept.
_OVERWRITTEN = re.compile(r"[^\n\r]*\r(?=[^\n\r])")


class OutputKeeper:
    """The output of one command; a file takes the whole, once it is too long for memory."""

    def __init__(
        self, path: pathlib.Path, on_output: Callable[[bytes], None] | None = None
    ) -> None:
        self.total = 0  # bytes written so far
        self._on_output = on_output
        self._path = path
        self._file: IO[bytes] | None = None
        self._head = bytearray()
        self._tail = bytearray()

    def write(self, data: bytes) -> None:
        """Take a piece of output."""
        if self._on_output is not None:
            self._on_output(data)
        self.total += len(data)
        if self._file is None and self.total > _HEAD_BYTES + _TAIL_BYTES:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by `finish`)
            self._file.write(self._head + self._tail)
        if self._file is not None:
            self._file.write(data)
        missing = _HEAD_BYTES - len(self._head)
        if missing > 0:
            self._head += data[:missing]
            data = data[missing:]
        self._tail += data
        if self._file is not None and len(self._tail) > 2 * _TAIL_BYTES:
            del self._tail[:-_TAIL_BYTES]

    @property
    def is_flooded(self) -> bool:
        """Whether so much was written that the command is to be ended."""
        return self.total > MAX_OUTPUT_BYTES

    def finish(self) -> tuple[str, str]:
        """Return what the model reads, and the file that holds the whole; "" for none."""
        file = str(self._path)
        if self._file is not None:
            self._file.close()
            return join(decode(self._head), decode(self._tail), self.total, file), file
        text = decode(self._head + self._tail)
        if not is_long(text):
            return text, ""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(self._head + self._tail)
        return join(text, text, self.total, file), file


class LiveOutput:
    """Tells the output of a running command, a few times a second at most.

    Of what comes faster only the end is told: the whole is in the command's result. One that is
    over at once tells nothing.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Take a piece of output."""
        self._waiting += data
        del self._waiting[:-LIVE_BYTES]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LIVE_SECONDS, self._flush)

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        text = self._decoder.decode(self._waiting)
        self._waiting.clear()
        if text:
            self._tell(text)


def decode(data: bytes | bytearray) -> str:
    """Return output as the model reads it: without colours, and lines as they stood last."""
    text = data.decode(errors="replace")
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    if "\r" in text:
        text = _OVERWRITTEN.sub("", text.replace("\r\n", "\n"))
    return text


def is_long(text: str) -> bool:
    """Return whether a text is too long to be shown whole."""
    return len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS


def shorten(text: str, characters: int, file: str = "") -> str:
    """Return a text with its middle left out where it is longer; `file` has the whole."""
    if len(text) <= characters:
        return text
    half = characters // 2
    left_out = len(text) - 2 * half
    whole = f"; the whole is in {file}" if file else ""
    return f"{text[:half]}\n[... {left_out} characters left out{whole} ...]\n{text[-half:]}"


def join(head: str, tail: str, total: int, file: str) -> str:
    """Return the head of one text, a line on what is left out of `total` bytes, and a tail."""
    line = f"\n[... left out: the output has {total} bytes; the whole is in {file} ...]\n"
    return head[:HEAD_CHARACTERS] + line + tail[-TAIL_CHARACTERS:]
