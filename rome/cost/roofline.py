"""The roofline of a compiled program: the least time that a chip needs for it.

Three times a program cannot beat: its matmuls at the peak rate, its HBM traffic at the memory's
bandwidth, its collectives at the interconnect's. The model of the interconnect is simple and a
little optimistic (no latency, no contention but the stated one):

- A chip has a link in each direction of each dimension of its torus. A dimension is a ring where
  the slice wraps around, else a line.
- A group of devices uses every dimension that it extends over at once. Data enters a device over 2
  links a ring, 1 a line (its ends have one). A group that takes every s-th chip of a dimension
  shares its links with s - 1 others.
- Collectives run one after the other; only a permutation and its inverse share the two directions
  of a link.
- all-gather and reduce-scatter: each device takes in (n - 1) / n of the whole; all-reduce: both.
  all-to-all: half of all bytes cross the middle of each dimension. collective-permute: the longest
  path of a message.
- A chip without dimensions (h100) has one link to a switch: whoever talks to whom, data enters and
  leaves each at its rate.
- A chip of two devices (tpu7x) has one set of links: groups that hold one device of each chip get
  half of it; between the two of a chip there are 6 links' worth. Slices are connected by the
  data-centre network.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rome.cost.collectives import Collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of a chip, per second.

    Peaks and HBM bandwidths: cloud.google.com/tpu/docs. Links: 90 % of the nominal rate there (1200
    GB/s over 12 directions on v5p and tpu7x, 800 over 8 on v6e, 400 over 8 on v5e). H100 SXM:
    NVIDIA's data sheet, dense bfloat16, NVLink's 450 GB/s a direction, 400 Gb/s of InfiniBand.

    Attributes:
      name: as in a topology.
      peak_flops: in bfloat16.
      usable: bytes of HBM that the compiler lets one device have: the limit that libtpu 0.0.42.1
        names when a program exceeds it; of an H100 the share that JAX is given
        (rome.train.xla_flags).
      hbm: bytes of memory traffic.
      link: bytes over one link in one direction.
      dcn: bytes over the data-centre network.
      dimensions: of the torus; 0: a switch.
      wraps_at: a dimension of a multiple of this many chips is a ring.
      devices: JAX devices a chip.
    """

    name: str
    peak_flops: float
    usable: float
    hbm: float
    link: float
    dcn: float
    dimensions: int
    wraps_at: int
    devices: int = 1

    @property
    def device_flops(self) -> float:
        """Return the peak of one JAX device."""
        return self.peak_flops / self.devices

    @property
    def device_hbm(self) -> float:
        """Return the memory bandwidth of one JAX device."""
        return self.hbm / self.devices

    @property
    def device_dcn(self) -> float:
        """Return the data-centre bandwidth of one JAX device."""
        return self.dcn / self.devices


CHIPS = {
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 810e9, 45e9, 3.1e9, 2, wraps_at=16),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 90e9, 6.25e9, 3, wraps_at=4),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 90e9, 12.5e9, 2, wraps_at=16),
    "tpu7x": Chip("tpu7x", 2307e12, 94.75 * GIB, 7380e9, 90e9, 12.5e9, 3, wraps_at=4, devices=2),
    "h100": Chip("h100", 989e12, 0.92 * 84942979072, 3352e9, 405e9, 45e9, 0, wraps_at=1),
}
CORE_LINKS = 6  # the path between the two devices of a tpu7x chip, in links


@dataclasses.dataclass(frozen=True)
class Sent:
    """All runs of one kind of collective along one set of mesh axes; for one device.

    `largest` is the op_name of its costliest member.
    """

    kind: str
    axes: str
    runs: float
    bytes: float
    seconds: float
    largest: str


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one device needs at least for one run of a program, by resource.

    Attributes:
      compute: at the chip's peak.
      memory: at the peak of its bandwidth.
      collectives: of all of them, one after the other.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """Return the seconds where all that can happens at the same time."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """Return the seconds where no collective is hidden behind compute."""
        return max(self.compute, self.memory) + self.collectives


class _Member(NamedTuple):
    """A collective with the bytes that one device sends and the seconds of one run."""

    collective: Collective
    bytes: float
    seconds: float


class _Dimension(NamedTuple):
    """A torus dimension of a group: members along it, chips between two, whether it is a ring."""

    members: int
    stride: int
    ring: bool


def sent(found: Sequence[Collective], mesh: Mesh, chip: Chip) -> list[Sent]:
    """Sum collectives by kind and mesh axes, the longest first."""
    places = np.array([place(device) for device in mesh.devices.flat])
    by_kind: dict[tuple[str, str], list[_Member]] = {}
    for collective in found:
        key = (collective.kind, mesh_axes(collective.groups, mesh))
        member = _Member(collective, *cost(collective, places, chip))
        by_kind.setdefault(key, []).append(member)
    rows = [_sum_members(kind, axes, members) for (kind, axes), members in by_kind.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def mesh_axes(groups: np.ndarray, mesh: Mesh) -> str:
    """Return the axes along which the members of a group differ, such as "fsdp+expert"."""
    places = np.array(np.unravel_index(groups, mesh.devices.shape))  # [axes, groups, members]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = zip(mesh.axis_names, differs, strict=True)
    return "+".join(name for name, varies in axes if varies)


def place(device: Any) -> tuple[int, ...]:
    """Return where a device is: (slice, core, x, y, z)."""
    slice_number = getattr(device, "slice_index", 0) or 0
    core = getattr(device, "core_on_chip", 0) or 0
    coordinates = getattr(device, "coords", (device.id, 0, 0))
    return (slice_number, core, *coordinates)


def cost(one: Collective, places: np.ndarray, chip: Chip) -> tuple[float, float]:
    """Return the bytes that one device sends in one run, and its seconds.

    Args:
      one: the collective.
      places: `place` of every device of the mesh.
      chip: of the devices.
    """
    extent = places.max(axis=0) + 1
    if one.kind == "collective-permute":
        return _permute_cost(one, places, extent, chip)
    n = one.groups.shape[1]
    group = places[one.groups[0]]
    rounds = 2 if one.kind == "all-reduce" else 1
    share = one.payload * (n - 1) / n * rounds
    slices = set(group[:, 0])
    if len(slices) > 1:
        return share, share / chip.device_dcn
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        return share, _exchange_seconds(one.payload, group, extent, chip)
    return share, share / bandwidth(group, extent, chip)


def bandwidth(group: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """Return the bytes a second that enter each device of a group over all its dimensions.

    Args:
      group: `place` of each member.
      extent: size of each coordinate over the mesh.
      chip: of the devices.
    """
    if not chip.dimensions:
        return chip.link
    links = 0.0
    for dimension in _dimensions(group, extent, chip):
        links += (2 if dimension.ring else 1) / dimension.stride
    if not links:
        return CORE_LINKS * chip.link
    cores = len(set(group[:, 1]))
    return links * chip.link * cores / chip.devices


def _sum_members(kind: str, axes: str, members: list[_Member]) -> Sent:
    costliest = max(members, key=lambda member: member.collective.times * member.seconds)
    return Sent(
        kind,
        axes,
        runs=sum(member.collective.times for member in members),
        bytes=sum(member.collective.times * member.bytes for member in members),
        seconds=_total_seconds(members),
        largest=costliest.collective.op_name,
    )


def _total_seconds(members: list[_Member]) -> float:
    """Return the seconds of all runs, one after the other.

    A permutation and its inverse use the two directions of the same links at once.
    """
    seconds_of: dict[bytes, float] = {}
    inverse_of: dict[bytes, bytes] = {}
    for member in members:
        groups = member.collective.groups
        key = group_key(groups)
        inverse_of[key] = group_key(groups[:, ::-1])
        seconds_of[key] = seconds_of.get(key, 0.0) + member.collective.times * member.seconds
    if members[0].collective.kind != "collective-permute":
        return sum(seconds_of.values())
    total = 0.0
    for key, seconds in seconds_of.items():
        inverse = inverse_of[key]
        longer = max(seconds, seconds_of.get(inverse, 0.0))
        shared = inverse in seconds_of and inverse != key
        total += longer / (2 if shared else 1)  # the inverse adds the other half
    return total


def group_key(groups: np.ndarray) -> bytes:
    return np.array(sorted(groups.tolist())).tobytes()


def _permute_cost(
    one: Collective, places: np.ndarray, extent: np.ndarray, chip: Chip
) -> tuple[float, float]:
    pairs = [(sender, receiver) for sender, receiver in one.groups if sender != receiver]
    if not pairs:
        return 0.0, 0.0
    longest = max(_path(places[a], places[b], extent, chip) for a, b in pairs)
    return one.payload, longest * one.payload / chip.link


def _dimensions(group: np.ndarray, extent: np.ndarray, chip: Chip) -> list[_Dimension]:
    """Return the torus dimensions that a group extends over."""
    found = []
    for axis in range(2, group.shape[1]):
        taken = sorted(set(group[:, axis].tolist()))
        if len(taken) < 2:
            continue
        stride = math.gcd(*(b - a for a, b in itertools.pairwise(taken)))
        size = int(extent[axis])
        covers = len(taken) * stride == size
        found.append(_Dimension(len(taken), stride, covers and size % chip.wraps_at == 0))
    return found


def _exchange_seconds(payload: float, group: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """Return the seconds in which every device sends an equal part of its payload to every other.

    Half of all bytes cross the middle of each dimension.
    """
    if not chip.dimensions:
        return payload * (len(group) - 1) / len(group) / chip.link
    dimensions = _dimensions(group, extent, chip)
    if not dimensions:
        return payload / 2 / (CORE_LINKS * chip.link)
    crossing = []
    for members, stride, ring in dimensions:
        crossing.append(payload * members * stride / (8 if ring else 4))
    return max(crossing) * chip.devices / chip.link


def _path(a: np.ndarray, b: np.ndarray, extent: np.ndarray, chip: Chip) -> float:
    """Return the length of a message's path from a to b, in links that it has for itself.

    Messages that share its links make it longer.
    """
    if a[0] != b[0]:
        return chip.link / chip.device_dcn
    if not chip.dimensions:
        return 1.0
    steps = 0
    for axis in range(2, len(a)):
        size = int(extent[axis])
        apart = abs(int(a[axis]) - int(b[axis]))
        is_ring = size % chip.wraps_at == 0
        steps += min(apart, size - apart) if is_ring else apart
    return steps * chip.devices if steps else 1 / CORE_LINKS
