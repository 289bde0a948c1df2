"""Find the other processes of a job: by flags, by SLURM, or by what a TPU pod says of itself.

A process that is alone starts nothing.

flags  chosen by --coordinator, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS,
       JAX_NUM_PROCESSES and JAX_PROCESS_ID; the user numbers the processes
slurm  chosen in a job step of several tasks (srun); SLURM_PROCID numbers them
tpu    chosen on a slice of several hosts, or on several slices; GKE's environment or the VM's
       metadata server numbers them

Nothing here imports JAX before the choice is made, and `start` must come before anything that
touches a device.
"""

from __future__ import annotations

import dataclasses
import glob
import http.client
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rome.stopping import POLL_SECONDS
from rome.train.team import STOPPED_STATUS, Team

START_SECONDS = 300  # for all processes to come up and find each other
HEARTBEAT_SECONDS = 30  # a process that is silent for so long counts as dead; the others end
SHUTDOWN_SECONDS = 120  # at the end process 0 still draws curves; the others wait for it
METADATA_SECONDS = 5  # for an answer of the metadata server, or of the coordinator
METADATA_BYTES = 1_000_000
METADATA_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
# worker-network-endpoints: one ID:ID:ADDRESS for each host of the slice
ENDPOINTS = re.compile(r"[^:,\s<>]*:[^:,\s<>]*:[^,\s<>]+(,[^:,\s<>]*:[^:,\s<>]*:[^,\s<>]+)*")
TPU_ENVIRONMENT = re.compile(r"(^[A-Z][A-Z0-9_]*: .*$\s*)+", re.MULTILINE)  # lines of NAME: 'value'
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{name}"


class DistributedError(RuntimeError):
    """The processes did not find each other, or do not fit the config; the message has a remedy."""


@dataclasses.dataclass(frozen=True)
class ProcessLayout:
    """How the processes of a job find each other.

    Attributes:
      kind: alone, flags, slurm or tpu.
      why: the reason for the choice, for messages.
      coordinator: HOST:PORT of process 0; None where JAX asks the cluster.
      count: number of processes; None where JAX asks the cluster.
      index: number of this process; None where JAX asks the cluster.
      local_devices: GPUs of this process; None: JAX's rule.
    """

    kind: str
    why: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def choose(
    coordinator: str,
    count: int,
    index: int,
    environ: Mapping[str, str] = os.environ,
    tpu_workers: Callable[[], int] | None = None,
) -> ProcessLayout:
    """Choose how the processes of this job find each other.

    Args:
      coordinator: the flag; "" where it is not given.
      count: the flag; -1 where it is not given.
      index: the flag; -1 where it is not given.
      environ: environment variables.
      tpu_workers: returns the number of workers that a TPU VM's metadata names.

    Raises:
      DistributedError: where flags are incomplete or do not fit each other.
    """
    given = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "num_processes": str(count) if count >= 0 else environ.get("JAX_NUM_PROCESSES", ""),
        "process_id": str(index) if index >= 0 else environ.get("JAX_PROCESS_ID", ""),
    }
    if any(given.values()):
        return _by_flags(given)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _by_slurm(environ)
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return ProcessLayout("alone", "one process")
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if hosts:
        workers = len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)
        source = "its environment"
    else:
        workers = (tpu_workers or _metadata_workers)()
        source = "its metadata"
    if workers > 1:
        return ProcessLayout("tpu", f"a TPU pod of {workers} hosts by {source}")
    return ProcessLayout("alone", "one process")


def start(
    layout: ProcessLayout,
    *,
    stop: Callable[[], bool],
    errors: tuple[type[Exception], ...],
    deadline_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> Team:
    """Start jax.distributed as chosen, and print one line about it.

    Args:
      layout: as `choose` returned it.
      stop: whether this process was asked to stop.
      errors: types that every process raises as the leader did (see Team).
      deadline_seconds: for all processes to find each other; this process ends after it.
      heartbeat_seconds: a process that is silent for so long counts as dead.

    Raises:
      DistributedError: where JAX refuses to start.
    """
    if layout.kind == "alone":
        return Team(stop=stop, errors=errors)
    import jax
    from jax._src import distributed  # the only access to the key-value store; orbax uses it too

    method = {"flags": "deactivate", "slurm": "slurm", "tpu": None}[layout.kind]
    # JAX answers a failed start with an abort and a C++ stack. This thread prints a sentence first.
    overdue = threading.Timer(deadline_seconds, _give_up, (layout, deadline_seconds))
    overdue.daemon = True
    overdue.start()

    def initialize() -> None:
        jax.distributed.initialize(
            layout.coordinator,
            layout.count,
            layout.index,
            local_device_ids=layout.local_devices,
            cluster_detection_method=method,
            initialization_timeout=deadline_seconds + 30,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )

    try:
        _call_unless_stopped(initialize, stop)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DistributedError(f"{layout.why}: jax.distributed did not start: {reason}") from error
    finally:
        overdue.cancel()
    state: Any = distributed.global_state
    team = Team(state.process_id, state.num_processes, state.client, stop=stop, errors=errors)
    print(
        f"process {team.index} of {team.count} ({layout.why}; coordinator"
        f" {state.coordinator_address}): {jax.local_device_count()} of {jax.device_count()}"
        f" {jax.default_backend()} devices",
        flush=True,
    )
    return team


def check_mesh_spans(mesh: Any) -> None:
    """Raise DistributedError for a mesh that leaves a process without devices.

    Such a process would have no part in any step.
    """
    import jax

    used = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - used)
    if not idle:
        return
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    raise DistributedError(
        f"mesh ({', '.join(sizes) or 'one device'}) takes {mesh.size} of the"
        f" {jax.device_count()} devices and none of process {', '.join(map(str, idle))}. Set"
        " --config.mesh.fsdp=-1 (all devices that are left), or start fewer processes."
    )


def _by_flags(given: Mapping[str, str]) -> ProcessLayout:
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
    count = int(given["num_processes"])
    index = int(given["process_id"])
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
        return ProcessLayout("alone", "one process by flags")
    return ProcessLayout("flags", "by flags", given["coordinator"], count, index)


def _by_slurm(environ: Mapping[str, str]) -> ProcessLayout:
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    step = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}"
    return ProcessLayout(
        "slurm",
        f"SLURM step {step} of {tasks} tasks",
        count=tasks,
        index=int(environ["SLURM_PROCID"]),
        local_devices=_slurm_devices(environ),
    )


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the GPUs of a task that has its node, or a GPU binding, for itself.

    None leaves it to JAX, whose own rule is one GPU a task.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = len(visible.split(","))
    gpus = bound if visible else int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_alone_on_node = re.fullmatch(r"1(\(x\d+\))?", tasks_per_node) is not None
    is_bound_to_one = bound == gpus == 1
    if gpus and (is_alone_on_node or is_bound_to_one):
        return tuple(range(gpus))
    return None


def _metadata_workers() -> int:
    """Return the number of hosts of this TPU VM's slices; 1 without a TPU.

    Raises:
      DistributedError: there is a TPU, and the metadata server does not say of how many hosts. A
        host that took this for "alone" would train on its own.
    """
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not has_tpu or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return 1
    hosts = len(_metadata("worker-network-endpoints", ENDPOINTS).split(","))
    tpu_environment = _metadata("tpu-env", TPU_ENVIRONMENT)
    slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", tpu_environment)
    return hosts * int(slices[1] if slices else 1)


def _metadata(name: str, form: re.Pattern[str]) -> str:
    """Return an attribute of this VM from the metadata server, which may fail for a moment.

    Args:
      name: of the attribute.
      form: of the whole value; what does not have it comes from somebody else, such as a proxy.

    Raises:
      DistributedError: no try gave such a value.
    """
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = METADATA.format(host=host, name=name)
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches it
    for wait in (0.0, *METADATA_WAITS):
        time.sleep(wait)
        try:
            with direct.open(request, timeout=METADATA_SECONDS) as answer:
                value = answer.read(METADATA_BYTES).decode().strip()
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = str(error)
            continue
        if form.fullmatch(value):
            return value
        problem = f"it answered {value[:60]!r}"
    raise DistributedError(
        f"this host has a TPU, and its metadata do not say with how many others it works: {url}"
        f" gave no value in {len(METADATA_WAITS) + 1} tries ({problem}). Mend that; or give"
        " --coordinator, --num_processes and --process_id; or set TPU_SKIP_MDS_QUERY=1 where this"
        " host is alone."
    )


def _call_unless_stopped(function: Callable[[], None], stop: Callable[[], bool]) -> None:
    """Call a function in a thread, so that this one hears a wish to stop, which ends the process.

    Nothing has been started yet, and the other processes will miss this one in time.
    """
    errors: list[Exception] = []

    def call() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    calling = threading.Thread(target=call, name="jax.distributed", daemon=True)
    calling.start()
    while calling.is_alive():
        calling.join(POLL_SECONDS)
        if stop() and calling.is_alive():
            print("launch.train: stopped before all processes had met", file=sys.stderr, flush=True)
            os._exit(STOPPED_STATUS)
    if errors:
        raise errors[0]


def _give_up(layout: ProcessLayout, seconds: int) -> None:
    print(f"launch.train: {_describe_overdue(layout, seconds)}", file=sys.stderr, flush=True)
    os._exit(1)


def _describe_overdue(layout: ProcessLayout, seconds: int) -> str:
    """Describe why the processes have not found each other, as far as this one can tell."""
    who = f"process {layout.index} of {layout.count}" if layout.count else "this process"
    if layout.coordinator is None or layout.count is None:
        return (
            f"{who} ({layout.why}): not all processes met within {seconds} s. Are all of them"
            " started, and may the hosts reach each other?"
        )
    host, _, port = layout.coordinator.rpartition(":")
    try:
        address = (host.strip("[]"), int(port))
        socket.create_connection(address, timeout=METADATA_SECONDS).close()
    except OSError as error:
        return (
            f"{who}: no answer from the coordinator {layout.coordinator} within {seconds} s"
            f" ({error}). Start process 0 there, or correct --coordinator."
        )
    return (
        f"{who}: the coordinator {layout.coordinator} answers, but not all {layout.count} processes"
        f" came within {seconds} s. Start each of the ids 0 to {layout.count - 1} once, all with"
        " the same --num_processes."
    )
