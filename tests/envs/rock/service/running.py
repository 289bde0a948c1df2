"""An admin and workers for tests, on the test's own event loop and on ports of their own."""

import contextlib
import pathlib
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from envs.rock import SandboxConfig
from envs.rock.service.apps import make_worker
from envs.rock.service.fleet import Resources
from envs.rock.service.server import RUNNER
from envs.rock.service.worker import Worker
from launch.rock import make_admin

TOKENS = {
    "default": "token-of-the-default-user",
    "other": "token-of-another-user",
    "worker": "token-of-the-workers",
}


class Site:
    """A running application."""

    def __init__(self, url: str, app: web.Application):
        self.url, self.app = url, app

    def config(self, user: str = "default", **fields: object) -> SandboxConfig:
        return SandboxConfig(
            backend="remote",
            url=self.url,
            token=TOKENS[user],
            **{"isolation": "best_available", **fields},
        )

    def headers(self, user: str = "default") -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKENS[user]}"}


@contextlib.asynccontextmanager
async def site(app: web.Application) -> AsyncIterator[Site]:
    runner = web.AppRunner(app, **RUNNER)
    await runner.setup()
    try:
        listener = web.TCPSite(runner, "127.0.0.1", 0)
        await listener.start()
        yield Site(f"http://127.0.0.1:{listener._server.sockets[0].getsockname()[1]}", app)
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def admin(
    data: pathlib.Path,
    worker: bool = True,
    auto_clear: float = 300.0,
    resources: tuple = (),
    backends: tuple[str, ...] = ("embedded",),
) -> AsyncIterator[Site]:
    async with site(
        make_admin(data, TOKENS, Worker(backends) if worker else None, auto_clear, resources)
    ) as running:
        yield running


@contextlib.asynccontextmanager
async def worker_of(
    admin_url: str,
    name: str,
    resources: Resources = Resources(4096, 8.0, 1000, 50),
    worker: Worker | None = None,
) -> AsyncIterator[Site]:
    """A worker with a port of its own, known to the admin when this returns."""
    worker = worker or Worker()
    listener = socket.create_server(
        ("127.0.0.1", 0)
    )  # before the worker registers: it says where it is
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = make_worker(worker, TOKENS, admin_url, {"name": name, "url": url, **resources._asdict()})
    runner = web.AppRunner(app, **RUNNER)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield Site(url, app)
    finally:
        await runner.cleanup()
