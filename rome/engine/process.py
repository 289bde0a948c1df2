"""Starts the embedded engine (`launch.serve`) as a child process, and ends it reliably."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from envs.proxies import open_directly
from rome.engine.errors import EngineError
from rome.stopping import ShouldStop, never, raise_if_stopped

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Exit status of launch.serve when its port is taken (the number of EADDRINUSE).
PORT_IN_USE = 98
PORT_ATTEMPTS = 3
KILL_SECONDS = 30.0
SHORT_GRACE_SECONDS = 0.5  # for a server whose state no longer matters
START_SECONDS = 600.0  # a server that ends is noticed at once; a busy machine compiles for minutes
HEALTH_SECONDS = 1.5  # of one question; a wish to stop is heard between two of them


@dataclasses.dataclass
class ServerProcess:
    """A running server. End it by `stop()`, or use it as a context manager.

    Attributes:
      url: where it listens.
      process: the current process; another one after `restart`.
      log_path: file that its output is appended to.
      start_again: starts another process with the same arguments.
      stopped: whether `stop` was called; it is then not restarted.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_path: pathlib.Path
    start_again: Callable[[], subprocess.Popen[bytes]]
    stopped: bool = False

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def restart(self, deadline_seconds: float = START_SECONDS) -> None:
        """Kill the process and start it again, at the same URL with its first weights.

        Returns when it answers.

        Raises:
          EngineError: it does not answer within the deadline, with the end of its log; or it was
            stopped, possibly by another thread.
        """
        self._end(SHORT_GRACE_SECONDS)
        if not self.stopped:
            self.process = self.start_again()
        if self.stopped:  # possibly since the line above, by another thread
            self._end(SHORT_GRACE_SECONDS)
            raise EngineError(f"{self.url} was stopped; it is not started again")
        status = _wait_until_ready(self, time.monotonic() + deadline_seconds)
        if status is not None:
            raise EngineError(
                f"the engine ended with status {status} when it was started again; the end of"
                f" {self.log_path}:\n{_tail(self.log_path)}"
            )

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Send SIGTERM, then SIGKILL to the whole process group; do nothing if it has ended."""
        self.stopped = True
        self._end(grace_seconds)

    def _end(self, grace_seconds: float) -> None:
        if not self.alive():
            return
        self.process.terminate()
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            # A busy kernel may need longer; that must not hide the reason for the stop.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_SECONDS)


def start_server(
    model_dir: str | os.PathLike[str],
    log_path: str | os.PathLike[str],
    *,
    port: int | None = None,
    flags: Sequence[str] = (),
    deadline_seconds: float = START_SECONDS,
    environment: Mapping[str, str | None] | None = None,
    should_stop: ShouldStop = never,
) -> ServerProcess:
    """Start `python -m launch.serve` and return when it is ready to answer.

    The server ends with this process, even if this process is killed. It gets one CPU device,
    whatever XLA_FLAGS says here.

    Args:
      model_dir: Hugging Face checkpoint directory.
      log_path: file that the server's output is appended to.
      port: None takes a free one, and another if a different process took it first.
      flags: further flags of launch.serve.
      deadline_seconds: for loading and compiling.
      environment: changes to this process's environment; None removes a variable.
      should_stop: polled while the server is waited for; True ends it.

    Raises:
      EngineError: it is not ready within the deadline, with the end of the log.
      Stopped: `should_stop` returned True.
    """
    log_path = pathlib.Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + deadline_seconds
    for _ in range(PORT_ATTEMPTS):
        server = _launch(model_dir, log_path, port or _free_port(), flags, environment or {})
        try:
            status = _wait_until_ready(server, ends, should_stop)
        except BaseException:
            server.stop(SHORT_GRACE_SECONDS)
            raise
        if status is None:
            return server
        if status != PORT_IN_USE or port is not None:
            break
    raise EngineError(
        f"the engine ended with status {status} before it was ready; the end of"
        f" {log_path}:\n{_tail(log_path)}"
    )


def _launch(
    model_dir: str | os.PathLike[str],
    log_path: pathlib.Path,
    port: int,
    flags: Sequence[str],
    changes: Mapping[str, str | None],
) -> ServerProcess:
    command = [sys.executable, "-m", "launch.serve"]
    command += ["--model_path", str(model_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--parent_pid", str(os.getpid()), *flags]
    environment = _child_environment(changes)

    def start() -> subprocess.Popen[bytes]:
        with open(log_path, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    return ServerProcess(f"http://127.0.0.1:{port}", start(), log_path, start)


def _child_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment, changed, with the repository and one CPU device."""
    merged = {**os.environ, **changes}
    environment = {name: value for name, value in merged.items() if value is not None}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    xla_flags = environment.get("XLA_FLAGS", "")
    one_device = re.sub(r"--xla_force_host_platform_device_count=\S+", "", xla_flags)
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": one_device.strip(),
    }


def _wait_until_ready(
    server: ServerProcess, ends: float, should_stop: ShouldStop = never
) -> int | None:
    """Return None once /health says 200, or the exit status if the process ended first.

    Raises:
      EngineError: neither happened until `ends`.
    """
    while time.monotonic() < ends:
        if not server.alive():
            return server.process.returncode
        raise_if_stopped(should_stop)
        try:
            with open_directly(server.url + "/health", HEALTH_SECONDS) as response:
                if response.status == 200:
                    return None
        except OSError:  # not listening yet, or 503 while it compiles
            pass
        time.sleep(0.1)
    raise EngineError(
        "the engine was not ready in time; raise the deadline, or see the end of"
        f" {server.log_path}:\n{_tail(server.log_path)}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(path: pathlib.Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) or "(empty)"
