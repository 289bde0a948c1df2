"""Starts the embedded engine (`launch.serve`) as a process of its own, and ends it for certain."""

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
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from rome.engine.client import EngineError

ROOT = pathlib.Path(__file__).resolve().parents[2]
# exit status of launch.serve when it cannot have its port (the number of EADDRINUSE)
PORT_IN_USE = 98
PORT_ATTEMPTS = 3
KILL_SECONDS = 30.0
START_SECONDS = 180.0


@dataclasses.dataclass
class ServerProcess:
    """A running server. Leave it by `stop()`, or use it as a context manager."""

    url: str
    process: subprocess.Popen
    log_path: pathlib.Path
    start_again: Callable[[], subprocess.Popen]
    stopped: bool = False  # for good

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def alive(self) -> bool:
        return self.process.poll() is None

    def restart(self, deadline_s: float = START_SECONDS) -> None:
        """Ends the process, however it stands, and starts it anew at the same URL with the weights
        of its first start.

        Returns when it answers.

        Raises: EngineError with the end of the log when it does not within deadline_s.
        """
        self._end(grace_s=0.5)
        if not self.stopped:
            self.process = self.start_again()
        if self.stopped:  # meanwhile, by another thread
            self._end(grace_s=0.5)
            raise EngineError(f"{self.url} was stopped; it is not started again")
        status = _wait_until_ready(self, time.monotonic() + deadline_s)
        if status is not None:
            raise EngineError(
                f"the engine ended with status {status} when it was started again; the end of"
                f" {self.log_path}:\n{_tail(self.log_path)}"
            )

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL to its whole process group, for good.

        Does nothing when it is gone already.
        """
        self.stopped = True
        self._end(grace_s)

    def _end(self, grace_s: float) -> None:
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                with contextlib.suppress(
                    subprocess.TimeoutExpired
                ):  # a busy kernel takes its time; that must not hide why the server was stopped
                    self.process.wait(KILL_SECONDS)


def start_server(
    model_dir: str | os.PathLike[str],
    log_path: str | os.PathLike[str],
    *,
    port: int | None = None,
    flags: Sequence[str] = (),
    deadline_s: float = START_SECONDS,
    environment: dict[str, str] | None = None,
) -> ServerProcess:
    """Starts `python -m launch.serve` and returns when it is ready to answer.

    The server ends with this process, even when this process is killed. It gets one CPU device,
    whatever XLA_FLAGS says here.

    Args:
      port: None takes a free one, and another when somebody else was faster.
      flags: further flags of launch.serve.
      environment: added to this process's own.
    Raises: EngineError with the end of the log when it is not ready within deadline_s.
    """
    log_path = pathlib.Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + deadline_s
    for _ in range(PORT_ATTEMPTS):
        server = _launch(model_dir, log_path, port or _free_port(), flags, environment or {})
        try:
            status = _wait_until_ready(server, ends)
        except BaseException:
            server.stop(grace_s=0.5)
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
    extra: dict[str, str],
) -> ServerProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    environment["XLA_FLAGS"] = re.sub(
        r"--xla_force_host_platform_device_count=\S+", "", environment.get("XLA_FLAGS", "")
    ).strip()
    command = [
        sys.executable,
        "-m",
        "launch.serve",
        "--model_path",
        str(model_dir),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--parent_pid",
        str(os.getpid()),
        *flags,
    ]

    def start() -> subprocess.Popen:
        with open(log_path, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | extra,
                start_new_session=True,
            )

    return ServerProcess(f"http://127.0.0.1:{port}", start(), log_path, start)


def _wait_until_ready(server: ServerProcess, ends: float) -> int | None:
    """None when /health says 200, the exit status when the process ended instead.

    Raises EngineError at `ends`.
    """
    while time.monotonic() < ends:
        if not server.alive():
            return server.process.returncode
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5) as response:
                if response.status == 200:
                    return None
        except (urllib.error.URLError, OSError):  # not listening yet, or 503 while it compiles
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
