"""The collectives of a compiled program: which devices take part, and how many bytes each moves."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from rome.cost.hlo import Executed, Instruction, Module, executed
from rome.model.ops.experts import ROWS_OVER_SHARE

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      payload: bytes of the whole array that one device ends or begins with: gathered, to be
        scattered, reduced, exchanged, passed on.
      groups: device numbers, [groups, members]; for a collective-permute [pairs, 2].
      times: how often it runs.
      op_name: JAX's name of the operation.
    """

    kind: str
    payload: float
    groups: np.ndarray
    times: float
    op_name: str


def is_collective(instruction: Instruction) -> bool:
    """Return whether an instruction is a collective, or starts or ends one."""
    return instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


def collectives(module: Module, devices: int) -> list[Collective]:
    """Return every collective that runs.

    Start and done are one, and so are the pieces of one that is spread over several fusions.

    Args:
      module: the program.
      devices: of the whole mesh.
    """
    found = []
    in_fusions = set()
    for one in executed(module):
        collective = read_collective(one, devices)
        if collective is None:
            continue
        channel = re.search(r"channel_id=(\d+)", one.instruction.attributes)
        if one.fused and channel:
            if (collective.kind, channel[1]) in in_fusions:
                continue
            in_fusions.add((collective.kind, channel[1]))
        found.append(collective)
    return found


def read_collective(one: Executed, devices: int) -> Collective | None:
    """Return the collective that an instruction is or starts; None for others and among one.

    Args:
      one: the instruction.
      devices: of the whole mesh.
    """
    instruction = one.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    groups = replica_groups(instruction.attributes, devices)
    payload = _payload(one, kind)
    if kind == "all-gather":
        payload *= groups.shape[1]
    elif kind == "all-reduce" and _is_scattered(one):
        kind = "reduce-scatter"
    if groups.shape[1] < 2:
        return None
    return Collective(kind, payload, groups, one.times, instruction.op_name)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Return device numbers [groups, members] from any of the spellings of XLA.

    All devices together where none is given.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes)
    explicit = pairs or listed
    if explicit:
        groups = re.findall(r"\{([\d,]+)\}", explicit[1])
        return np.array([_numbers(group) for group in groups], dtype=int)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        attributes,
    )
    if mesh is None:
        return np.arange(devices)[None, :]
    axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
    names = [name for name, _ in axes]
    sizes = [int(size) for _, size in axes]
    numbers = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes))
    return _mesh_groups(numbers.reshape(sizes), names, mesh[4])


def _payload(one: Executed, kind: str) -> float:
    operands = one.computation.operands_of(one.instruction)
    if kind == "ragged-all-to-all":
        # Rows and the array that receives them; offsets are nothing beside them. One of the two is
        # the room for a part of the rows, and has its even share and some to spare.
        return min(operand.bytes for operand in operands[:2]) / ROWS_OVER_SHARE
    return sum(operand.bytes for operand in operands)


def _is_scattered(one: Executed) -> bool:
    """Return whether each device keeps only its slice of an all-reduce inside a fusion.

    That is a reduce-scatter as a TPU spells it.
    """
    users = one.computation.users.get(one.instruction.name, [])
    return one.fused and bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _mesh_groups(numbers: np.ndarray, names: list[str], axes: str) -> np.ndarray:
    """Return groups along named axes of a mesh.

    'x':(m)k is the k-sized part of axis x after its first m.
    """
    part_of = {}
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes):
        part_of[name] = (int(before), int(size))
    whole = [name for name in re.findall(r"'([^']+)'", axes) if name not in part_of]
    shape: list[int] = []
    wanted: list[int] = []  # axes of `shape` along which the members of a group lie
    for name, size in zip(names, numbers.shape, strict=True):
        if name in part_of:
            before, part = part_of[name]
            wanted.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
            continue
        if name in whole:
            wanted.append(len(shape))
        shape.append(size)
    members = math.prod(shape[axis] for axis in wanted)
    others = [axis for axis in range(len(shape)) if axis not in wanted]
    return numbers.reshape(shape).transpose(others + wanted).reshape(-1, members)


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if order:
        numbers = numbers.transpose(_numbers(order))
    return numbers.reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
