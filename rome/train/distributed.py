"""Starts this process's part of a job of several: by flags, by SLURM, or by what a TPU pod says of
itself.

Alone, nothing happens.

| how | chosen when | who says which process this is |
|---|---|---|
| flags | --coordinator, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID | you |
| SLURM | a step of several tasks (srun) | SLURM_PROCID |
| TPU | a slice of several hosts, or several slices | GKE's environment, or the VM's metadata server |

Nothing here imports JAX before the choice is made, and `start` must come before anything that
touches a device.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rome.train.team import Team

START_SECONDS = 300  # for all processes to come up and find each other
HEARTBEAT_SECONDS = 30  # a process that is not heard for so long is dead, and the others end
SHUTDOWN_SECONDS = 120  # at the end process 0 still draws curves; the others wait for it
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{name}"


class DistributedError(RuntimeError):
    """The processes did not find each other, or do not fit the config: what is wrong and what to
    do.
    """


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the processes will find each other. kind: alone, flags, slurm or tpu; coordinator, count
    and index are None where JAX asks the cluster.
    """

    kind: str
    why: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None  # GPUs of this process; None: JAX's rule


def choose(
    coordinator: str,
    count: int,
    index: int,
    environ: Mapping[str, str] = os.environ,
    tpu_workers: Callable[[], int] | None = None,
) -> Plan:
    """The plan, from the flags ("" and -1: not given), the environment, and on a TPU VM the number
    of workers that its metadata names.
    """
    given = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "num_processes": str(count) if count >= 0 else environ.get("JAX_NUM_PROCESSES", ""),
        "process_id": str(index) if index >= 0 else environ.get("JAX_PROCESS_ID", ""),
    }
    if any(given.values()):
        return _by_flags(given)
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        why = (
            f"SLURM step {environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')} of {tasks}"
            " tasks"
        )
        return Plan(
            "slurm",
            why,
            count=tasks,
            index=int(environ["SLURM_PROCID"]),
            local_devices=_slurm_devices(environ),
        )
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return Plan("alone", "one process")
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if hosts:
        workers, said = (
            len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1),
            "its environment",
        )
    else:
        workers, said = (tpu_workers or _metadata_workers)(), "its metadata"
    if workers > 1:
        return Plan("tpu", f"a TPU pod of {workers} hosts by {said}")
    return Plan("alone", "one process")


def start(
    plan: Plan,
    *,
    stop: Callable[[], bool],
    errors: tuple[type[Exception], ...],
    deadline_s: int = START_SECONDS,
    heartbeat_s: int = HEARTBEAT_SECONDS,
) -> Team:
    """Brings jax.distributed up as planned and says so in one line.

    Raises DistributedError when the processes do not find each other.
    """
    if plan.kind == "alone":
        return Team(stop=stop, errors=errors)
    import jax
    from jax._src import (
        distributed,
    )  # the one door to the coordinator's key-value store; orbax takes it too

    method = {"flags": "deactivate", "slurm": "slurm", "tpu": None}[plan.kind]
    # JAX answers a start that fails with an abort and a stack of C++; this thread is there a moment
    # earlier, with a sentence.
    overdue = threading.Timer(deadline_s, _give_up, (plan, deadline_s))
    overdue.daemon = True
    overdue.start()
    try:
        jax.distributed.initialize(
            plan.coordinator,
            plan.count,
            plan.index,
            local_device_ids=plan.local_devices,
            cluster_detection_method=method,
            initialization_timeout=deadline_s + 30,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"{plan.why}: jax.distributed did not start: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        overdue.cancel()
    state = distributed.global_state
    team = Team(state.process_id, state.num_processes, state.client, stop=stop, errors=errors)
    print(
        f"process {team.index} of {team.count} ({plan.why}; coordinator"
        f" {state.coordinator_address}): {jax.local_device_count()} of {jax.device_count()}"
        f" {jax.default_backend()} devices",
        flush=True,
    )
    return team


def check_mesh_spans(mesh: Any) -> None:
    """Raises DistributedError for a mesh that leaves a process without devices: its part of every
    step would be missing.
    """
    import jax

    used = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - used)
    if idle:
        sizes = (
            ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
            or "one device"
        )
        raise DistributedError(
            f"mesh ({sizes}) takes {mesh.size} of the {jax.device_count()} devices and none of"
            f" process {', '.join(map(str, idle))}. Set --config.mesh.fsdp=-1 (all devices that are"
            " left), or start fewer processes."
        )


def _by_flags(given: Mapping[str, str]) -> Plan:
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise DistributedError(
            f"{there} without {' and '.join(missing)}: several processes need all three. Add"
            f" {' and '.join(missing)}."
        )
    for name in ("num_processes", "process_id"):
        if not given[name].isdecimal():
            raise DistributedError(f"{name}={given[name]!r} is no number. Give a whole number.")
    count, index = int(given["num_processes"]), int(given["process_id"])
    if not re.fullmatch(r"\S+:\d+", given["coordinator"]):
        raise DistributedError(
            f"coordinator={given['coordinator']!r} is no HOST:PORT. Name process 0's host and a"
            " free port there, such as node-0:1234."
        )
    if count < 1 or index >= count:
        raise DistributedError(
            f"process_id={index} does not fit num_processes={count}. Ids run from 0 to"
            " num_processes - 1."
        )
    if count == 1:
        return Plan("alone", "one process by flags")
    return Plan("flags", "by flags", given["coordinator"], count, index)


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """All GPUs that this task sees when it has its node, or a binding of its own, for itself; JAX's
    own rule is one GPU a task.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = len(visible.split(",")) if visible else int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    alone_on_node = (
        re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")) is not None
    )
    return (
        tuple(range(gpus))
        if gpus and (alone_on_node or len(visible.split(",")) == gpus == 1)
        else None
    )


def _metadata_workers() -> int:
    """How many hosts this TPU VM's slices have together; 1 where there is no TPU, or no metadata
    server.
    """
    if (not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*")) or os.environ.get(
        "TPU_SKIP_MDS_QUERY"
    ):
        return 1
    hosts = len(_metadata("worker-network-endpoints").split(","))
    slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", _metadata("tpu-env"))
    return hosts * int(slices[1] if slices else 1)


def _metadata(name: str) -> str:
    url = METADATA.format(
        host=os.environ.get("GCE_METADATA_IP", "metadata.google.internal"), name=name
    )
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def _give_up(plan: Plan, seconds: int) -> None:
    print(f"launch.train: {_overdue(plan, seconds)}", file=sys.stderr, flush=True)
    os._exit(1)


def _overdue(plan: Plan, seconds: int) -> str:
    """Why the processes have not found each other, as far as this one can tell."""
    who = f"process {plan.index} of {plan.count}" if plan.count else "this process"
    if plan.coordinator is None:
        return (
            f"{who} ({plan.why}): not all processes met within {seconds} s. Are all of them"
            " started, and may the hosts reach each other?"
        )
    host, _, port = plan.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"{who}: nobody answers at the coordinator {plan.coordinator} within {seconds} s"
            f" ({error}). Start process 0 there, or correct --coordinator."
        )
    return (
        f"{who}: the coordinator {plan.coordinator} answers, but not all {plan.count} processes"
        f" came within {seconds} s. Start each of the ids 0 to {plan.count - 1} once, all with the"
        " same --num_processes."
    )
