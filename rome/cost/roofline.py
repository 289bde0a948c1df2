"""What chips can do, and how long a compiled program must take on them at least.

Three times a program cannot beat: its matmuls at the peak rate, its HBM traffic at the memory's
bandwidth, its collectives at the interconnect's. The model of the interconnect, chosen to be simple
and a little optimistic (no latency, no contention but the stated one):

- A chip has a link in each direction of each dimension of its torus. A dimension is a ring where
  the slice wraps around, else a line.
- A group of devices uses every dimension that it extends over at once. Data enters a device over 2
  links a ring, 1 a line (its ends have one). A group that takes every s-th chip of a dimension
  shares its links with s - 1 others.
- Collectives run one after the other; only a permutation and its inverse share the two directions
  of a link.
- all-gather and reduce-scatter: each device takes in (n - 1) / n of the whole; all-reduce: both.
all-to-all: half of all bytes cross the
  middle of each dimension. collective-permute: the longest way that a message goes.
- A chip of two devices (tpu7x) has one set of links: groups that hold one device of each chip get
  half of it; between the two of a chip there are 6 links' worth. Between slices there is the
  data-centre network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rome.cost.costs import Collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates are per chip and second; `usable` is the HBM bytes that the compiler lets one device
    have.

    Peaks and HBM bandwidths: cloud.google.com/tpu/docs. Links: 90 % of the nominal rate there (1200
    GB/s over 12 directions on v5p and tpu7x, 800 over 8 on v6e, 400 over 8 on v5e). `usable`: the
    limit that libtpu 0.0.42.1 names when a program exceeds it.
    """

    name: str
    peak_flops: float  # bfloat16
    usable: float
    hbm: float
    link: float  # one link, one direction
    dcn: float
    dimensions: int
    wraps_at: int  # a dimension of a multiple of this many chips is a ring
    devices: int = 1  # JAX devices a chip

    @property
    def device_flops(self) -> float:
        return self.peak_flops / self.devices

    @property
    def device_hbm(self) -> float:
        return self.hbm / self.devices


CHIPS = {
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 810e9, 45e9, 3.1e9, 2, wraps_at=16),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 90e9, 6.25e9, 3, wraps_at=4),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 90e9, 12.5e9, 2, wraps_at=16),
    "tpu7x": Chip("tpu7x", 2307e12, 94.75 * GIB, 7380e9, 90e9, 12.5e9, 3, wraps_at=4, devices=2),
}
CORE_LINKS = 6  # the path between the two devices of a tpu7x chip, in links


@dataclasses.dataclass(frozen=True)
class Sent:
    """One kind of collective along one set of mesh axes, all its runs together; for one device."""

    kind: str
    axes: str
    runs: float
    bytes: float
    seconds: float
    largest: str  # the op_name of its costliest member


def sent(found: Sequence[Collective], mesh: Mesh, chip: Chip) -> list[Sent]:
    """Collectives by kind and mesh axes, the longest first."""
    places = np.array([place(device) for device in mesh.devices.flat])
    together: dict[tuple[str, str], list[tuple[Collective, float, float]]] = {}
    for one in found:
        axes = mesh_axes(one.groups, mesh)
        together.setdefault((one.kind, axes), []).append((one, *cost(one, places, chip)))
    rows = []
    for (kind, axes), members in together.items():
        largest = max(members, key=lambda member: member[0].times * member[2])[0].op_name
        rows.append(
            Sent(
                kind,
                axes,
                sum(one.times for one, _, _ in members),
                sum(one.times * size for one, size, _ in members),
                _together(members),
                largest,
            )
        )
    return sorted(rows, key=lambda row: -row.seconds)


def _together(members: list[tuple[Collective, float, float]]) -> float:
    """Seconds of all runs, one after the other; but a permutation and its inverse use the two
    directions of the same links at once.
    """
    by_way: dict[bytes, float] = {}
    for one, _, seconds in members:
        way = np.array(sorted(one.groups.tolist())).tobytes()
        by_way[way] = by_way.get(way, 0.0) + one.times * seconds
    if members[0][0].kind != "collective-permute":
        return sum(by_way.values())
    back = {
        np.array(sorted(one.groups.tolist())).tobytes(): (
            np.array(sorted(one.groups[:, ::-1].tolist())).tobytes()
        )
        for one, _, _ in members
    }
    return sum(
        max(seconds, by_way.get(back[way], 0.0))
        / (2 if back[way] in by_way and back[way] != way else 1)
        for way, seconds in by_way.items()
    )


def mesh_axes(groups: np.ndarray, mesh: Mesh) -> str:
    """The axes along which the members of a group differ, such as "fsdp" or "fsdp+expert"."""
    places = np.array(np.unravel_index(groups, mesh.devices.shape))  # [axes, groups, members]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(name for name, varies in zip(mesh.axis_names, differs) if varies)


def place(device: Any) -> tuple[int, ...]:
    """(slice, core, x, y, z): where a device is."""
    return (
        getattr(device, "slice_index", 0) or 0,
        getattr(device, "core_on_chip", 0) or 0,
        *getattr(device, "coords", (device.id, 0, 0)),
    )


def cost(one: Collective, places: np.ndarray, chip: Chip) -> tuple[float, float]:
    """(bytes that one device sends, seconds) of one run. places: `place` of every device of the
    mesh.
    """
    n, extent = one.groups.shape[1], places.max(axis=0) + 1
    if one.kind == "collective-permute":
        ways = [_way(places[a], places[b], extent, chip) for a, b in one.groups if a != b]
        return (one.payload, max(ways) * one.payload / chip.link) if ways else (0.0, 0.0)
    group = places[one.groups[0]]
    share = one.payload * (n - 1) / n * (2 if one.kind == "all-reduce" else 1)
    if len(set(group[:, 0])) > 1:
        return share, share / (chip.dcn / chip.devices)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        return share, _exchange_seconds(one.payload, group, extent, chip)
    return share, share / bandwidth(group, extent, chip)


def bandwidth(group: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """Bytes a second that enter each device of a group (rows of `place`) when all its dimensions
    work at once.
    """
    links = sum((2 if ring else 1) / stride for _, stride, ring in _dimensions(group, extent, chip))
    if not links:
        return CORE_LINKS * chip.link
    return links * chip.link * len(set(group[:, 1])) / chip.devices


def _dimensions(group: np.ndarray, extent: np.ndarray, chip: Chip) -> list[tuple[int, int, bool]]:
    """Of each torus dimension that a group extends over: (members along it, chips from one to the
    next, whether it closes to a ring).
    """
    found = []
    for dimension in range(2, group.shape[1]):
        taken = sorted(set(group[:, dimension].tolist()))
        if len(taken) > 1:
            stride, size = (
                math.gcd(*(b - a for a, b in zip(taken, taken[1:]))),
                int(extent[dimension]),
            )
            found.append(
                (len(taken), stride, len(taken) * stride == size and size % chip.wraps_at == 0)
            )
    return found


def _exchange_seconds(payload: float, group: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """Every device sends an equal part of its payload to every other one: half of all bytes cross
    the middle of each dimension.
    """
    dimensions = _dimensions(group, extent, chip)
    if not dimensions:
        return payload / 2 / (CORE_LINKS * chip.link)
    return (
        max(payload * members * stride / (8 if ring else 4) for members, stride, ring in dimensions)
        * chip.devices
        / chip.link
    )


def _way(a: np.ndarray, b: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """How often a message from a to b, and those that share its links, pass a link, in runs of one
    link.
    """
    if a[0] != b[0]:
        return chip.link / (chip.dcn / chip.devices)
    steps = 0
    for dimension in range(2, len(a)):
        size, apart = int(extent[dimension]), abs(int(a[dimension]) - int(b[dimension]))
        steps += min(apart, size - apart) if size % chip.wraps_at == 0 else apart
    return steps * chip.devices if steps else 1 / CORE_LINKS


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one device needs at least, by what it waits for, and the model's own FLOPs that
    it is given.
    """

    compute: float
    memory: float
    collectives: float
    model_flops: float
    peak_flops: float

    @property
    def overlapped(self) -> float:
        """MFU where everything happens at the same time."""
        return self.model_flops / self.peak_flops / max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """MFU where no collective is hidden behind compute."""
        return (
            self.model_flops / self.peak_flops / (max(self.compute, self.memory) + self.collectives)
        )
