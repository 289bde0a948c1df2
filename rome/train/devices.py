"""Divides the accelerators of this machine between the trainer and the embedded engines.

Engines beside the trainer are processes with JAX. Undivided, the second one would ask for memory or
chips that the first one holds: on a GPU it fails for want of memory, and libtpu gives a TPU chip to
one process only. An engine inside the trainer is a thread of its process: both have the device in
turn, and each has all of its memory. `divide` decides, and says what it decided; `claim_devices`
makes it so for this process, before JAX is imported; `engines_division` tells what the engines'
processes are started with.

Not run on machines with several TPU chips; their variables are those of JAX's own tests.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal

from rome.train.xla_flags import environment_of, find_chips

EngineDevice = Literal["auto", "cpu", "share", "inside"]
Platform = Literal["cpu", "gpu", "tpu"]
Variables = Mapping[str, str | None]  # of an environment; None removes one
# Shares of a GPU's memory, where trainer and engines have it together. The rest is for CUDA's
# contexts, NCCL and cuBLAS, which lie outside of JAX's pool.
TRAINER_SHARE = 0.55
ENGINES_SHARE = 0.35
ENGINE_ALONE = 0.9  # of a GPU that an engine has for itself
LEAST_SHARE = 0.05  # less holds no model worth its start
# JAX reads either; both together are an error.
FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
# How many chips of a TPU host one process can have, and how they lie.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
ON_CPU = {"JAX_PLATFORMS": "cpu"}
BACKENDS = {  # any of these packages has the backend of the platform
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "tpu": ("libtpu",),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The accelerators that this process may use.

    Attributes:
      platform: what JAX will run on.
      chips: their names in CUDA_VISIBLE_DEVICES or TPU_VISIBLE_CHIPS; none on a CPU.
      kind: of chip, as `rome.train.xla_flags` names it; None on a CPU.
    """

    platform: Platform
    chips: tuple[str, ...] = ()
    kind: str | None = None


@dataclasses.dataclass(frozen=True)
class Division:
    """Who has which devices.

    Attributes:
      trainer: variables to set in the trainer's process.
      engines: for each embedded engine, variables to set in its process; None removes one.
      trainer_platform: what the trainer runs on.
      engine_platform: what the engines run on.
      says: what was decided and why, in one line.
      is_inside: whether the one engine is a thread of the trainer's process.
    """

    trainer: Mapping[str, str]
    engines: Sequence[Variables]
    trainer_platform: Platform
    engine_platform: Platform
    says: str
    is_inside: bool = False


def divide(
    machine: Machine,
    device: EngineDevice,
    num_engines: int,
    mesh_size: int,
    *,
    is_alone: bool = True,
    given: Mapping[str, str] | None = None,
) -> Division:
    """Decide which devices the trainer and each embedded engine get.

    Args:
      machine: the accelerators.
      device: config.engine.device. "auto": an engine gets a chip of its own where the trainer's
        mesh leaves one; otherwise one engine runs inside the trainer, and several share its GPU, or
        run on the CPU of a TPU's host. "cpu": the engines run on the CPU. "share": they share the
        trainer's GPUs in any case. "inside": the engine is a thread of the trainer in any case.
      num_engines: embedded engines; 0 where engines are named by URL, or none are needed.
      mesh_size: devices of the trainer's mesh; -1: all that are left.
      is_alone: whether this process is the only one of its job. The mesh of several processes
        covers the chips of all of them, so none is to spare.
      given: the user's environment; its memory fraction and compiler flags are kept.

    Raises:
      ValueError: the devices cannot be divided so; names the remedy.
    """
    given = given or {}
    platform = machine.platform
    flags = environment_of(machine.kind, given)
    if device == "share" and platform == "tpu":
        raise ValueError(
            "config.engine.device=share: libtpu gives a TPU chip to one process, so it cannot be"
            " shared. Set it to auto or cpu"
        )
    if num_engines == 0:
        return Division(flags, (), platform, platform, f"the trainer has {_count(machine)}")
    if device == "inside":
        return _inside(machine, num_engines, flags, is_alone)
    if platform == "cpu":
        says = "trainer and embedded engine run on the CPU, each in a process of its own"
        return Division(flags, ({},) * num_engines, "cpu", "cpu", says)
    num_trainer = _trainer_chips(machine, num_engines, mesh_size) if is_alone else 0
    if device == "auto" and num_trainer:
        return _own_chips(machine, num_engines, num_trainer, flags)
    if device == "auto" and is_alone and num_engines == 1:
        return _inside(machine, num_engines, flags, is_alone)
    is_shared = device == "share" or (device == "auto" and is_alone)
    if platform == "gpu" and is_shared:
        return _shared_chips(machine, num_engines, flags, given)
    if device == "cpu":
        why = "as config.engine.device=cpu says"
    elif not is_alone:
        why = f"which is slow: trainers of several processes hold the {platform.upper()}s"
        if platform == "gpu":
            why += ". config.engine.device=share shares the leader's"
    else:
        why = (
            "which is slow: libtpu gives a TPU chip to one process, and the trainer holds it."
            " config.engine.count=1 runs one engine inside the trainer"
        )
    says = f"the trainer has {_count(machine)}; the embedded engine runs on the CPU, {why}"
    return Division(flags, (ON_CPU,) * num_engines, platform, "cpu", says)


def _inside(
    machine: Machine, num_engines: int, flags: Mapping[str, str], is_alone: bool
) -> Division:
    """Give everything to the trainer, with the engine as a thread of its process.

    On one device that is all that there is, it beats two processes: they would work in turn anyway,
    and each part has all of the memory in its turn, instead of a share for good.
    """
    _require_one(num_engines, is_alone)
    place = ", on the mesh's expert and tensor axes" if len(machine.chips) > 1 else ""
    says = (
        f"the trainer has {_count(machine)}; the engine runs inside it{place}, in turn with the"
        " updates: each has all of the memory meanwhile"
    )
    return Division(flags, (), machine.platform, machine.platform, says, is_inside=True)


def _require_one(num_engines: int, is_alone: bool) -> None:
    """Raise ValueError where an engine inside the trainer cannot be what is asked for."""
    if num_engines > 1:
        raise ValueError(
            f"config.engine.device=inside runs one engine, and config.engine.count={num_engines}."
            " Set it to 1"
        )
    if not is_alone:
        raise ValueError(
            "config.engine.device=inside needs a trainer of one process. Name servers by"
            " config.engine.urls, or set it to auto"
        )


def _trainer_chips(machine: Machine, num_engines: int, mesh_size: int) -> int:
    """Return how many chips the trainer gets if each engine has one of its own; 0: too few."""
    spare = len(machine.chips) - num_engines
    if mesh_size == -1:  # a power of two: hardly a model can be cut into three or seven
        mesh_size = 1 << max(spare.bit_length() - 1, 0)
        if machine.platform == "tpu":
            mesh_size = min(mesh_size, max(TPU_BOUNDS))
    is_possible = machine.platform == "gpu" or mesh_size in TPU_BOUNDS
    return mesh_size if is_possible and 0 < mesh_size <= spare else 0


def _own_chips(
    machine: Machine, num_engines: int, num_trainer: int, flags: Mapping[str, str]
) -> Division:
    """Give the trainer the first chips, and each engine one of the next."""
    first = machine.chips[:num_trainer]
    own = machine.chips[num_trainer : num_trainer + num_engines]
    bound = _fraction(ENGINE_ALONE) if machine.platform == "gpu" else {}
    engines = [{**_visible(machine, [chip]), **bound} for chip in own]
    name = machine.platform.upper()
    says = (
        f"the trainer has {name} {', '.join(first)}, the embedded engine {name} {', '.join(own)}:"
        " the mesh leaves it a chip of its own"
    )
    trainer = {**flags, **_visible(machine, first)}
    return Division(trainer, engines, machine.platform, machine.platform, says)


def _shared_chips(
    machine: Machine, num_engines: int, flags: Mapping[str, str], given: Mapping[str, str]
) -> Division:
    """Divide the memory of the trainer's GPUs, with the engines in turn on each of them."""
    chosen = next((name for name in FRACTIONS if given.get(name)), None)
    trainer = dict(flags)
    trainer_share = TRAINER_SHARE
    if chosen is None:
        trainer[FRACTIONS[0]] = str(TRAINER_SHARE)
    else:
        trainer_share = float(given[chosen])
    engines_on_first = math.ceil(num_engines / len(machine.chips))
    left = TRAINER_SHARE + ENGINES_SHARE - trainer_share
    engine_share = round(min(ENGINES_SHARE, left) / engines_on_first, 3)
    if engine_share < LEAST_SHARE:
        raise ValueError(
            f"{chosen or 'config.engine.count'}={given[chosen] if chosen else num_engines} leaves"
            f" an embedded engine {max(engine_share, 0.0):.0%} of a GPU. Lower it, or set"
            " config.engine.device=cpu"
        )
    engines = []
    for number in range(num_engines):
        chip = machine.chips[number % len(machine.chips)]
        engines.append({**_visible(machine, [chip]), **_fraction(engine_share)})
    says = (
        f"trainer and embedded engine share the GPU, as two processes: {trainer_share:.0%} and"
        f" {engine_share:.0%} of its memory"
    )
    return Division(trainer, engines, "gpu", "gpu", says)


def _visible(machine: Machine, chips: Sequence[str]) -> dict[str, str]:
    """Return the variables that show a process these chips only."""
    if machine.platform == "gpu":
        return {"CUDA_VISIBLE_DEVICES": ",".join(chips)}
    return {
        "TPU_VISIBLE_CHIPS": ",".join(chips),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _fraction(share: float) -> dict[str, str | None]:
    """Return the variables that bound a process to this share of its GPU's memory."""
    return {FRACTIONS[0]: str(share), FRACTIONS[1]: None}


def _count(machine: Machine) -> str:
    if machine.platform == "cpu":
        return "the CPU"
    count = len(machine.chips)
    name = machine.platform.upper()
    return f"the {name}" if count == 1 else f"all {count} {name}s"


# -- this process
# -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Claim:
    """What `claim_devices` has set in this process, and what the variables were before."""

    division: Division | None = None
    before: Variables = dataclasses.field(default_factory=dict)


_claim = _Claim()


def claim_devices(
    config: Mapping[str, Any],
    is_alone: bool,
    environ: MutableMapping[str, str] = os.environ,
    machine: Machine | None = None,
) -> Division:
    """Divide this machine's devices, and set the trainer's variables before JAX is imported.

    Args:
      config: of the experiment, not yet checked; `engine` and `mesh` are read.
      is_alone: whether this process is the only one of its job.
      environ: of this process.
      machine: None looks for it.

    Raises:
      ValueError: the devices cannot be divided as the config says.
    """
    division = divide_for(config, machine or find_machine(environ), is_alone, environ)
    _claim.division = division
    _claim.before = {name: environ.get(name) for name in division.trainer}
    environ.update(division.trainer)
    return division


def divide_for(
    config: Mapping[str, Any], machine: Machine, is_alone: bool, given: Mapping[str, str]
) -> Division:
    """Return the division that a config asks for on a machine; see `divide`."""
    engine = config.get("engine")
    has_engines = engine is not None and not engine["urls"]
    sizes = list(dict(config.get("mesh") or {}).values())
    return divide(
        machine,
        engine["device"] if engine is not None else "auto",
        engine["count"] if engine is not None and has_engines else 0,
        -1 if -1 in sizes else math.prod(sizes),
        is_alone=is_alone,
        given=given,
    )


def engines_division(
    backend: str, device: EngineDevice, num_engines: int, is_alone: bool = True
) -> Division:
    """Return the division that this process's engines start under, changes to its environment.

    Nothing that was set for the trainer reaches an engine. Where this process runs on an
    accelerator that it did not divide (it never called `claim_devices`, or the chip was not found),
    it may hold all of it, so engines beside it run on the CPU.

    Args:
      backend: what JAX runs on in this process.
      device: config.engine.device.
      num_engines: that are started.
      is_alone: whether this process is the only one of its job.

    Raises:
      ValueError: the engine cannot run inside this process, as the config says.
    """
    claimed = _claim.division
    platform: Platform = "cpu" if backend == "cpu" else "gpu" if backend == "gpu" else "tpu"
    if device == "inside" and num_engines and claimed is None:
        _require_one(num_engines, is_alone)
        says = "the engine runs inside the trainer, in turn with the updates"
        return Division({}, (), platform, platform, says, is_inside=True)
    if backend != "cpu" and (claimed is None or claimed.trainer_platform == "cpu"):
        says = f"the embedded engine runs on the CPU, since the {backend} was not divided"
        return Division({}, (ON_CPU,) * num_engines, platform, "cpu", says)
    if claimed is None:
        says = "trainer and embedded engine run on the CPU, each in a process of its own"
        return Division({}, ({},) * num_engines, "cpu", "cpu", says)
    restored = [{**_claim.before, **variables} for variables in claimed.engines]
    return dataclasses.replace(claimed, engines=restored)


def find_machine(
    environ: Mapping[str, str] = os.environ,
    *,
    devices: str = "/sys/bus/pci/devices",
    nodes: str = "/dev",
    has_backend: Mapping[str, bool] | None = None,
) -> Machine:
    """Look for accelerators without importing JAX, which would fix its environment.

    Args:
      environ: JAX_PLATFORMS, CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS are heeded.
      devices: the PCI bus.
      nodes: device files.
      has_backend: by platform, whether JAX can use it; None looks for the packages.
    """
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return Machine("cpu")
    kind, count = find_chips(devices, nodes)
    if kind is None:
        return Machine("cpu")
    platform: Platform = "gpu" if kind == "gpu" else "tpu"
    if has_backend is None:
        found = any(importlib.util.find_spec(name) for name in BACKENDS[platform])
    else:
        found = has_backend[platform]
    variable = "CUDA_VISIBLE_DEVICES" if platform == "gpu" else "TPU_VISIBLE_CHIPS"
    chips = tuple(map(str, range(count)))
    if variable in environ:
        chips = tuple(name.strip() for name in environ[variable].split(",") if name.strip())
    if not found or not chips or chips[0] == "-1":
        return Machine("cpu")
    return Machine(platform, chips, kind)
