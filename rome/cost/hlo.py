"""Read a compiled program's text, and walk through the instructions that one device runs.

A compiler's own totals count a loop's body once. Here the optimized HLO is walked from its entry;
the body of a `while` counts as often as its condition lets it run, and instructions of called
computations and fusions count where they are called. `rome.cost.costs` says what each costs.
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
    """HLO text that this reader does not understand; the message says which line."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array. `space` is the memory that it lies in: 0 HBM, 1 on chip, 5 the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def bytes(self) -> float:
        """Return the size of the array."""
        item_bytes = ITEM_BYTES.get(self.dtype, 1)  # all other types are 8-bit floats
        return math.prod(self.dims) * item_bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: of its result.
      opcode: its operation.
      shapes: arrays of its result, a tuple's one after the other.
      operands: names of instructions of the same computation.
      arguments: text between the parentheses.
      attributes: text after them.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Return JAX's name of the operation; "" without one."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def label(self) -> str:
        """Return op_name, or the instruction's own name where there is none."""
        return self.op_name or self.name

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation that an attribute such as "body" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def bytes(self) -> float:
        """Return the size of the result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions under one name: the entry, the body of a loop, a fusion."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Return the instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Return for each name the instructions that have it as an operand."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        """Return the instruction that is the result."""
        return next(instruction for instruction in self.instructions if instruction.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Return the parameters in the order of the caller's operands."""
        parameters = [one for one in self.instructions if one.opcode == "parameter"]
        return sorted(parameters, key=lambda one: int(one.arguments))

    def operands_of(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions that make an instruction's operands."""
        return [self.by_name[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: Computation
    computations: dict[str, Computation]

    def called_by(self, instruction: Instruction, *attributes: str) -> Computation:
        """Return the computation that the first of these attributes names.

        Raises:
          HloError: the instruction has none of them.
        """
        for attribute in attributes:
            name = instruction.called(attribute)
            if name is not None:
                return self.computations[name]
        raise HloError(f"{instruction.opcode} {instruction.name} has no {' or '.join(attributes)}")


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction and how often it runs.

    `fused` says that it is part of a fusion: its operands are not in memory.
    """

    instruction: Instruction
    computation: Computation
    times: float
    fused: bool


# -- reading ---------------------------------------------------------------------------------------

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_BEGINS = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_PARENTHESIS = re.compile(r"[()]")


def parse(text: str) -> Module:
    """Return the computations of `compiled.as_text()`.

    Raises:
      HloError: the text is not that of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name = None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name = header[2]
                lines = []
                if header[1]:
                    entry = name
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = None
        elif _BEGINS.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # an attribute may run over several lines
    if entry is None:
        raise HloError(
            f"no ENTRY computation in {len(text)} characters of HLO; hand in compiled.as_text()"
        )
    return Module(computations[entry], computations)


def _instruction(line: str) -> Instruction:
    left, _, rest = line.strip().partition(" = ")
    shapes_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opened = rest.find("(", shapes_end)
    if opened < 0:
        raise HloError(f"no operation in the HLO line {line.strip()[:120]!r}")
    closed = _closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[shapes_end:opened].strip(),
        shapes=_shapes(rest[:shapes_end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closed + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Return the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise HloError(f"a parenthesis never closes in {text[start : start + 80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(dim.strip(" <=")) for dim in dims.split(",") if dim.strip())
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


# -- walking ---------------------------------------------------------------------------------------

_CALLS = ("fusion", "call", "async-start", "call-start", "fusion-start")


def executed(module: Module) -> Iterator[Executed]:
    """Yield every instruction that runs, with how often.

    All branches of a conditional are counted once (an upper bound).
    """
    yield from _walk(module, module.entry, 1.0, fused=False)


def _walk(
    module: Module, computation: Computation, times: float, fused: bool
) -> Iterator[Executed]:
    for instruction in computation.instructions:
        yield Executed(instruction, computation, times, fused)
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction) or 1
            body = module.called_by(instruction, "body")
            yield from _walk(module, body, times * trips, fused)
        elif instruction.opcode == "conditional":
            for branch in branches(instruction):
                yield from _walk(module, module.computations[branch], times, fused)
        elif instruction.opcode in _CALLS:
            inner = module.called_by(instruction, "calls", "to_apply")
            yield from _walk(module, inner, times, fused or instruction.opcode == "fusion")


def branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    named = (instruction.called("true_computation"), instruction.called("false_computation"))
    return [name for name in named if name is not None]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Return how often a loop's body runs; None where the text does not tell.

    As the compiler noted it, or (bound - start) / step of its counter.
    """
    noted = re.search(r'known_trip_count":?\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.called_by(loop, "condition")
    comparison = condition.root
    instructions = list(condition.instructions)
    if comparison.opcode == "fusion":
        inner = module.called_by(comparison, "calls")
        comparison = inner.root
        instructions += inner.instructions
    direction = re.search(r"direction=(\w+)", comparison.attributes)
    constants = [_constant(one) for one in instructions]
    bounds = [bound for bound in constants if bound is not None]
    if comparison.opcode != "compare" or direction is None or len(bounds) != 1:
        return None
    trips = bounds[0] - _counter_start(condition, computation, loop)
    includes_bound = direction[1] in ("LE", "GE")
    return max(0, trips + includes_bound)


def _counter_start(condition: Computation, computation: Computation, loop: Instruction) -> int:
    """Return the first value of the loop's counter, the tuple element that its condition reads.

    JAX counts from 0 by 1.
    """
    elements = [one for one in condition.instructions if one.opcode == "get-tuple-element"]
    index = re.search(r"index=(\d+)", elements[0].attributes) if elements else None
    start = computation.by_name.get(loop.operands[0])
    if index is None or start is None or start.opcode != "tuple":
        return 0
    first = computation.by_name[start.operands[int(index[1])]]
    while first.opcode in ("copy", "bitcast") and first.operands:
        first = computation.by_name[first.operands[0]]
    return _constant(first) or 0


def _constant(instruction: Instruction) -> int | None:
    """Return the value of an integer constant; None for any other instruction."""
    if instruction.opcode != "constant":
        return None
    shape = instruction.shapes[0]
    is_integer = shape.dims == () and shape.dtype[0] in "su"
    if not is_integer or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)
