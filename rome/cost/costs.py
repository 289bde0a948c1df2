"""FLOPs and memory traffic of a compiled program on one device.

FLOPs are those of matmuls, convolutions and kernels; compilers report no cost for kernels. Bytes of
memory traffic are an estimate: every array that an instruction outside of fusions reads or writes
in HBM, once; of an array that a fusion only slices or updates in place, the slice. Arrays that the
compiler placed in on-chip memory cost nothing. `rome.cost.collectives` has the bytes that are sent.
"""

from __future__ import annotations

import math
import re

import numpy as np

from rome.cost.collectives import is_collective
from rome.cost.hlo import Computation, Executed, Instruction, Module, Shape, executed

# Instructions that only name, regroup or wait; their arrays are counted where they are made.
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

Row = tuple[float, str, str]  # bytes, shape, name of the operation that makes the array

# -- computing -------------------------------------------------------------------------------------

# Matmuls over the scores' area: of the forward kernel, of one for dq, of one for dk and dv (which
# may make dq too, by one more).
_ATTENTION_MATMULS = {"_fwd": 2, "_dq": 3, "_dkv": 4}


def flops(one: Executed, grouped_rows: float = math.inf, score_share: float = 0.5) -> float:
    """Return the operations of one run of a matmul, a convolution or a kernel; 0 of all else.

    A multiplication and an addition are two.

    Args:
      one: the instruction.
      grouped_rows: rows of the tiles that a grouped matmul visits. Its kernel (gmm, tgmm) states
        the work of every row of its operand once; it leaves out tiles that belong to none of its
        groups, and computes a tile once for each group that has rows in it.
      score_share: share of the scores of a device's queries with all keys that attention kernels
        compute on the busiest device; causality leaves a half where all devices have as much.
    """
    instruction = one.instruction
    if instruction.opcode == "dot":
        left = one.computation.by_name[instruction.operands[0]].shapes[0]
        contracted = _search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis]
        outputs = math.prod(instruction.shapes[0].dims)
        return 2 * outputs * math.prod(left.dims[axis] for axis in axes)
    if instruction.opcode == "convolution":
        return _convolution_flops(one)
    if instruction.opcode != "custom-call":
        return 0.0
    stated = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
    rows = _grouped_matmul_rows(one)
    if stated is None and rows:
        return _grouped_matmul_flops(one, min(rows, grouped_rows))
    if stated is None:
        return _attention_flops(one, score_share)
    visited_share = grouped_rows / rows if rows and math.isfinite(grouped_rows) else 1.0
    return float(stated[1]) * visited_share


def hidden_kernels(module: Module) -> list[str]:
    """Return the names of kernels whose FLOPs are neither stated nor known here."""
    kernels = set()
    for one in executed(module):
        is_kernel = one.instruction.opcode == "custom-call" and re.search(
            "tpu_custom_call|mosaic_gpu", one.instruction.attributes
        )
        if is_kernel and not flops(one):
            # tokamax writes its kernel's class into the name, behind quotes
            named = re.search(r"\.(Pallas\w+)", one.instruction.attributes)
            kernels.add(named[1] if named else one.instruction.label)
    return sorted(kernels)


def _attention_flops(one: Executed, score_share: float) -> float:
    """Return the operations of a splash attention kernel, which states no cost.

    A share of the matmuls over [query heads, T, S], from the shapes of q and k.
    """
    instruction = one.instruction
    names = f"{instruction.name} {instruction.op_name}"
    found = re.search(r"splash_\w*?(_fwd|_dq|_dkv)", names)
    wide = []
    for operand in one.computation.operands_of(instruction):
        shape = operand.shapes[0]
        if len(shape.dims) >= 3 and _is_float(shape):
            wide.append(shape)
    if found is None or len(wide) < 2:
        return 0.0
    q, k = wide[:2]
    matmuls = _ATTENTION_MATMULS[found[1]]
    results = [shape for shape in instruction.shapes if shape.dtype == q.dtype]
    if found[1] == "_dkv" and len(results) > 2:  # dq is made too
        matmuls += 1
    return 2 * math.prod(q.dims) * k.dims[-2] * matmuls * score_share


def _is_float(shape: Shape) -> bool:
    return shape.dtype in ("bf16", "f32", "f16")


def _grouped_matmul_rows(one: Executed) -> int:
    """Return the rows of the left operand of a grouped matmul; 0 for other kernels.

    It is the first matrix among the operands of megablox's gmm and tgmm, and of tokamax's.
    """
    names = f"{one.instruction.name} {one.instruction.op_name}"
    is_tokamax = re.search(r"\.PallasMosaicGpuRaggedDot\b", one.instruction.attributes)
    if not is_tokamax and not re.search(r"\bt?gmm\b", names):
        return 0
    for operand in one.computation.operands_of(one.instruction):
        dims = operand.shapes[0].dims
        if len(dims) == 2:
            return dims[0]
    return 0


def _grouped_matmul_flops(one: Executed, rows: float) -> float:
    """Return the operations of a kernel that states none, on so many rows of matrices [E, D, F]."""
    for operand in one.computation.operands_of(one.instruction):
        dims = operand.shapes[0].dims
        if len(dims) == 3:
            return 2.0 * rows * dims[1] * dims[2]
    return 0.0


def _convolution_flops(one: Executed) -> float:
    """Return 2 * outputs * input features * window positions that lie on real inputs.

    A TPU writes batched matmuls as dilated convolutions.
    """
    instruction = one.instruction
    left, right = (operand.shapes[0] for operand in one.computation.operands_of(instruction)[:2])
    out = instruction.shapes[0]
    labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    batch = left.dims[left_labels.index("b")]
    features = right.dims[right_labels.index("i")]  # the kernel's own: already divided by groups
    outputs = out.dims[out_labels.index("f")]
    window = _window_of(instruction)
    positions = 1
    for axis in range(len(left_labels) - 2):
        positions *= _valid_positions(
            left.dims[left_labels.index(str(axis))],
            out.dims[out_labels.index(str(axis))],
            window=int(_per_axis(window, "size", axis, "1")),
            stride=int(_per_axis(window, "stride", axis, "1")),
            pad=int(_per_axis(window, "pad", axis, "0_0").split("_")[0]),
            base_dilation=int(_per_axis(window, "lhs_dilate", axis, "1")),
            window_dilation=int(_per_axis(window, "rhs_dilate", axis, "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    num_groups = int(groups[1]) if groups else 1
    return 2 * batch / num_groups * outputs * features * positions


def _window_of(instruction: Instruction) -> dict[str, str]:
    """Return the settings of a convolution's window: name -> one value for each axis."""
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = found[1] if found else ""
    return dict(re.findall(r"(\w+)=([\dx_\-]+)", settings))


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
    """Count the pairs (output, window element) that meet an input.

    The others meet padding or the holes of a dilated base.
    """
    outputs = np.arange(out)[:, None] * stride - pad
    place = outputs + np.arange(window)[None, :] * window_dilation
    inside = (place >= 0) & (place <= (size - 1) * base_dilation)
    return int((inside & (place % base_dilation == 0)).sum())


# -- memory ----------------------------------------------------------------------------------------


def traffic(module: Module, one: Executed, grouped_rows: float = math.inf) -> float:
    """Return the bytes of HBM that one run reads and writes.

    0 inside fusions, whose edges count. `grouped_rows` is as for `flops`.
    """
    instruction = one.instruction
    if one.fused or instruction.opcode in FREE or is_collective(instruction):
        return 0.0
    operands = one.computation.operands_of(instruction)
    if instruction.opcode == "fusion":
        return _fusion_traffic(module, instruction, operands)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(instruction)
    if instruction.opcode == "copy-start":  # (destination, source, context)
        return sum(shape.bytes for shape in instruction.shapes[:2] if shape.space == 0)
    rows = _grouped_matmul_rows(one) if instruction.opcode == "custom-call" else 0
    if not rows:
        return _in_hbm(instruction) + sum(map(_in_hbm, operands))
    used_share = min(rows, grouped_rows) / rows
    total = 0.0
    for array in (instruction, *operands):
        for shape in array.shapes:
            if shape.space == 0:
                has_rows = shape.dims[:1] == (rows,)
                total += shape.bytes * (used_share if has_rows else 1.0)
    return total


def largest_traffic(module: Module, count: int, grouped_rows: float = math.inf) -> list[Row]:
    """Return the instructions that move the most bytes over all their runs, the most first."""
    found: dict[tuple[str, str], float] = {}
    for one in executed(module):
        shapes = one.instruction.shapes
        key = (str(shapes[0]) if shapes else "", one.instruction.label)
        moved = one.times * traffic(module, one, grouped_rows)
        found[key] = found.get(key, 0.0) + moved
    return _most(found, count)


def largest_arrays(module: Module, count: int) -> list[Row]:
    """Return the largest arrays in HBM that are not arguments, each shape and maker once."""
    found: dict[tuple[str, str], float] = {}
    for one in executed(module):
        opcode = one.instruction.opcode
        makes_nothing = opcode in FREE - {"iota"} or opcode.endswith("-done")
        if one.fused or makes_nothing:
            continue
        for shape in one.instruction.shapes:
            if shape.space == 0:
                found[str(shape), one.instruction.label] = shape.bytes
    return _most(found, count)


def kept_for_backward(module: Module) -> float:
    """Return the bytes that forward loops hand to backward loops.

    They are the activations that a step keeps (with full remat, the input of each block).
    """
    kept: dict[tuple[str, int], float] = {}
    outside_fusions = {}
    for one in executed(module):
        if not one.fused:
            outside_fusions[one.computation.name] = one.computation
    for computation in outside_fusions.values():
        for loop in computation.instructions:
            if loop.opcode != "while" or not _is_backward(loop):
                continue
            for value in computation.operands_of(computation.by_name[loop.operands[0]]):
                source, index = _source(computation, value)
                if source.opcode == "while" and not _is_backward(source):
                    kept[source.name, index] = source.shapes[index].bytes
    return sum(kept.values())


def _most(found: dict[tuple[str, str], float], count: int) -> list[Row]:
    rows = [(size, shape, maker) for (shape, maker), size in found.items()]
    return sorted(rows, reverse=True)[:count]


def _is_backward(loop: Instruction) -> bool:
    return "transpose(" in loop.op_name


def _source(computation: Computation, instruction: Instruction) -> tuple[Instruction, int]:
    """Return the instruction that makes a value, and the element of its result.

    Copies and casts of layout are passed through.
    """
    moves = ("copy", "bitcast", "copy-start", "copy-done")
    while instruction.opcode in moves and instruction.operands:
        instruction = computation.by_name[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element":
        return instruction, 0
    index = _search(r"index=(\d+)", instruction.attributes)
    return computation.by_name[instruction.operands[0]], int(index[1])


def _in_hbm(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _fusion_traffic(module: Module, fusion: Instruction, operands: list[Instruction]) -> float:
    inner = module.called_by(fusion, "calls")
    total_read = 0.0
    total_updated = 0.0
    for parameter, operand in zip(inner.parameters, operands, strict=False):
        if _in_hbm(operand):
            read, updated = _read(module, inner, parameter, operand.bytes)
            total_read += read
            total_updated += updated
    passing = 0.0  # results that are parameters, or collectives inside the fusion
    if inner.root.opcode == "tuple":
        for result in inner.operands_of(inner.root):
            if result.opcode == "parameter" or is_collective(result):
                passing += _in_hbm(result)
    written = max(0.0, _in_hbm(fusion) - total_updated - passing)
    return total_read + written


def _read(
    module: Module, computation: Computation, value: Instruction, size: float
) -> tuple[float, float]:
    """Return the bytes that a fusion reads of one of its values, and those updated in place."""
    total_read = 0.0
    updated = 0.0
    for user in computation.users.get(value.name, []):
        if user.opcode == "tuple" or is_collective(user):
            continue  # it only passes through: a collective inside a fusion
        is_first = user.operands[0] == value.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and is_first:
            total_read += user.bytes
        elif user.opcode == "dynamic-update-slice" and is_first:
            total_read += computation.by_name[user.operands[1]].bytes
            updated = size
        elif user.opcode == "bitcast":
            read, in_place = _read(module, computation, user, size)
            total_read += read
            updated += in_place
        elif user.opcode == "fusion":
            inner = module.called_by(user, "calls")
            for place, name in enumerate(user.operands):
                if name == value.name:
                    read, in_place = _read(module, inner, inner.parameters[place], size)
                    total_read += read
                    updated += in_place
        else:
            return size, 0.0
    return min(total_read, size), updated


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the HLO attributes {text[:120]!r} lack {pattern}")
    return found
