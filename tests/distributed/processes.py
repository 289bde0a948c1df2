"""Several Python processes on this machine that stand for the hosts of a pod: jax.distributed over
gloo, some CPU devices each.
"""

import pathlib
import signal
import socket
import subprocess
import sys
import time

from tests.paths import ROOT
from tests.processes import user_environment


class Job:
    """`count` processes of one command, found by the environment.

    Leave it by `wait`, or as a context manager: nothing stays behind.

    last: arguments that only the last process gets.
    """

    def __init__(
        self,
        count: int,
        devices: int,
        command: list[str],
        logs: pathlib.Path,
        last: tuple[str, ...] = (),
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [logs / f"process_{index}.log" for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            environment = user_environment(devices) | {
                "PYTHONUNBUFFERED": "1",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *(last if index == count - 1 else ())],
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses; those who are not done in time are killed."""
        ends = time.monotonic() + seconds
        with self:
            for process in self.processes:
                try:
                    process.wait(max(0.1, ends - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
        return self.statuses

    @property
    def statuses(self) -> list[int | None]:
        return [process.returncode for process in self.processes]

    def wait_until(self, condition, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends and all(
                process.poll() is None for process in self.processes
            ), self.output()
            time.sleep(0.05)

    def signal(self, index: int, number: int = signal.SIGTERM) -> None:
        self.processes[index].send_signal(number)

    def text(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")

    def output(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{self.text(index)[-3000:]}" for index, log in enumerate(self.logs)
        )


def run_job(
    count: int, devices: int, command: list[str], logs: pathlib.Path, seconds: float
) -> Job:
    """A job that has come to its end.

    It begins anew where a busy machine let one process compile 30 s longer than another: gloo,
    which only CPUs use, gives them no longer to meet in their first collective.
    """
    for attempt in range(4):
        job = Job(count, devices, command, logs / str(attempt))
        job.wait(seconds)
        if "Gloo context initialization failed" not in job.output():
            break
    return job
