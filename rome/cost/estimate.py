"""From compiled programs to a report: bytes a device by kind, FLOPs, collectives, the time they
bound and what to change.

A step of training runs three programs (rome.train.step): `score`, once a micro-batch where the
trainer scores pi_old; `accumulate`, a micro-batch's loss and gradient, which is where the time
goes; `apply`, once an update. Memory is the largest of the three, each with what stays on the
device meanwhile without being handed to it. FLOPs, collectives and MFU are those of `accumulate`,
for one micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rome.cost import costs, hlo
from rome.cost.flops import forward_flops
from rome.cost.roofline import CHIPS, GIB, Bound, Chip, Sent, sent
from rome.model.config import ModelConfig
from rome.train.state import TrainState

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
HANDED = {
    "score": ("params",),
    "accumulate": ("params", "gradients"),
    "apply": ("params", "optimizer", "gradients"),
}  # program -> what it is given
STAYS = {
    "score": ("optimizer",),
    "accumulate": ("optimizer",),
    "apply": (),
}  # program -> what lies beside it


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program on one device: bytes, FLOPs, seconds to compile.

    One that did not fit has only `needed`.
    """

    name: str
    compile_seconds: float
    needed: float  # arguments, results that are not arguments' own memory, temporaries, code
    arguments: float = 0.0
    temporaries: float = 0.0
    kept: float = 0.0  # of the temporaries, what forward loops keep for backward loops
    flops: float = 0.0
    traffic: float = 0.0
    sent: tuple[Sent, ...] = ()
    largest: tuple[tuple[float, str, str], ...] = ()
    busiest: tuple[tuple[float, str, str], ...] = ()  # of the traffic
    hidden_kernels: tuple[str, ...] = ()
    fits: bool = True


def measure(
    name: str,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
    mesh: Mesh,
    chip: Chip,
    grouped_rows: float,
    score_share: float,
) -> Program:
    """grouped_rows: those that one device's grouped matmul has at a time where every expert gets
    the same share. score_share: as in `costs.flops`.
    """
    memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    temporaries = memory.temp_size_in_bytes
    runs = list(hlo.executed(module))
    return Program(
        name,
        compile_seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries,
        kept=min(costs.kept_for_backward(module), temporaries),
        needed=(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + temporaries
            + memory.generated_code_size_in_bytes
        ),
        flops=sum(one.times * costs.flops(one, grouped_rows, score_share) for one in runs),
        traffic=sum(one.times * costs.traffic(module, one, grouped_rows) for one in runs),
        sent=tuple(sent(costs.collectives(module, mesh.size), mesh, chip)),
        largest=tuple(costs.largest_arrays(module, 12)),
        busiest=tuple(costs.largest_traffic(module, 8, grouped_rows)),
        hidden_kernels=tuple(costs.hidden_kernels(module)),
    )


def too_large(
    name: str, error: Exception, compile_seconds: float, state: Mapping[str, float]
) -> Program:
    """The program that a compiler refused for memory, with what it would need as its message says.

    Any other error is raised again.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    arguments = sum(state[kind] for kind in HANDED[name])
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", text)
    used = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of", text)
    found = temporaries or used
    if found is None:
        raise error
    bytes_ = float(found[1]) * UNITS[found[2]]
    needed = bytes_ + arguments if temporaries else max(bytes_, arguments)
    return Program(
        name, compile_seconds, needed, arguments, temporaries=needed - arguments, fits=False
    )


def state_bytes(state: TrainState) -> dict[str, float]:
    """Bytes a device of what training holds between programs: parameters, optimizer, the gradients
    of an update under way.

    Moments in the host's memory are no bytes of the device.
    """
    here = lambda tree: [
        leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host"
    ]
    local = lambda tree: float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in here(tree)
        )
    )
    return {
        "params": local(state.params),
        "optimizer": local(state.opt_state),
        "gradients": local(state.params),
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
) -> dict[str, Any]:
    """The figures as `--json` writes them.

    Those of `accumulate` are left out where it did not compile.
    """
    peaks = {
        name: program.needed + sum(state[kind] for kind in STAYS[name])
        for name, program in programs.items()
    }
    top = max(peaks, key=peaks.get)
    kinds = {kind: state[kind] for kind in ("params", "optimizer", "gradients")}
    if "gradients" not in HANDED[top]:
        kinds["gradients"] = 0.0
    kept = programs[top].kept
    fits = all(program.fits for program in programs.values()) and peaks[top] <= chip.usable
    found = {
        "fits": fits,
        "bytes_per_device": round(peaks[top]),
        "usable_bytes": round(chip.usable),
        "peak_program": top,
        "bytes": {
            name: round(size)
            for name, size in (
                kinds
                | {
                    "activations": kept,
                    "temporaries": peaks[top] - sum(kinds.values()) - kept,
                }
            ).items()
        },
        "programs": {
            name: {
                "peak_bytes": round(peaks[name]),
                "argument_bytes": round(one.arguments),
                "temporary_bytes": round(one.temporaries),
                "compile_seconds": round(one.compile_seconds, 1),
            }
            for name, one in programs.items()
        },
    }
    step = programs.get("accumulate")
    if step is not None and step.fits:
        found |= _speed(step, chip, config, math.prod(mesh.values()), rows * length, length)
    found["advice"] = advice(found, chip, config, mesh, rows, length)
    return found


def _speed(
    step: Program, chip: Chip, config: ModelConfig, devices: int, tokens: int, length: int
) -> dict[str, Any]:
    bound = Bound(
        compute=step.flops / chip.device_flops,
        memory=step.traffic / chip.device_hbm,
        collectives=sum(one.seconds for one in step.sent),
        model_flops=3 * forward_flops(config, length) * tokens / devices,
        peak_flops=chip.device_flops,
    )
    return {
        "flops": step.flops,
        "model_flops": bound.model_flops,
        "hbm_bytes": round(step.traffic),
        "collective_bytes": round(sum(one.bytes for one in step.sent)),
        "seconds": {
            "compute": bound.compute,
            "memory": bound.memory,
            "collectives": bound.collectives,
        },
        "roofline_mfu": bound.overlapped,
        "roofline_mfu_serial": bound.serial,
        "collectives": [dataclasses.asdict(one) for one in step.sent],
        "largest_arrays": [
            {"bytes": round(size), "shape": shape, "made_by": maker}
            for size, shape, maker in step.largest
        ],
        "largest_traffic": [
            {"bytes": round(size), "shape": shape, "made_by": maker}
            for size, shape, maker in step.busiest
        ],
        "kernels_not_counted": list(step.hidden_kernels),
    }


def advice(
    found: Mapping[str, Any],
    chip: Chip,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
) -> list[str]:
    """What to change, with what it would save, the most useful first; empty where all is well."""
    lines = [] if found["fits"] else _to_fit(found, chip, config, mesh, rows, length)
    seconds = found.get("seconds")
    if seconds and seconds["collectives"] > max(seconds["compute"], seconds["memory"]):
        lines.append(_to_hide(found, mesh, rows))
    if seconds and seconds["memory"] > seconds["compute"] and found["largest_traffic"]:
        most = found["largest_traffic"][0]
        lines.append(
            f"HBM traffic ({seconds['memory']:.3f} s, an estimate) takes longer than compute"
            f" ({seconds['compute']:.3f} s); the most is {most['bytes'] / GIB:.0f} GiB for"
            f" {most['shape']} of {most['made_by'][-90:]}"
        )
    return lines


def _to_fit(
    found: Mapping[str, Any],
    chip: Chip,
    config: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
) -> list[str]:
    kinds = found["bytes"]
    state = kinds["params"] + kinds["optimizer"] + kinds["gradients"]
    passing = kinds["activations"] + kinds["temporaries"]
    excess = found["bytes_per_device"] - chip.usable
    rows_here = rows // math.prod(mesh[axis] for axis in ("replica", "fsdp", "expert"))
    replica, devices = mesh["replica"], math.prod(mesh.values())
    gib = lambda size: f"{size / GIB:.1f} GiB"
    options: list[tuple[float, str]] = []  # (bytes saved, what to do)
    if rows_here > 1:
        saved = passing * (1 - 1 / rows_here)
        options.append(
            (
                saved,
                (
                    f"--config.rows_per_microbatch={rows // rows_here}: one row a device instead of"
                    f" {rows_here}, about {gib(saved)} less of what passes through"
                ),
            )
        )
    if replica > 1:
        saved = state * (1 - 1 / replica)
        options.append(
            (
                saved,
                (
                    f"--config.mesh.replica=1 --config.mesh.fsdp={mesh['fsdp'] * replica}: no whole"
                    f" copies, {gib(saved)} less state"
                ),
            )
        )
    if config.remat == "none":
        options.append(
            (
                kinds["activations"],
                (
                    "remat full: keeps one input a block,"
                    f" {config.num_layers * length * rows_here * config.hidden_size * 2 / GIB:.1f}"
                    " GiB in all"
                ),
            )
        )
    if rows_here <= 1:
        options.append(
            (
                passing / 2,
                (
                    f"a sequence axis: --config.mesh.sequence={2 * mesh['sequence']} with half the"
                    f" fsdp or expert halves what passes through, about {gib(passing / 2)} less,"
                    f" but each half of those axes doubles its share of the state ({gib(state)}"
                    " now)"
                ),
            )
        )
        options.append(
            (passing / 2, f"--config.row_length={length // 2}: about {gib(passing / 2)} less")
        )
    room = max(chip.usable - passing, chip.usable / 2)  # what passes through may have to shrink too
    if state > room / 2:
        factor = 2 ** math.ceil(math.log2(max(state / room, 2.0)))
        options.append(
            (
                state * (1 - 1 / factor),
                (
                    f"{factor} times the devices ({devices * factor}) with"
                    f" --config.mesh.fsdp={mesh['fsdp'] * factor}: {gib(state)} of state become"
                    f" {gib(state / factor)}"
                ),
            )
        )
    options.sort(key=lambda option: (option[0] < excess, -option[0] if option[0] < excess else 0))
    enough = [text + (", enough alone" if saved >= excess else "") for saved, text in options]
    largest = max(kinds, key=kinds.get)
    return [
        f"{gib(excess)} too much; the largest part is {largest} with {gib(kinds[largest])}.",
        *enough,
    ]


def _to_hide(found: Mapping[str, Any], mesh: Mapping[str, int], rows: int) -> str:
    longest = found["collectives"][0]
    seconds = found["seconds"]
    more = math.ceil(seconds["collectives"] / max(seconds["compute"], seconds["memory"]))
    text = (
        f"collectives ({seconds['collectives']:.3f} s) take longer than compute"
        f" ({seconds['compute']:.3f} s); the longest is {longest['kind']} over {longest['axes']},"
        f" {longest['seconds']:.3f} s in {longest['runs']:.0f} runs, from"
        f" {longest['largest'][-90:]}."
    )
    if (
        longest["kind"] in ("all-gather", "reduce-scatter", "all-reduce")
        and "fsdp" in longest["axes"]
    ):
        text += (
            " Weights are gathered once a micro-batch whatever its size:"
            f" --config.rows_per_microbatch={rows * more} does {more} times the work for them,"
            f" memory permitting; or a smaller fsdp ({mesh['fsdp']} now)."
        )
    return text


def find_chip(topology: str) -> Chip:
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"topology {topology!r} is of no known chip; choose one of"
            f" {', '.join(f'{chip}:SHAPE' for chip in CHIPS)}, such as v5p:4x4x4"
        )
    return CHIPS[name]
