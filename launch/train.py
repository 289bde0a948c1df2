"""Train an experiment.

python -m launch.train --config=experiments/ipa.py[:PRESET] [--workdir=DIR] [--config.key=value ...]

The same command again resumes where a run stopped. Ctrl-C once saves the last whole step and prints
how to resume; twice leaves at once.

On a pod the same command runs in every process (rome/train/distributed.py describes how they find
each other; `python -m launch.pod` starts them).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from launch._main import reject_arguments, run_command, use_compilation_cache
from rome.train.streams import outlast_readers

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    "experiments/ipa.py",
    "An experiment file, with :PRESET after it where it has several.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run. Default: runs/EXPERIMENT-PRESET-HASH OF WHAT IS LEARNT."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where several processes are started by hand."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", -1, "How many processes train together; SLURM and TPU pods know it."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", -1, "Number of this process, from 0 to num_processes - 1."
)


ONE_WISH_SECONDS = 1.0  # make, a shell or a scheduler may deliver one Ctrl-C twice


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked this process to stop; a second signal interrupts it.

    Signals within ONE_WISH_SECONDS of the first one are the same wish.
    """

    def __init__(self) -> None:
        self.made = False
        self._made_at = 0.0
        self.listen()

    def listen(self) -> None:
        """Install the signal handlers."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def __call__(self) -> bool:
        return self.made

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.made and now - self._made_at > ONE_WISH_SECONDS:
            raise KeyboardInterrupt
        if self.made:
            return
        self.made = True
        self._made_at = now
        text = b"\nstopping: the last whole step is saved (again: leave at once)\n"
        with contextlib.suppress(OSError):  # unbuffered: a handler may interrupt another write
            os.write(sys.stderr.fileno(), text)


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--config.key=value")
    logging.set_verbosity(logging.WARNING)  # orbax logs every save
    outlast_readers()
    stop = StopRequest()  # before JAX and all else is imported: an early Ctrl-C counts too
    from rome.train.devices import claim_devices
    from rome.train.distributed import choose
    from rome.train.memory import keep_freed_memory
    from rome.train.workdir import default_workdir

    keep_freed_memory()  # before JAX starts its threads
    config = _CONFIG.value
    layout = choose(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    claim_devices(config, is_alone=layout.kind == "alone")
    from rome.stages.config import key_rules
    from rome.stages.experiment import run, start_team

    workdir = pathlib.Path(_WORKDIR.value or default_workdir(config, key_rules(config)))
    team = start_team(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, stop)
    stop.listen()  # jax.distributed has replaced our handlers
    try:
        is_complete = run(config, workdir, team)
        if not is_complete and team.leads:
            print(
                f"stopped; what was reached is saved in {workdir}. To resume:\n  {own_command()}",
                flush=True,
            )
        return 0 if is_complete else 130
    except BaseException as error:
        team.part(error)
        raise
    finally:
        team.close()


def own_command() -> str:
    """Return the command line that started this process."""
    return shlex.join([os.path.relpath(sys.executable), "-m", "launch.train", *sys.argv[1:]])


def when_stopped() -> str:
    """Return the line that ends a run which a second signal interrupted."""
    return f"launch.train: left at once; to go on from the last checkpoint:\n  {own_command()}"


def known_errors() -> Sequence[type[BaseException]]:
    """Return the exception types that are reported in one line."""
    from rome.stages.experiment import KNOWN_ERRORS

    return KNOWN_ERRORS


if __name__ == "__main__":
    use_compilation_cache()
    run_command("launch.train", main, known_errors=known_errors, when_stopped=when_stopped)
