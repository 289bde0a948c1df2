"""The frame around the commands of a session: what a bash runs before and after each of them.

A shell reads records from a pipe, and runs each in itself: a command, then a request to report how
it ended. `mapfile` reads them and calls back for each, so there is no loop that a `break` could
end, and no function in which `declare` would be local. Before each record the frame puts aside what
would show or run its own lines: tracing, and traps for DEBUG and ERR. A command's record begins by
putting these back.

The pipes lie on descriptors that no program which a command starts inherits (bash saves them with
close-on-exec), and a report counts only with a number that is new for each command. What remains:
code in the shell itself, or in a subshell of it, may read the request and answer it. Its call then
returns early with a code of its choice, and it runs on like any command in the background.

`set -v` and functions named `builtin` or `command` do not outlive their command; `$_` and
PIPESTATUS are the frame's.
"""

import os

MAX_TRAP_BYTES = 4096  # of one trap's command that is put back
MAX_REPORT_BYTES = 1 << 16  # beyond which a shell is not listened to any more
_START = b"]]; "  # of a record, see `loop`


def loop(commands: int, reports: int, redirections: str) -> str:
    """Return bash's text that runs records until their pipe closes.

    Args:
      commands: the descriptor of records, after the redirections.
      reports: the descriptor of reports, after the redirections.
      redirections: move both descriptors out of reach of what commands start. bash saves what a
        redirection replaces on the first free descriptors from 10 on.
    """
    # Quoted words are no aliases, and `builtin` passes functions by. It may itself be a function.
    frame = (
        '{ ROCK=("$?" "$SHELLOPTS"); \\unset -f builtin command;'
        " \\command unset -f builtin;"
        f" \\builtin trap -p DEBUG >&{reports}; \\builtin trap - DEBUG;"
        f" \\builtin trap -p ERR >&{reports}; \\builtin trap - ERR;"
        " \\builtin set +xv; } >/dev/null 2>&1; \\builtin eval -- '[['"
    )
    quoted = "'" + frame.replace("'", "'\\''") + "'"
    # It is called with a number and the record, which begins by closing the bracket (_START).
    return f"{{ mapfile -d '' -c 1 -C {quoted} -u {commands} ROCK; }} {redirections}"


def record(text: bytes) -> bytes:
    """Return a record with text of our own, which runs while all of the command's is put aside."""
    return _START + text + b"\0"


class Frame:
    """What a shell's commands are sent as, and what it reported at the end of the last one.

    Args:
      reports: the descriptor of reports, as in `loop`.
      details: bash's text that puts more of a report into ROCK[2].
    """

    def __init__(self, reports: int, details: str = ""):
        self._reports = reports
        self._details = details
        self._key = b""
        self._restore = _START
        self._received = bytearray()

    @property
    def overflowed(self) -> bool:
        """Whether so much that is no report was written that none is expected any more."""
        return len(self._received) > MAX_REPORT_BYTES

    def records(self, command: bytes) -> bytes:
        """Return a command, and the request to report its end, as the shell reads them."""
        self._key = os.urandom(4).hex().encode()  # the zygote loads no `secrets`
        self._received.clear()
        # Short, since the shell reads a pipe byte by byte; without a new line, at which it would
        # write what it has, and wake the reader twice.
        request = f"\\builtin printf '\\1%s %s %s %s\\0' {self._key.decode()} \"${{ROCK[@]}}\""
        if self._details:
            request = f"{{ {self._details} {request}; }}"
        request += f" >&{self._reports}"
        return self._restore + command + b"\0" + record(request.encode())

    def receive(self, data: bytes) -> tuple[int, bytes] | None:
        """Return the exit code and the details of a report; None while it is not there whole.

        What anybody else wrote to the pipe is ignored.
        """
        self._received += data
        *items, _ = bytes(self._received).split(b"\0")
        for item in items:
            traps, _, report = item.rpartition(b"\1")
            key, _, report = report.partition(b" ")
            code, _, rest = report.partition(b" ")
            options, _, details = rest.partition(b" ")
            if key == self._key and code.isdigit():
                self._note(int(code) & 0xFF, options.split(b":"), traps)
                return int(code) & 0xFF, details
        return None

    def _note(self, code: int, options: list[bytes], traps: bytes) -> None:
        """Note what the next command finds: tracing, traps and $?."""
        lines = []
        if b"xtrace" in options:
            lines.append(b"\\builtin set -x; ")
        lines += [b"\\builtin " + trap for trap in _split_traps(traps)]
        restore = b""
        if lines:  # in a line of its own, which a syntax error in the command does not take along
            restore = b"{ %b} >/dev/null 2>&1\n" % b"".join(lines)
        handles_errors = b"errexit" in options or any(line.endswith(b"ERR\n") for line in lines)
        if code and not handles_errors:
            restore += b"(\\builtin exit %d) >/dev/null 2>&1; " % code
        self._restore = _START + restore


def _split_traps(text: bytes) -> list[bytes]:
    """Return the commands that set the traps again, one for each trap that bash printed."""
    debug, separator, error = text.rpartition(b" DEBUG\n")
    found = [debug + separator, error] if separator else [text]
    return [trap for trap in found if trap.startswith(b"trap -- '") and len(trap) <= MAX_TRAP_BYTES]
