"""An admin and workers for tests, on the test's own event loop and on ports of their own."""

import contextlib
import pathlib
from collections.abc import AsyncIterator

from aiohttp import web

from envs.gem.server import GemService
from envs.rock import SandboxConfig
from envs.rock.service.apps import make_admin, make_worker
from envs.rock.service.fleet import Resources
from envs.rock.service.serving import listen, make_runner, url_of
from envs.rock.service.worker import Worker

TOKENS = {
    "default": "token-of-the-default-user",
    "other": "token-of-another-user",
    "worker": "token-of-the-workers",
}
WORKER_RESOURCES = Resources(4096, 8.0, 1000, 50)


class Site:
    """A running application."""

    def __init__(self, url: str, app: web.Application):
        self.url = url
        self.app = app

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
async def site(app: web.Application, listener=None) -> AsyncIterator[Site]:
    listener = listener or listen("127.0.0.1", 0)
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield Site(url_of("127.0.0.1", listener), app)
    finally:
        await runner.cleanup()
        listener.close()


@contextlib.asynccontextmanager
async def admin(
    data: pathlib.Path,
    worker: bool = True,
    auto_clear: float = 300.0,
    resources: tuple = (),
    backends: tuple[str, ...] = ("embedded",),
) -> AsyncIterator[Site]:
    app = make_admin(
        data,
        TOKENS,
        Worker(backends) if worker else None,
        auto_clear,
        resources,
        extend=GemService(None, anonymous=True).mount,
    )
    async with site(app) as running:
        yield running


@contextlib.asynccontextmanager
async def worker_of(
    admin_url: str,
    name: str,
    resources: Resources = WORKER_RESOURCES,
    worker: Worker | None = None,
) -> AsyncIterator[Site]:
    """A worker with a port of its own, known to the admin when this returns."""
    # listens before the worker registers, since the registration names the port
    listener = listen("127.0.0.1", 0)
    url = url_of("127.0.0.1", listener)
    registration = {"name": name, "url": url, **resources._asdict()}
    app = make_worker(worker or Worker(), TOKENS, admin_url, registration)
    async with site(app, listener) as running:
        yield running
