"""Gauges of an admin's present state on its /metrics page.

Events are counted where they happen; these values are read when the page is asked for.
"""

from collections.abc import Callable, Mapping, Sized
from typing import Protocol

from envs.rock.service.fleet import Member, Resources
from envs.rock.service.metrics import Labels, Metrics
from envs.rock.service.records import ENDED, Record

ACTIVE = ("queued", "starting", "running")


class Queue(Protocol):
    """The part of the queue that is shown."""

    def users(self) -> dict[str, int]:
        """Return the number of waiting starts by user."""


class Pool(Protocol):
    """The part of the templates that is shown."""

    def ready(self) -> dict[str, int]:
        """Return the number of sandboxes kept ready by template."""


def describe(
    metrics: Metrics,
    records: Mapping[str, Record],
    queue: Queue,
    members: Mapping[str, Member],
    snapshots: Sized,
    templates: Pool,
) -> None:
    """Add the gauges of an admin to its metrics.

    The arguments are kept and read at each request, so they must be the admin's own collections.
    """

    def sandboxes_by_state() -> dict[Labels, float]:
        counts = dict.fromkeys(ACTIVE, 0.0)
        for record in records.values():
            if record.state not in ENDED:
                counts[record.state] += 1
        return _labelled("state", counts)

    def workers() -> dict[Labels, float]:
        return {(): len(members)}

    def known_snapshots() -> dict[Labels, float]:
        return {(): len(snapshots)}

    gauge = metrics.gauge
    gauge("rock_sandboxes", "Sandboxes by state.", sandboxes_by_state)
    gauge("rock_waiting", "Starts in the queue, by user.", lambda: _labelled("user", queue.users()))
    gauge("rock_workers", "Workers that are there.", workers)
    gauge("rock_snapshots", "Snapshots kept.", known_snapshots)
    gauge(
        "rock_ready",
        "Sandboxes kept ready, by template.",
        lambda: _labelled("template", templates.ready()),
    )
    for field in Resources._fields:
        used = _reader(members, "used", field)
        total = _reader(members, "total", field)
        gauge(f"rock_worker_{field}_used", "Given out, by worker.", used)
        gauge(f"rock_worker_{field}_total", "To give out, by worker.", total)


def _reader(
    members: Mapping[str, Member], which: str, field: str
) -> Callable[[], dict[Labels, float]]:
    """Return a function that reads one field of every worker's `used` or `total` resources."""

    def read() -> dict[Labels, float]:
        values = {name: getattr(getattr(member, which), field) for name, member in members.items()}
        return _labelled("worker", values)

    return read


def _labelled(label: str, values: Mapping[str, float]) -> dict[Labels, float]:
    return {((label, name),): value for name, value in values.items()}
