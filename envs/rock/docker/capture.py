"""The output streams of commands in a container."""

import asyncio

from envs.rock.config import CommandResult

KILLED = 137  # 128 + SIGKILL
MAX_MARK_BYTES = 100


class Capture:
    """One stream: it keeps the first `limit` bytes of a command and counts the rest.

    In a session, a mark that the shell writes after each command says where the output of that
    command ends; what follows the mark belongs to the next command.

    Attributes:
      total: bytes that the command has written.
      found: set when the mark has arrived.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._reset()

    def _reset(self) -> None:
        self._data = bytearray()
        self._mark = b""
        self._tail = b""  # the last bytes, in case that a mark begins in them
        self._rest = b""  # what followed the mark
        self.total = 0
        self.found = asyncio.Event()

    def feed(self, piece: bytes) -> None:
        """Add what has arrived."""
        if self.found.is_set():
            self._rest += piece[: self._limit]
            return
        self._data += piece[: max(0, self._limit - len(self._data))]
        self.total += len(piece)
        seen = self._tail + piece
        if self._mark:
            start = seen.find(self._mark)
            if start >= 0:
                self._rest = seen[start + len(self._mark) :]
                self.total += start - len(seen)
                del self._data[self.total :]
                self.found.set()
        self._tail = seen[-MAX_MARK_BYTES:]

    def expect(self, mark: bytes) -> None:
        """Set the mark that ends the command's output."""
        self._mark = mark

    def take(self) -> tuple[str, int]:
        """Return the text and the number of bytes that were cut; start over with what follows."""
        text = bytes(self._data).decode(errors="replace")
        cut = max(0, self.total - self._limit)
        rest = self._rest
        self._reset()
        self.feed(rest)
        return text, cut


def to_result(
    stdout: Capture,
    stderr: Capture,
    *,
    code: int,
    reason: str,
    out_of_memory: bool,
    seconds: float,
    denials: int,
) -> CommandResult:
    """Combine a command's output with how it ended.

    Args:
      stdout: its output, which is taken from the capture; so is stderr's.
      stderr: see stdout.
      code: its exit code.
      reason: the limit for which we killed it, or "".
      out_of_memory: whether the memory limit killed a process in the meantime.
      seconds: how long it ran.
      denials: how many connections were refused in the meantime.
    """
    out, cut_out = stdout.take()
    err, cut_err = stderr.take()
    limits = []
    if reason:
        limits.append(reason)
    if out_of_memory:
        limits.append("memory")
    return CommandResult(
        stdout=out,
        stderr=err,
        exit_code=code,
        timed_out=reason == "timeout",
        truncated=bool(cut_out or cut_err),
        seconds=seconds,
        limits_hit=tuple(limits),
        network_denials=denials,
        cut=(cut_out, cut_err),
    )
