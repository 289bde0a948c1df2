"""Pipes and memory files through which an embedded sandbox's commands get input and give output."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import NamedTuple

from envs.rock.backend import MAX_DISCARDED_BYTES

READ_BYTES = 1 << 16


class Captured(NamedTuple):
    """What one command wrote to one stream.

    Attributes:
      text: the first max_output_bytes, as UTF-8.
      dropped: bytes beyond these.
      flooded: whether so much was written that reading stopped.
    """

    text: str
    dropped: int
    flooded: bool


class Output:
    """The reading end of an output stream.

    It keeps the first `limit` bytes, reads on without keeping more, and after MAX_DISCARDED_BYTES
    calls `on_flood` once. `on_piece` is called with what is read. While it is paused, a writer
    waits as soon as the pipe is full.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int):
        self._loop = loop
        self._limit = limit
        self.on_flood: Callable[[], None] | None = None
        self.on_piece: Callable[[bytes], None] | None = None
        self._read_end: int | None
        self.write_end: int | None
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._capacity = fcntl.fcntl(self._read_end, fcntl.F_GETPIPE_SZ)
        self._paused = False
        self._watched = True
        self._clear()
        loop.add_reader(self._read_end, self._handle_readable)

    def pause(self) -> None:
        """Stop reading: what is written while no command runs costs this process nothing."""
        self._paused = True

    def resume(self) -> None:
        """Read again."""
        self._paused = False
        if self._read_end is not None and not self._watched:
            self._watched = True
            self._loop.add_reader(self._read_end, self._handle_readable)

    def take(self) -> Captured:
        """Return what was written so far and start over for the next command.

        What the pipe holds is read first: the writer may already have exited. No more than that,
        since another writer may go on.
        """
        left = self._capacity
        while self._read_end is not None and left > 0 and (size := self._read()):
            left -= size
        text = bytes(self._data).decode(errors="replace")
        captured = Captured(text, self._dropped, self._flooded)
        self._clear()
        return captured

    @property
    def closed(self) -> bool:
        """Whether the stream has ended or was closed."""
        return self._read_end is None

    def close_write_end(self) -> None:
        """Close this process's copy of the writing end, once a command has its own."""
        if self.write_end is not None:
            os.close(self.write_end)
            self.write_end = None

    def close(self) -> None:
        """Stop reading and close both ends."""
        self.close_write_end()
        if self._read_end is not None:
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._read_end = None

    def _clear(self) -> None:
        self._data = bytearray()
        self._dropped = 0
        self._flooded = False

    def _handle_readable(self) -> None:
        if not self._paused:
            self._read()
        elif (
            self._read_end is not None
        ):  # only now: most sessions write nothing while they are idle
            self._watched = False
            self._loop.remove_reader(self._read_end)

    def _read(self) -> int:
        """Read once; return how many bytes, 0 when there is nothing to read now."""
        assert self._read_end is not None
        try:
            piece = os.read(self._read_end, READ_BYTES)
        except BlockingIOError:
            return 0
        if not piece:
            self.close()
            return 0
        kept = piece[: self._limit - len(self._data)]
        self._data += kept
        self._dropped += len(piece) - len(kept)
        if self.on_piece is not None:
            self.on_piece(piece)
        if self._dropped > MAX_DISCARDED_BYTES and not self._flooded:
            self._flooded = True
            if self.on_flood is not None:
                self.on_flood()
        return len(piece)


def memory_file(content: bytes, cleanup: contextlib.ExitStack) -> int:
    """Return a descriptor to read `content` from, which has no name in any file system."""
    descriptor = os.memfd_create("rock", os.MFD_CLOEXEC)
    cleanup.callback(os.close, descriptor)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
