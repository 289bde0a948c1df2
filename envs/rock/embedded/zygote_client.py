"""The manager's end of the zygote (host/zygote.py): one for each process, started on first use,
from any thread.
"""

import asyncio
import atexit
import collections
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading

from envs.rock.config import SandboxConfig
from envs.rock.errors import SandboxStartError
from envs.rock.host.messages import parse, receive, send

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from host import zygote;"
    " zygote.main(int(sys.argv[2]), int(sys.argv[3]))"
)
_HERE = str(pathlib.Path(__file__).parents[1])
_END_SECONDS = 10.0
STARTS_AT_ONCE = 16


class Gate:
    """At most `width` inside at a time, counted over all event loops and threads."""

    def __init__(self, width: int):
        self._free, self._waiting, self._lock = width, collections.deque(), threading.Lock()

    async def __aenter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
            if turn.done() and not turn.cancelled():  # the place was ours already: hand it on
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                try:
                    turn.get_loop().call_soon_threadsafe(self._admit, turn)
                    return
                except RuntimeError:  # that loop is closed; nobody waits there any more
                    continue
            self._free += 1

    def _admit(self, turn: asyncio.Future) -> None:
        if turn.done():
            self._leave()
        else:
            turn.set_result(None)


class _Zygote:
    """The child process and the socket that asks it for sandboxes."""

    def __init__(self):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_END_SECONDS)
        # No preexec_fn, so Python uses vfork: a copy of this process's page tables would take
        # longer than a sandbox. The environment is empty, so that no key of ours is in /proc of
        # anything a sandbox descends from.
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _BOOT,
            _HERE,
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        environment = {"TMPDIR": tempfile.gettempdir()} | {
            name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
        }
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict) -> socket.socket:
        """Send a request; the answer comes on the returned socket."""
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
        self._control.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


def spec(config: SandboxConfig, tier: str, snapshot: str | None = None) -> dict:
    """The request for one sandbox, in the zygote's terms."""
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
    }


start_gate = Gate(STARTS_AT_ONCE)
_zygote: _Zygote | None = None
_lock = threading.Lock()


def create(spec: dict) -> socket.socket:
    """Ask for a sandbox; its holder's first message on the returned socket says whether it stands."""
    global _zygote
    with _lock:
        if _zygote is None or not _zygote.alive():
            _zygote = _Zygote()
        channel = _zygote.ask(spec)
    channel.setblocking(False)
    return channel


def ask(request: dict) -> dict:
    """A question to the zygote that runs, and its answer."""
    with _lock:
        if _zygote is None:
            raise SandboxStartError("the sandbox host process has ended, and its snapshots with it")
        channel = _zygote.ask(request)
    with channel:
        channel.settimeout(_END_SECONDS)
        try:
            return parse(receive(channel)[0])
        except TimeoutError:
            raise SandboxStartError(
                f"the sandbox host process gave no answer within {_END_SECONDS:.0f} s"
            ) from None


def shut_down() -> None:
    """End every sandbox of this process and wait for it. Registered for the interpreter's exit."""
    global _zygote
    with _lock:
        if _zygote is not None:
            _zygote.close()
            _zygote = None


def _forget_after_fork() -> None:
    """The parent's zygote is not the child's: a child process starts its own."""
    global _zygote, _lock, start_gate
    _zygote, _lock, start_gate = None, threading.Lock(), Gate(STARTS_AT_ONCE)


atexit.register(shut_down)
os.register_at_fork(after_in_child=_forget_after_fork)
