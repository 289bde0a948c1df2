"""From compiled programs to a report: bytes, FLOPs, collectives, their time, and advice.

A step of training runs three programs (rome.train.step): `score`, once a micro-batch where the
trainer scores pi_old; `accumulate`, a micro-batch's loss and gradient, once an epoch; `apply`, once
an update. Memory is the largest of the three, each with the arrays that stay on the device without
being handed to it. FLOPs, seconds and MFU are those of all passes that a step makes over one
micro-batch; `apply` is left out, as its share falls with the number of micro-batches. Rates are
peaks and nothing waits: seconds are lower bounds and the MFU is an upper one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rome.cost import costs, hlo
from rome.cost.collectives import collectives
from rome.cost.flops import forward_flops
from rome.cost.roofline import CHIPS, GIB, Bound, Chip, Sent, sent
from rome.cost.schedule import Overlap, play
from rome.model.config import ModelConfig
from rome.train.step import Learner

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
HANDED = {  # program -> parts of the state that are its arguments
    "score": ("base", "params"),
    "accumulate": ("base", "params", "gradients"),
    "apply": ("params", "optimizer", "gradients"),
}
STAYS = {  # program -> parts of the state that stay on the device beside it
    "score": ("optimizer",),
    "accumulate": ("optimizer",),
    "apply": ("base",),
}
_LISTED_ARRAYS = 12
_LISTED_TRAFFIC = 8
_MAX_MAKER = 90  # last characters of an op's name


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program on one device. One that did not fit has only `needed`.

    Attributes:
      name: one of HANDED.
      compile_seconds: time to compile.
      needed: bytes of arguments, results outside the arguments' memory, temporaries and code.
      arguments: bytes.
      temporaries: bytes.
      kept: bytes of the temporaries that forward loops keep for backward loops.
      flops: operations.
      traffic: bytes of HBM read and written, an estimate.
      sent: collectives.
      scheduled: seconds of one run in the order of its schedule.
      overlaps: which of its collectives that order hides behind compute.
      largest: largest arrays.
      busiest: instructions with the most traffic.
      hidden_kernels: kernels whose FLOPs are not counted.
      fits: whether it compiled.
    """

    name: str
    compile_seconds: float
    needed: float
    arguments: float = 0.0
    temporaries: float = 0.0
    kept: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    sent: tuple[Sent, ...] = ()
    scheduled: float = 0.0
    overlaps: tuple[Overlap, ...] = ()
    largest: tuple[costs.Row, ...] = ()
    busiest: tuple[costs.Row, ...] = ()
    hidden_kernels: tuple[str, ...] = ()
    fits: bool = True


class _Option(NamedTuple):
    """A change that saves memory."""

    saved: float
    text: str


def measure(
    name: str,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
    mesh: Mesh,
    chip: Chip,
    grouped_rows: float,
    score_share: float,
) -> Program:
    """Measure a compiled program.

    Args:
      name: of the program.
      compiled: the executable.
      compile_seconds: time to compile it.
      mesh: that it runs on.
      chip: of the mesh's devices.
      grouped_rows: as in `costs.flops`.
      score_share: as in `costs.flops`.
    """
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if memory is None or text is None:
        raise ValueError(f"the compiler of {chip.name} reports no memory or no text of {name}")
    module = hlo.parse(text)
    temporaries = memory.temp_size_in_bytes
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + new_results
    needed += temporaries + memory.generated_code_size_in_bytes
    total_flops = 0.0
    total_traffic = 0.0
    for one in hlo.executed(module):
        total_flops += one.times * costs.flops(one, grouped_rows, score_share)
        total_traffic += one.times * costs.traffic(module, one, grouped_rows)
    schedule = play(module, mesh, chip, grouped_rows, score_share)
    return Program(
        name,
        compile_seconds,
        needed=needed,
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries,
        kept=min(costs.kept_for_backward(module), temporaries),
        flops=total_flops,
        traffic=total_traffic,
        sent=tuple(sent(collectives(module, mesh.size), mesh, chip)),
        scheduled=schedule.seconds,
        overlaps=schedule.overlaps,
        largest=tuple(costs.largest_arrays(module, _LISTED_ARRAYS)),
        busiest=tuple(costs.largest_traffic(module, _LISTED_TRAFFIC, grouped_rows)),
        hidden_kernels=tuple(costs.hidden_kernels(module)),
    )


def too_large(
    name: str, error: Exception, compile_seconds: float, state: Mapping[str, float]
) -> Program:
    """Return a program that the compiler refused for memory, with the bytes its message names.

    Any other error is raised again.

    Args:
      name: of the program.
      error: that the compiler raised.
      compile_seconds: time until then.
      state: as of `state_bytes`.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    arguments = sum(state[kind] for kind in HANDED[name])
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", text)
    found = temporaries or re.search(r"Used ([\d.]+)([KMGT]?)i?B? of", text)
    if found is None:
        raise error
    named = float(found[1]) * UNITS[found[2]]
    needed = named + arguments if temporaries else max(named, arguments)
    return Program(
        name, compile_seconds, needed, arguments, temporaries=needed - arguments, fits=False
    )


def state_bytes(learner: Learner) -> dict[str, float]:
    """Return the bytes a device of parameters, optimizer, and gradients of an update under way.

    "base" is what adapters are added to, 0 where all parameters are trained. Moments in the host's
    memory are no bytes of the device.
    """
    params = _local_bytes(learner.state.params)
    return {
        "base": _local_bytes(learner.abstract_base()),
        "params": params,
        "optimizer": _local_bytes(learner.state.opt_state),
        "gradients": params,
    }


def report(
    programs: Mapping[str, Program],
    state: Mapping[str, float],
    chip: Chip,
    *,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
    passes: Mapping[str, int],
    sequence_length: int,
) -> dict[str, Any]:
    """Return the report that `--json` writes.

    Speed is left out where one of the passes did not compile.

    Args:
      programs: name -> program.
      state: as of `state_bytes`.
      chip: of the devices.
      config: the model.
      mesh: size of each axis.
      rows: B of a micro-batch.
      length: T.
      passes: program -> how often a step runs it over each micro-batch.
      sequence_length: tokens of a sequence, of which a row packs as many as fit. The model's own
        work is attention within sequences; the kernel may compute more.
    """
    peaks = {}
    for name, program in programs.items():
        peaks[name] = program.needed + sum(state[kind] for kind in STAYS[name])
    top = max(peaks, key=lambda name: peaks[name])
    kinds = {kind: state[kind] for kind in ("base", "params", "optimizer", "gradients")}
    if "gradients" not in HANDED[top]:
        kinds["gradients"] = 0.0
    state_total = sum(kinds.values())
    kinds["activations"] = programs[top].kept
    kinds["temporaries"] = peaks[top] - state_total - programs[top].kept
    by_program = {}
    for name, program in programs.items():
        by_program[name] = {
            "peak_bytes": round(peaks[name]),
            "argument_bytes": round(program.arguments),
            "temporary_bytes": round(program.temporaries),
            "compile_seconds": round(program.compile_seconds, 1),
        }
    compiled = all(program.fits for program in programs.values())
    found: dict[str, Any] = {
        "fits": compiled and peaks[top] <= chip.usable,
        "bytes_per_device": round(peaks[top]),
        "usable_bytes": round(chip.usable),
        "peak_program": top,
        "bytes": {kind: round(size) for kind, size in kinds.items()},
        "programs": by_program,
    }
    if all(name in programs and programs[name].fits for name, times in passes.items() if times):
        tokens = rows * length / math.prod(mesh.values())
        own_flops = 3 * forward_flops(config, sequence_length) * tokens * passes["accumulate"]
        found |= _speed(programs, passes, chip, own_flops)
    found["advice"] = advice(found, chip, config, mesh, rows, length)
    return found


def advice(
    found: Mapping[str, Any],
    chip: Chip,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
) -> list[str]:
    """Return changes with what they would save, the most useful first; none if all is well.

    Args:
      found: the report so far.
      chip: of the devices.
      config: the model.
      mesh: size of each axis.
      rows: B of a micro-batch.
      length: T.
    """
    lines = [] if found["fits"] else _to_fit(found, chip, config, mesh, rows, length)
    seconds = found.get("seconds")
    if not seconds:
        return lines
    if seconds["collectives"] > max(seconds["compute"], seconds["memory"]):
        lines.append(_to_hide(found, mesh, rows))
    if seconds["memory"] > seconds["compute"] and found["largest_traffic"]:
        most = found["largest_traffic"][0]
        lines.append(
            f"HBM traffic ({seconds['memory']:.3f} s, an estimate) takes longer than compute"
            f" ({seconds['compute']:.3f} s); the most is {most['bytes'] / GIB:.0f} GiB for"
            f" {most['shape']} of {most['made_by'][-_MAX_MAKER:]}"
        )
    return lines


def find_chip(topology: str) -> Chip:
    """Return the chip of a topology such as v5p:4x4x4.

    Raises:
      ValueError: the chip is unknown.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"topology {topology!r} is of no known chip; choose one of"
            f" {', '.join(f'{chip}:SHAPE' for chip in CHIPS)}, such as v5p:4x4x4"
        )
    return CHIPS[name]


def _local_bytes(tree: Any) -> float:
    """Return the bytes a device of arrays in its own memory."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind != "pinned_host":
            shard_shape = leaf.sharding.shard_shape(leaf.shape)
            total += math.prod(shard_shape) * leaf.dtype.itemsize
    return float(total)


def _speed(
    programs: Mapping[str, Program],
    passes: Mapping[str, int],
    chip: Chip,
    model_flops: float,
) -> dict[str, Any]:
    """Return the work of all passes over one micro-batch, and the bounds of their time."""
    run = [(programs[name], times) for name, times in passes.items() if times]
    bounds = [(_bound(program, chip), times) for program, times in run]

    def total(value: Callable[[Program], float]) -> float:
        return sum(times * value(program) for program, times in run)

    scheduled = total(lambda program: program.scheduled)
    peak_seconds = model_flops / chip.device_flops
    step = programs["accumulate"]
    return {
        "passes": dict(passes),
        "flops": total(lambda program: program.flops),
        "model_flops": model_flops,
        "hbm_bytes": round(total(lambda program: program.traffic)),
        "collective_bytes": round(total(lambda program: sum(one.bytes for one in program.sent))),
        "seconds": {
            "compute": sum(times * bound.compute for bound, times in bounds),
            "memory": sum(times * bound.memory for bound, times in bounds),
            "collectives": sum(times * bound.collectives for bound, times in bounds),
            "scheduled": scheduled,
        },
        "roofline_mfu": peak_seconds / sum(times * bound.overlapped for bound, times in bounds),
        "roofline_mfu_serial": peak_seconds / sum(times * bound.serial for bound, times in bounds),
        "roofline_mfu_scheduled": peak_seconds / scheduled if scheduled else 0.0,
        "collectives": [dataclasses.asdict(one) for one in step.sent],
        "overlap": _overlap(run),
        "largest_arrays": [_describe(row) for row in step.largest],
        "largest_traffic": [_describe(row) for row in step.busiest],
        "kernels_not_counted": list(step.hidden_kernels),
    }


def _overlap(run: Sequence[tuple[Program, int]]) -> list[dict[str, Any]]:
    """Return for each kind and axes the seconds of collectives, and the share that is hidden.

    Over all passes; the longest waits first.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    for program, times in run:
        for one in program.overlaps:
            total = totals.setdefault((one.kind, one.axes), [0.0, 0.0])
            total[0] += times * one.seconds
            total[1] += times * one.waited
    rows = []
    for (kind, axes), (seconds, waited) in totals.items():
        hidden = 1 - waited / seconds if seconds else 1.0
        rows.append({"kind": kind, "axes": axes, "seconds": seconds, "hidden_share": hidden})
    return sorted(rows, key=lambda row: -row["seconds"] * (1 - row["hidden_share"]))


def _bound(program: Program, chip: Chip) -> Bound:
    return Bound(
        compute=program.flops / chip.device_flops,
        memory=program.traffic / chip.device_hbm,
        collectives=sum(one.seconds for one in program.sent),
    )


def _describe(row: costs.Row) -> dict[str, Any]:
    size, shape, maker = row
    return {"bytes": round(size), "shape": shape, "made_by": maker}


def _to_fit(
    found: Mapping[str, Any],
    chip: Chip,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
) -> list[str]:
    """Return options that save memory: those that are enough alone first, then by bytes saved."""
    kinds = found["bytes"]
    excess = found["bytes_per_device"] - chip.usable
    options = _options(kinds, chip, config, mesh, rows, length)

    def rank(option: _Option) -> tuple[bool, float]:
        insufficient = option.saved < excess
        return insufficient, -option.saved if insufficient else 0

    options.sort(key=rank)
    largest = max(kinds, key=lambda kind: kinds[kind])
    lines = [f"{_gib(excess)} too much; the largest part is {largest} with {_gib(kinds[largest])}."]
    for saved, text in options:
        lines.append(f"{text}, enough alone" if saved >= excess else text)
    return lines


def _options(
    kinds: Mapping[str, float],
    chip: Chip,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
) -> list[_Option]:
    state = kinds["base"] + kinds["params"] + kinds["optimizer"] + kinds["gradients"]
    passing = kinds["activations"] + kinds["temporaries"]
    rows_here = rows // math.prod(mesh[axis] for axis in ("replica", "fsdp", "expert"))
    replica = mesh["replica"]
    options = []
    if rows_here > 1:
        saved = passing * (1 - 1 / rows_here)
        text = (
            f"--config.rows_per_microbatch={rows // rows_here}: one row a device instead of"
            f" {rows_here}, about {_gib(saved)} less of activations and temporaries"
        )
        options.append(_Option(saved, text))
    if replica > 1:
        saved = state * (1 - 1 / replica)
        text = (
            f"--config.mesh.replica=1 --config.mesh.fsdp={mesh['fsdp'] * replica}: no whole"
            f" copies, {_gib(saved)} less state"
        )
        options.append(_Option(saved, text))
    if config.remat == "none":
        inputs = config.num_layers * length * rows_here * config.hidden_size * 2
        text = f"--config.learner.remat=full: keeps one input a block, {_gib(inputs)} in all"
        options.append(_Option(kinds["activations"], text))
    if rows_here <= 1:
        half = _gib(passing / 2)
        text = (
            f"a sequence axis: --config.mesh.sequence={2 * mesh['sequence']} with half the"
            f" fsdp or expert halves activations and temporaries, about {half} less,"
            f" but each half of those axes doubles its share of the state ({_gib(state)}"
            " now)"
        )
        options.append(_Option(passing / 2, text))
        text = f"--config.row_length={length // 2}: about {half} less"
        options.append(_Option(passing / 2, text))
    room = max(chip.usable - passing, chip.usable / 2)  # activations may have to shrink too
    if state > room / 2:
        devices = math.prod(mesh.values())
        factor = 2 ** math.ceil(math.log2(max(state / room, 2.0)))
        text = (
            f"{factor} times the devices ({devices * factor}) with"
            f" --config.mesh.fsdp={mesh['fsdp'] * factor}: {_gib(state)} of state become"
            f" {_gib(state / factor)}"
        )
        options.append(_Option(state * (1 - 1 / factor), text))
    return options


def _to_hide(found: Mapping[str, Any], mesh: Mapping[str, int], rows: int) -> str:
    longest = found["collectives"][0]
    seconds = found["seconds"]
    text = (
        f"collectives ({seconds['collectives']:.3f} s) take longer than compute"
        f" ({seconds['compute']:.3f} s); the longest is {longest['kind']} over {longest['axes']},"
        f" {longest['seconds']:.3f} s in {longest['runs']:.0f} runs, from"
        f" {longest['largest'][-_MAX_MAKER:]}."
    )
    moves_weights = longest["kind"] in ("all-gather", "reduce-scatter", "all-reduce")
    if moves_weights and "fsdp" in longest["axes"]:
        more = math.ceil(seconds["collectives"] / max(seconds["compute"], seconds["memory"]))
        text += (
            " Weights are gathered once a micro-batch whatever its size:"
            f" --config.rows_per_microbatch={rows * more} does {more} times the work for them,"
            f" memory permitting; or a smaller fsdp ({mesh['fsdp']} now)."
        )
    return text


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
