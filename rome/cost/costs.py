"""What a compiled program computes, moves and sends on one device.

FLOPs are those of matmuls, convolutions and kernels, whose cost compilers report as nothing. Bytes
of memory traffic are an estimate: every array that an instruction outside of fusions reads or
writes in HBM, once; of an array that a fusion only slices or updates in place, the slice. Arrays
that the compiler placed in on-chip memory cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from rome.cost.hlo import Computation, Executed, Instruction, Module, executed

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Of these only the arrays behind them cost something: they name, regroup or wait.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async-start",
    "async-update",
    "async-done",
    "call-start",
    "call-done",
    "copy-done",
    "domain",
    "iota",
    "rng-get-and-update-state",
}

# -- computing
# -------------------------------------------------------------------------------------------------


def flops(one: Executed, grouped_rows: float = math.inf, score_share: float = 0.5) -> float:
    """Of one run of a matmul, a convolution or a kernel that states its cost; 0 of all else.

    A multiplication and an addition are two.

    grouped_rows: rows that a grouped matmul really has. Its kernel (gmm, tgmm) states the work of
    every row of its operand, but leaves out those that belong to none of its groups. score_share:
    of the scores of a device's queries with all keys, those that attention kernels compute on the
    busiest device; causality leaves a half where all devices have as much.
    """
    instruction = one.instruction
    if instruction.opcode == "dot":
        left = one.computation.by_name[instruction.operands[0]].shapes[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return (
            2
            * math.prod(instruction.shapes[0].dims)
            * math.prod(left.dims[int(i)] for i in contracted[1].split(",") if i)
        )
    if instruction.opcode == "convolution":
        return _convolution_flops(one)
    if instruction.opcode == "custom-call":
        stated = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
        if stated is None:
            return _attention_flops(one, score_share)
        rows = _grouped_matmul_rows(one)
        return float(stated[1]) * (min(rows, grouped_rows) / rows if rows else 1.0)
    return 0.0


# Matmuls over the scores' area: of the forward kernel, of one for dq, of one for dk and dv (which
# may make dq too, by one more).
_ATTENTION_MATMULS = {"_fwd": 2, "_dq": 3, "_dkv": 4}


def _attention_flops(one: Executed, score_share: float) -> float:
    """A splash attention kernel states no cost: a share of the matmuls over [query heads, T, S],
    from the shapes of q and k.
    """
    found = re.search(
        r"splash_\w*?(_fwd|_dq|_dkv)", f"{one.instruction.name} {one.instruction.op_name}"
    )
    arrays = [operand.shapes[0] for operand in one.computation.operands_of(one.instruction)]
    wide = [
        shape for shape in arrays if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32", "f16")
    ]
    if found is None or len(wide) < 2:
        return 0.0
    matmuls = _ATTENTION_MATMULS[found[1]] + (
        found[1] == "_dkv"
        and sum(shape.dtype == wide[0].dtype for shape in one.instruction.shapes) > 2
    )
    return 2 * math.prod(wide[0].dims) * wide[1].dims[-2] * matmuls * score_share


def _grouped_matmul_rows(one: Executed) -> int:
    """Rows of the left operand of megablox's gmm and tgmm, the first matrix among their operands; 0
    for other kernels.
    """
    if not re.search(r"\bt?gmm\b", f"{one.instruction.name} {one.instruction.op_name}"):
        return 0
    return next(
        (
            operand.shapes[0].dims[0]
            for operand in one.computation.operands_of(one.instruction)
            if len(operand.shapes[0].dims) == 2
        ),
        0,
    )


def hidden_kernels(module: Module) -> list[str]:
    """Kernels whose FLOPs are neither stated nor known here; their op_names."""
    kernels = {
        one.instruction.op_name or one.instruction.name
        for one in executed(module)
        if one.instruction.opcode == "custom-call"
        and "tpu_custom_call" in one.instruction.attributes
        and not flops(one)
    }
    return sorted(kernels)


def _convolution_flops(one: Executed) -> float:
    """2 * outputs * input features * window positions that lie on real inputs: a TPU writes batched
    matmuls as dilated convolutions.
    """
    instruction = one.instruction
    left, right = (shape.shapes[0] for shape in one.computation.operands_of(instruction)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    batch, features = (
        left.dims[labels[1].index("b")],
        right.dims[labels[2].index("i")],
    )  # the kernel's own i: already divided by groups
    outputs = instruction.shapes[0].dims[labels[3].index("f")]
    window = dict(
        re.findall(
            r"(\w+)=([\dx_\-]+)",
            (re.search(r"window=\{([^}]*)\}", instruction.attributes) or ["", ""])[1],
        )
    )
    positions = 1
    for axis in range(len(labels[1]) - 2):
        digit = str(axis)
        positions *= _valid_positions(
            left.dims[labels[1].index(digit)],
            instruction.shapes[0].dims[labels[3].index(digit)],
            int(_per_axis(window, "size", axis, "1")),
            int(_per_axis(window, "stride", axis, "1")),
            int(_per_axis(window, "pad", axis, "0_0").split("_")[0]),
            int(_per_axis(window, "lhs_dilate", axis, "1")),
            int(_per_axis(window, "rhs_dilate", axis, "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2 * batch / (int(groups[1]) if groups else 1) * outputs * features * positions


def _per_axis(window: dict[str, str], name: str, axis: int, default: str) -> str:
    return window[name].split("x")[axis] if name in window else default


def _valid_positions(
    size: int,
    out: int,
    window: int,
    stride: int,
    pad: int,
    base_dilation: int,
    window_dilation: int,
) -> int:
    """Pairs (output, window element) that meet an input and not padding or the holes of a dilated
    base.
    """
    place = np.arange(out)[:, None] * stride - pad + np.arange(window)[None, :] * window_dilation
    return int(
        ((place >= 0) & (place <= (size - 1) * base_dilation) & (place % base_dilation == 0)).sum()
    )


# -- memory
# -------------------------------------------------------------------------------------------------


def traffic(module: Module, one: Executed, grouped_rows: float = math.inf) -> float:
    """Bytes of HBM that one run reads and writes; 0 inside fusions, whose edges count.
    grouped_rows: as for `flops`.
    """
    instruction = one.instruction
    if one.fused or instruction.opcode in FREE or _is_collective(instruction):
        return 0.0
    operands = one.computation.operands_of(instruction)
    if instruction.opcode == "fusion":
        return _fusion_traffic(
            module, module.computations[instruction.called("calls")], instruction, operands
        )
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(instruction)
    if instruction.opcode == "copy-start":  # (destination, source, context)
        return sum(shape.bytes for shape in instruction.shapes[:2] if shape.space == 0)
    rows = _grouped_matmul_rows(one) if instruction.opcode == "custom-call" else 0
    if rows:
        arrays = [
            shape
            for array in (instruction, *operands)
            for shape in array.shapes
            if shape.space == 0
        ]
        return sum(
            shape.bytes * (min(rows, grouped_rows) / rows if shape.dims[:1] == (rows,) else 1.0)
            for shape in arrays
        )
    return _in_hbm(instruction) + sum(map(_in_hbm, operands))


def _in_hbm(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _fusion_traffic(
    module: Module, inner: Computation, fusion: Instruction, operands: list[Instruction]
) -> float:
    read, updated = 0.0, 0.0
    for parameter, operand in zip(inner.parameters, operands):
        if _in_hbm(operand):
            of_it, in_place = _read(module, inner, parameter, operand.bytes)
            read, updated = read + of_it, updated + in_place
    results = inner.operands_of(inner.root) if inner.root.opcode == "tuple" else []
    passing = sum(
        map(_in_hbm, (one for one in results if one.opcode == "parameter" or _is_collective(one)))
    )
    return read + max(0.0, _in_hbm(fusion) - updated - passing)


def _read(
    module: Module, computation: Computation, value: Instruction, size: float
) -> tuple[float, float]:
    """(bytes that a fused computation reads of one of its values, bytes of it that come out updated
    in place).
    """
    read, updated = 0.0, 0.0
    for user in computation.users.get(value.name, []):
        if user.opcode == "tuple" or _is_collective(user):
            continue  # on its way through: a collective that rides along in a fusion
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            read += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            read, updated = read + computation.by_name[user.operands[1]].bytes, size
        elif user.opcode == "bitcast":
            read, updated = (
                a + b for a, b in zip((read, updated), _read(module, computation, user, size))
            )
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            for parameter in (
                inner.parameters[i] for i, name in enumerate(user.operands) if name == value.name
            ):
                read, updated = (
                    a + b for a, b in zip((read, updated), _read(module, inner, parameter, size))
                )
        else:
            return size, 0.0
    return min(read, size), updated


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


def largest_traffic(
    module: Module, count: int, grouped_rows: float = math.inf
) -> list[tuple[float, str, str]]:
    """(bytes over all runs, shape of the result, what makes it), the most first."""
    found: dict[tuple[str, str], float] = {}
    for one in executed(module):
        key = (
            str(one.instruction.shapes[0]) if one.instruction.shapes else "",
            one.instruction.op_name or one.instruction.name,
        )
        found[key] = found.get(key, 0.0) + one.times * traffic(module, one, grouped_rows)
    return sorted(((size, *key) for key, size in found.items()), reverse=True)[:count]


def largest_arrays(module: Module, count: int) -> list[tuple[float, str, str]]:
    """(bytes, shape, what makes it) of the largest arrays in HBM that are not arguments, each shape
    and maker once.
    """
    found: dict[tuple[str, str], float] = {}
    for one in executed(module):
        if (
            one.fused
            or one.instruction.opcode in FREE - {"iota"}
            or one.instruction.opcode.endswith("-done")
        ):
            continue
        for shape in one.instruction.shapes:
            if shape.space == 0:
                found[str(shape), one.instruction.op_name or one.instruction.name] = shape.bytes
    return sorted(((size, shape, maker) for (shape, maker), size in found.items()), reverse=True)[
        :count
    ]


def kept_for_backward(module: Module) -> float:
    """Bytes that forward loops hand to backward loops: what a step keeps of its activations (with
    full remat, the input of each block).
    """
    kept: dict[tuple[str, int], float] = {}
    for computation in {
        one.computation.name: one.computation for one in executed(module) if not one.fused
    }.values():
        for loop in computation.instructions:
            if loop.opcode == "while" and "transpose(" in loop.op_name:
                for source, index in map(
                    functools.partial(_source, computation),
                    computation.operands_of(computation.by_name[loop.operands[0]]),
                ):
                    if source.opcode == "while" and "transpose(" not in source.op_name:
                        kept[source.name, index] = source.shapes[index].bytes
    return sum(kept.values())


def _source(computation: Computation, instruction: Instruction) -> tuple[Instruction, int]:
    """The instruction (and element of its result) whose value this is, through copies and casts of
    layout.
    """
    while (
        instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done")
        and instruction.operands
    ):
        instruction = computation.by_name[instruction.operands[0]]
    if instruction.opcode == "get-tuple-element":
        return computation.by_name[instruction.operands[0]], int(
            re.search(r"index=(\d+)", instruction.attributes)[1]
        )
    return instruction, 0


# -- sending
# -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """`payload` is the whole array that one device ends or begins with: gathered, to be scattered,
    reduced, exchanged, passed on.

    groups: device numbers, [groups, members]; for a collective-permute [pairs, 2].
    """

    kind: str
    payload: float
    groups: np.ndarray
    times: float
    op_name: str


def collectives(module: Module, devices: int) -> list[Collective]:
    """Every collective that runs; start and done are one, and so are the pieces in which one rides
    along in several fusions.
    """
    found, riding = [], set()
    for one in executed(module):
        kind = one.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", one.instruction.attributes)
        if one.fused and channel:
            if (kind, channel[1]) in riding:
                continue
            riding.add((kind, channel[1]))
        groups = replica_groups(one.instruction.attributes, devices)
        operands = one.computation.operands_of(one.instruction)
        # Rows and where they go, one of the two with room to spare; offsets are nothing beside
        # them.
        payload = (
            min(operand.bytes for operand in operands[:2])
            if kind == "ragged-all-to-all"
            else sum(operand.bytes for operand in operands)
        )
        if kind == "all-gather":
            payload *= groups.shape[1]
        elif kind == "all-reduce" and _is_scattered(one):
            kind = "reduce-scatter"
        if groups.shape[1] > 1:
            found.append(Collective(kind, payload, groups, one.times, one.instruction.op_name))
    return found


def _is_scattered(one: Executed) -> bool:
    """An all-reduce inside a fusion of which each device keeps its slice: a reduce-scatter as a TPU
    spells it.
    """
    users = one.computation.users.get(one.instruction.name, [])
    return one.fused and bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members] from any of the spellings of XLA; all devices together where
    none is given.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes)
    if pairs or listed:
        return np.array(
            [
                [int(i) for i in group.split(",")]
                for group in re.findall(r"\{([\d,]+)\}", (pairs or listed)[1])
            ],
            dtype=int,
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        attributes,
    )
    if mesh:
        names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        numbers = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(map(int, sizes)))
        return _mesh_groups(numbers.reshape([int(size) for size in sizes]), names, mesh[4])
    return np.arange(devices)[None, :]


def _mesh_groups(numbers: np.ndarray, names: tuple[str, ...], axes: str) -> np.ndarray:
    """Groups along named axes of a mesh; 'x':(m)k is the k-sized part of axis x after its first m."""
    shape, wanted = [], []
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)
    }
    whole = [name for name in re.findall(r"'([^']+)'", axes) if name not in parts]
    for name, size in zip(names, numbers.shape):
        if name in parts:
            before, part = parts[name]
            wanted.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            wanted += [len(shape)] if name in whole else []
            shape.append(size)
    members = math.prod(shape[axis] for axis in wanted)
    others = [axis for axis in range(len(shape)) if axis not in wanted]
    return numbers.reshape(shape).transpose(others + wanted).reshape(-1, members)


def _iota(dims: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
