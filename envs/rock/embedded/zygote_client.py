"""This process's end of the zygote (host/zygote.py), which starts on first use, from any thread."""

import atexit
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading

from envs.rock.config import SandboxConfig
from envs.rock.errors import SandboxStartError
from envs.rock.gate import Gate
from envs.rock.host import linux, slots
from envs.rock.host.messages import parse, receive, send

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from host import zygote;"
    " zygote.main(int(sys.argv[2]), int(sys.argv[3]))"
)
_ROCK = str(pathlib.Path(__file__).parents[1])  # the directory of the package `host`
_INHERITED_VARIABLES = ("LD_LIBRARY_PATH",)
_END_SECONDS = 10.0
_EXIT_SECONDS = 25.0  # the zygote kills what does not end within 10 s, and then cleans up
STARTS_AT_ONCE = 16


class _Zygote:
    """The child process and the socket for requests to it."""

    def __init__(self) -> None:
        linux.raise_descriptor_limit()  # the zygote inherits it, and has three for each sandbox
        temporary = tempfile.gettempdir()
        slots.state_directory(temporary)  # what is wrong with it is said here, not on stderr
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_END_SECONDS)
        boot = [sys.executable, "-I", "-S", "-c", _BOOT, _ROCK]
        # The environment is almost empty, so that no key of ours is in /proc of any process that
        # descends from it. There is no preexec_fn, so Python uses vfork: a copy of this process's
        # page tables would take longer than the start of a sandbox.
        environment = {"TMPDIR": temporary}
        for name in _INHERITED_VARIABLES:
            if name in os.environ:
                environment[name] = os.environ[name]
        with theirs:
            self._process = subprocess.Popen(
                [*boot, str(theirs.fileno()), str(os.getpid())],
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def ask(self, request: dict) -> socket.socket:
        """Send a request; return the socket on which the answer will come."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                send(self._control, request, (theirs.fileno(),))
        except OSError as error:
            ours.close()
            raise SandboxStartError(
                f"the sandbox host process does not answer ({error}); its stderr says more"
            ) from error
        return ours

    def close(self) -> None:
        """End the process and wait until it has ended its sandboxes."""
        self._control.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


def spec(config: SandboxConfig, tier: str, snapshot: str | None = None) -> dict:
    """Return the request to create a sandbox.

    Args:
      config: its limits.
      tier: "namespaces" or "landlock".
      snapshot: path of the snapshot to start from.
    """
    return {
        "op": "create",
        "tier": tier,
        "snapshot": snapshot,
        "memory_bytes": config.memory_mb << 20,
        "disk_bytes": config.disk_mb << 20,
        "inodes": config.inodes,
        "pids": config.pids,
        "cpus": config.cpus,
        "open_files": config.open_files,
        "egress": config.grants(),
        "verifier_tools": os.path.abspath(config.verifier_tools) if config.verifier_tools else "",
    }


start_gate = Gate(STARTS_AT_ONCE)
_zygote: _Zygote | None = None
_lock = threading.Lock()


def create(spec: dict) -> socket.socket:
    """Ask for a sandbox and return the socket to its holder.

    The holder's first message says whether the sandbox stands.
    """
    global _zygote
    with _lock:
        if _zygote is None or not _zygote.alive():
            _zygote = _Zygote()
        channel = _zygote.ask(spec)
    channel.setblocking(False)
    return channel


def ask(request: dict) -> dict:
    """Ask the running zygote and return its answer.

    Raises:
      SandboxStartError: none runs, or it does not answer.
    """
    with _lock:
        if _zygote is None:
            raise SandboxStartError("the sandbox host process has ended, and its snapshots with it")
        channel = _zygote.ask(request)
    with channel:
        channel.settimeout(_END_SECONDS)
        try:
            data, _ = receive(channel)
        except TimeoutError:
            raise SandboxStartError(
                f"the sandbox host process gave no answer within {_END_SECONDS:.0f} s"
            ) from None
        return parse(data)


def shut_down() -> None:
    """End every sandbox of this process and wait for it; the interpreter's exit calls this."""
    global _zygote
    with _lock:
        if _zygote is not None:
            _zygote.close()
            _zygote = None


def _forget_after_fork() -> None:
    """Let a child process start a zygote of its own: the parent's is not the child's."""
    global _zygote, _lock, start_gate
    _zygote = None
    _lock = threading.Lock()
    start_gate = Gate(STARTS_AT_ONCE)


atexit.register(shut_down)
os.register_at_fork(after_in_child=_forget_after_fork)
