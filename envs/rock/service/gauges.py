"""What the admin's /metrics shows of its present state; what happened is counted where it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from envs.rock.service.fleet import Resources
from envs.rock.service.records import ENDED

if TYPE_CHECKING:
    from envs.rock.service.admin import Admin


def describe(admin: Admin) -> None:
    """Add the gauges of an admin to its metrics. They are read when somebody asks."""

    def states() -> dict:
        counts = {(("state", state),): 0.0 for state in ("queued", "starting", "running")}
        for record in admin.records.values():
            if record.state not in ENDED:
                counts[("state", record.state),] += 1
        return counts

    gauge = admin.metrics.gauge
    gauge("rock_sandboxes", "Sandboxes by state.", states)
    gauge(
        "rock_waiting",
        "Starts in the queue, by user.",
        lambda: {(("user", user),): number for user, number in admin.queue.users().items()},
    )
    gauge("rock_workers", "Workers that are there.", lambda: {(): len(admin.members)})
    gauge("rock_snapshots", "Snapshots kept.", lambda: {(): len(admin.snapshots)})
    gauge(
        "rock_ready",
        "Sandboxes kept ready, by template.",
        lambda: {(("template", name),): number for name, number in admin.templates.ready().items()},
    )
    for field in Resources._fields:
        gauge(
            f"rock_worker_{field}_used",
            "Given out, by worker.",
            lambda field=field: {
                (("worker", name),): getattr(member.used, field)
                for name, member in admin.members.items()
            },
        )
        gauge(
            f"rock_worker_{field}_total",
            "To give out, by worker.",
            lambda field=field: {
                (("worker", name),): getattr(member.total, field)
                for name, member in admin.members.items()
            },
        )
