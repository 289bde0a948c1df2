"""The web applications of the two services: an admin's and a worker's."""

import asyncio
import logging
import pathlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

from envs.rock.images.hub import EnvHub
from envs.rock.service.admin import Admin
from envs.rock.service.auth import Tokens
from envs.rock.service.fleet import machine_resources
from envs.rock.service.heartbeat import report
from envs.rock.service.metrics import Metrics
from envs.rock.service.server import Server
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from envs.rock.wire.operations import TO_ADMIN, TO_WORKER, WORKER_USER

log = logging.getLogger("rock.service")


class Fleet(Protocol):
    """Starts workers by itself, for as long as an admin runs (see ray_fleet.RayFleet)."""

    async def start(self) -> None:
        """Begin to start workers."""

    async def close(self) -> None:
        """End the workers."""


def make_admin(
    data: pathlib.Path,
    tokens: Mapping[str, str],
    worker: Worker | None,
    auto_clear_seconds: float,
    resources: tuple[int, float, int, int] = (0, 0.0, 0, 0),
    make_fleet: Callable[[Admin], Fleet] | None = None,
    extend: Callable[[web.Application], None] | None = None,
) -> web.Application:
    """Return the application of an admin, which starts and ends with the application.

    Args:
      data: directory of the hub.
      tokens: token by user name, the workers' included.
      worker: a worker in this process; None: workers register over HTTP.
      auto_clear_seconds: idle time after which a sandbox is removed.
      resources: what `worker` gives out, as the arguments of `machine_resources`.
      make_fleet: makes something that starts workers elsewhere.
      extend: adds more routes to the application; the admin checks their callers' tokens.
    """
    metrics = Metrics()
    admin = Admin(EnvHub(data), tokens[WORKER_USER], metrics, auto_clear_seconds)
    server = Server(admin, TO_ADMIN, Tokens(tokens), "ROCK admin", metrics=metrics)
    application = server.app()
    if extend is not None:
        extend(application)

    async def run_admin(_: web.Application) -> AsyncIterator[None]:
        if worker is not None:
            admin.add_worker(
                "local",
                worker,
                await worker.kinds(),
                machine_resources(*resources),
                worker.incarnation,
                find_ended=worker.ended,
            )
        await admin.start()
        fleet = make_fleet(admin) if make_fleet else None
        if fleet:
            await fleet.start()
        yield
        await admin.close()
        if fleet:
            await fleet.close()

    application.cleanup_ctx.append(run_admin)
    return application


def make_worker(
    worker: Worker, tokens: Mapping[str, str], admin_url: str, registration: Mapping[str, Any]
) -> web.Application:
    """Return the application of a worker, which registers with an admin while it is served.

    Args:
      worker: the sandboxes of this machine.
      tokens: token by user name; only the workers' own is used.
      admin_url: where the admin answers.
      registration: the worker's `name`, the `url` at which the admin reaches it, and what it gives
        out (the fields of fleet.Resources).
    """
    server = Server(worker, TO_WORKER, Tokens(tokens), "ROCK worker", only_for=WORKER_USER)
    application = server.app()

    async def run_worker(_: web.Application) -> AsyncIterator[None]:
        client = Client(admin_url, tokens[WORKER_USER])
        kinds = await worker.kinds()
        reporting = asyncio.create_task(report(worker, client, {**registration, "kinds": kinds}))
        reporting.add_done_callback(_log_failure)
        yield
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        await worker.close()
        await client.close()

    application.cleanup_ctx.append(run_worker)
    return application


def _log_failure(reporting: asyncio.Task[None]) -> None:
    if not reporting.cancelled() and reporting.exception():
        log.error("the admin refused this worker", exc_info=reporting.exception())
