"""Reads a compiled program's text, and walks through what one device runs, loops counted as often
as they run.

A compiler's own totals count a loop's body once. Here the optimized HLO is walked from its entry;
the body of a `while` counts as often as its condition lets it, and what lies in called computations
and fusions counts where it is called. rome/cost/costs.py says what it costs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "token": 0,
    "opaque": 0,
}


class HloError(ValueError):
    """Text that this reader does not understand: says which line."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array. `space` is the memory it lies in: 0 HBM, 1 on chip, 5 the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * ITEM_BYTES.get(
            self.dtype, 1
        )  # all other types are 8-bit floats


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shapes` are the arrays of its result, a tuple's one after the other; `operands` name
    instructions of the same computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions if instruction.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order in which they are handed in."""
        return sorted(
            (one for one in self.instructions if one.opcode == "parameter"),
            key=lambda one: int(one.arguments),
        )

    def operands_of(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    entry: Computation
    computations: dict[str, Computation]


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, how often it runs, and whether it is part of a fusion (then its operands are
    not in memory).
    """

    instruction: Instruction
    computation: Computation
    times: float
    fused: bool


# -- reading
# -------------------------------------------------------------------------------------------------

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_BEGINS = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")


def parse(text: str) -> Module:
    """The computations of `compiled.as_text()`."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        header = _HEADER.match(line) if name is None else None
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name is not None and (line.rstrip() == "}" or line.startswith("}, execution_thread")):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = None
        elif name is not None and _BEGINS.match(line):
            lines.append(line)
        elif name is not None and lines:
            lines[-1] += line  # an attribute may run over several lines
    if entry is None:
        raise HloError(
            f"no ENTRY computation in {len(text)} characters of HLO; hand in compiled.as_text()"
        )
    return Module(computations[entry], computations)


def _instruction(line: str) -> Instruction:
    left, _, rest = line.strip().partition(" = ")
    kind_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opened = rest.find("(", kind_end)
    if opened < 0:
        raise HloError(f"no operation in the HLO line {line.strip()[:120]!r}")
    closed = _closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[kind_end:opened].strip(),
        shapes=_shapes(rest[:kind_end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closed + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise HloError(f"a parenthesis never closes in {text[start : start + 80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shapes.append(
            Shape(
                dtype,
                tuple(int(dim.strip(" <=")) for dim in dims.split(",") if dim.strip()),
                int(space[1]) if space else 0,
            )
        )
    return tuple(shapes)


# -- walking
# -------------------------------------------------------------------------------------------------


def executed(module: Module) -> Iterator[Executed]:
    """Every instruction that runs, with how often; of a conditional's branches all are counted once
    (an upper bound).
    """
    yield from _walk(module, module.entry, 1.0, fused=False)


def _walk(
    module: Module, computation: Computation, times: float, fused: bool
) -> Iterator[Executed]:
    for instruction in computation.instructions:
        yield Executed(instruction, computation, times, fused)
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction)
            yield from _walk(
                module, module.computations[instruction.called("body")], times * (trips or 1), fused
            )
        elif instruction.opcode == "conditional":
            for branch in _branches(instruction):
                yield from _walk(module, module.computations[branch], times, fused)
        elif instruction.opcode in ("fusion", "call", "async-start", "call-start", "fusion-start"):
            inner = module.computations[
                instruction.called("calls") or instruction.called("to_apply")
            ]
            yield from _walk(module, inner, times, fused or instruction.opcode == "fusion")


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs: as the compiler noted it, or (bound - start) / step of its
    counter.

    None: not to be seen.
    """
    noted = re.search(r'known_trip_count":?\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.called("condition")]
    comparison, values = condition.root, condition
    if comparison.opcode == "fusion":
        values = module.computations[comparison.called("calls")]
        comparison = values.root
    direction = re.search(r"direction=(\w+)", comparison.attributes)
    bounds = [
        _constant(one)
        for one in (
            *condition.instructions,
            *(values.instructions if values is not condition else ()),
        )
    ]
    bounds = [bound for bound in bounds if bound is not None]
    if comparison.opcode != "compare" or direction is None or len(bounds) != 1:
        return None
    trips = bounds[0] - _counter_start(condition, computation, loop)
    return max(0, trips + (direction[1] in ("LE", "GE")))


def _counter_start(condition: Computation, computation: Computation, loop: Instruction) -> int:
    """The first value of the element of the loop's tuple that its condition reads; JAX counts from
    0 by 1.
    """
    index = next(
        (
            re.search(r"index=(\d+)", one.attributes)
            for one in condition.instructions
            if one.opcode == "get-tuple-element"
        ),
        None,
    )
    start = computation.by_name.get(loop.operands[0])
    if index is None or start is None or start.opcode != "tuple":
        return 0
    first = computation.by_name[start.operands[int(index[1])]]
    while first.opcode in ("copy", "bitcast") and first.operands:
        first = computation.by_name[first.operands[0]]
    return _constant(first) or 0


def _constant(instruction: Instruction) -> int | None:
    integer = (
        instruction.opcode == "constant"
        and instruction.shapes[0].dims == ()
        and instruction.shapes[0].dtype[0] in "su"
    )
    return (
        int(instruction.arguments)
        if integer and re.fullmatch(r"-?\d+", instruction.arguments)
        else None
    )
