"""How much of its collectives a compiled program hides behind compute, by its own schedule.

The compiler fixes the order in which a TPU runs instructions. A collective that starts early and is
awaited late has others between; one without a start and an end of its own has nothing. Here the
instructions are run in that order on one clock: computing takes the time of its operations or of
its memory traffic, whichever is longer; a collective takes its time on the interconnect beside
that, after those before it on the same mesh axes; and where it is awaited the clock stands still
until it is done. A permutation and its inverse use the two directions of a link. Rates are peaks,
as in `rome.cost.roofline`. Copies into a core's own memory take no time: they run beside computing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from rome.cost import costs
from rome.cost.collectives import Collective, collectives, read_collective
from rome.cost.hlo import Computation, Executed, Instruction, Module, branches, trip_count
from rome.cost.roofline import Chip, cost, group_key, mesh_axes, place

_STARTS = ("async-start", "call-start")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """All runs of one kind of collective along one set of mesh axes; for one device.

    Attributes:
      kind: one of COLLECTIVES.
      axes: such as "fsdp+expert".
      seconds: on the interconnect; of a permutation and its inverse, which share the two
        directions of a link, half of each.
      waited: seconds of these in which nothing was computed.
    """

    kind: str
    axes: str
    seconds: float
    waited: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One run of a program: its seconds, and its collectives, the longest waits first."""

    seconds: float
    overlaps: tuple[Overlap, ...]


@dataclasses.dataclass
class _Run:
    """One run of a computation: its clock, and (kind, axes) -> seconds and waited seconds."""

    seconds: float = 0.0
    totals: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)

    def add(self, other: _Run, times: float = 1.0) -> None:
        """Run another computation `times` times at this place."""
        self.seconds += times * other.seconds
        for key, values in other.totals.items():
            self._count(key, *(times * value for value in values))

    def wait(self, flight: _Flight) -> None:
        """Let the clock stand still until a collective is done."""
        waited = max(0.0, flight.done_at - self.seconds)
        self.seconds += waited
        self._count(flight.key, flight.counted, min(waited, flight.seconds))

    def _count(self, key: tuple[str, str], seconds: float, waited: float) -> None:
        total = self.totals.setdefault(key, [0.0, 0.0])
        total[0] += seconds
        total[1] += waited


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A collective that is under way; `counted` are its seconds as `Overlap` has them."""

    key: tuple[str, str]
    seconds: float
    counted: float
    done_at: float


def play(
    module: Module,
    mesh: Mesh,
    chip: Chip,
    grouped_rows: float = math.inf,
    score_share: float = 0.5,
) -> Schedule:
    """Run a compiled program's schedule on one clock.

    Args:
      module: the program, whose instructions are in the order of their schedule.
      mesh: that it runs on.
      chip: of the mesh's devices.
      grouped_rows: as in `costs.flops`.
      score_share: as in `costs.flops`.
    """
    run = _Player(module, mesh, chip, grouped_rows, score_share).run(module.entry)
    overlaps = [Overlap(*key, *values) for key, values in run.totals.items()]
    return Schedule(run.seconds, tuple(sorted(overlaps, key=lambda one: -one.waited)))


class _Player:
    def __init__(
        self, module: Module, mesh: Mesh, chip: Chip, grouped_rows: float, score_share: float
    ):
        self._module = module
        self._mesh = mesh
        self._chip = chip
        self._grouped_rows = grouped_rows
        self._score_share = score_share
        self._places = np.array([place(device) for device in mesh.devices.flat])
        self._runs: dict[str, _Run] = {}
        self._permutations: set[bytes] = set()
        for one in collectives(module, mesh.size):
            if one.kind == "collective-permute":
                self._permutations.add(group_key(one.groups))

    def run(self, computation: Computation) -> _Run:
        """Return one run of a computation; the clock starts at 0."""
        if computation.name not in self._runs:
            self._runs[computation.name] = self._play(computation)
        return self._runs[computation.name]

    def _play(self, computation: Computation) -> _Run:
        run = _Run()
        links: dict[tuple, float] = {}  # when the links of a key are free
        flights: dict[str, _Flight] = {}
        parts = {one.name: self._collectives(computation, one) for one in computation.instructions}
        last_of = {name: instruction for instruction, names in parts.items() for name in names}
        for instruction in computation.instructions:
            for name, collective in parts[instruction.name].items():
                if name not in flights:
                    flights[name] = self._launch(collective, run.seconds, links)
            self._compute(run, computation, instruction)
            ended = []
            if instruction.opcode.endswith("-done"):
                ended = [_start_of(computation, instruction)]
            elif not instruction.opcode.endswith("-start"):
                ended = [
                    name for name in parts[instruction.name] if last_of[name] == instruction.name
                ]
            for name in ended:
                if name in flights:
                    run.wait(flights.pop(name))
        for flight in flights.values():
            run.wait(flight)
        return run

    def _compute(self, run: _Run, computation: Computation, instruction: Instruction) -> None:
        """Advance the clock by the instruction's own work."""
        if instruction.opcode == "while":
            trips = trip_count(self._module, computation, instruction) or 1
            run.add(self.run(self._module.called_by(instruction, "body")), trips)
        elif instruction.opcode == "conditional":
            ways = [self.run(self._module.computations[way]) for way in branches(instruction)]
            run.add(max(ways, key=lambda way: way.seconds))
        elif instruction.opcode == "call":
            run.add(self.run(self._module.called_by(instruction, "to_apply", "calls")))
        else:
            run.seconds += self._compute_seconds(computation, instruction)

    def _compute_seconds(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode.endswith(("-start", "-done")):
            return 0.0
        one = Executed(instruction, computation, 1.0, fused=False)
        moved = costs.traffic(self._module, one, self._grouped_rows)
        operations = 0.0
        for part in self._parts(one):
            operations += costs.flops(part, self._grouped_rows, self._score_share)
        return max(operations / self._chip.device_flops, moved / self._chip.device_hbm)

    def _parts(self, one: Executed) -> Iterator[Executed]:
        """Yield an instruction, and what it calls where it is a fusion or another thread's call."""
        yield one
        if one.instruction.opcode in ("fusion", *_STARTS):
            inner = self._module.called_by(one.instruction, "calls", "to_apply")
            for instruction in inner.instructions:
                yield from self._parts(Executed(instruction, inner, 1.0, fused=True))

    def _collectives(
        self, computation: Computation, instruction: Instruction
    ) -> dict[str, Collective]:
        """Return the collectives that an instruction is, starts or carries a piece of, by name.

        Pieces of one share the name of its channel; all others have that of their instruction.
        """
        found = {}
        for part in self._parts(Executed(instruction, computation, 1.0, fused=False)):
            collective = read_collective(part, self._mesh.size)
            if collective is None:
                continue
            channel = re.search(r"channel_id=(\d+)", part.instruction.attributes)
            is_piece = instruction.opcode == "fusion" and channel is not None
            name = f"{collective.kind} {channel[1]}" if is_piece and channel else instruction.name
            found[name] = collective
        return found

    def _launch(self, one: Collective, now: float, links: dict[tuple, float]) -> _Flight:
        _, seconds = cost(one, self._places, self._chip)
        key = (one.kind, mesh_axes(one.groups, self._mesh))
        direction = b""
        counted = seconds
        if one.kind == "collective-permute":
            direction = group_key(one.groups)
            inverse = group_key(one.groups[:, ::-1])
            if inverse != direction and inverse in self._permutations:
                counted = seconds / 2
        link = (key[1], direction)
        links[link] = max(now, links.get(link, 0.0)) + seconds
        return _Flight(key, seconds, counted, links[link])


def _start_of(computation: Computation, done: Instruction) -> str:
    """Return the name of the start that an instruction ends."""
    start = computation.by_name[done.operands[0]]
    while start.opcode in ("async-update", "get-tuple-element", "copy", "bitcast"):
        start = computation.by_name[start.operands[0]]
    return start.name
