"""Train an experiment.

python -m launch.train --config=experiments/ipa.py[:PRESET] [--workdir=DIR] [--config.key=value ...]

The same command again resumes where a run stopped. Ctrl-C once saves the last whole step and prints
how to resume; twice leaves at once.

On a pod the same command runs in every process (rome/train/distributed.py describes how they find
each other; `python -m launch.pod` starts them).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from launch._stop import STOPPED_STATUS, StopRequest

STOP = StopRequest("launch.train")
if __name__ == "__main__":
    STOP.listen()  # before the imports below: a Ctrl-C during them ends with one line, too

from absl import flags, logging  # noqa: E402

from launch._config import define_config, read_config  # noqa: E402
from launch._main import reject_arguments, run_command, use_compilation_cache  # noqa: E402
from rome.train.streams import outlast_readers  # noqa: E402

_CONFIG = define_config("experiments/ipa.py")
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


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--config.key=value")
    logging.set_verbosity(logging.WARNING)  # orbax logs every save
    outlast_readers()
    from rome.train.devices import claim_devices
    from rome.train.distributed import choose
    from rome.train.memory import keep_freed_memory
    from rome.train.workdir import default_workdir

    keep_freed_memory()  # before JAX starts its threads
    config = read_config(_CONFIG)
    layout = choose(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    claim_devices(config, is_alone=layout.kind == "alone")
    from rome.stages.config import check_chain, key_rules
    from rome.stages.experiment import run, start_team

    check_chain(config)
    workdir = pathlib.Path(_WORKDIR.value or default_workdir(config, key_rules(config)))
    team = start_team(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, STOP)
    STOP.listen()  # jax.distributed has replaced our handlers
    STOP.begin()
    try:
        is_complete = run(config, workdir, team)
        if not is_complete and team.leads:
            saved = f"stopped; what was reached is saved in {workdir}. To resume:"
            print(f"{saved}\n  {STOP.own_command()}", flush=True)
        return 0 if is_complete else STOPPED_STATUS
    except BaseException as error:
        team.part(error)
        raise
    finally:
        STOP.end()
        team.close()


def known_errors() -> Sequence[type[BaseException]]:
    """Return the exception types that are reported in one line."""
    from rome.stages.experiment import KNOWN_ERRORS

    return KNOWN_ERRORS


if __name__ == "__main__":
    use_compilation_cache()
    run_command("launch.train", main, known_errors=known_errors, when_stopped=STOP.when_stopped)
