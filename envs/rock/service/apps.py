"""The application of a worker: the machine's sandboxes served over HTTP, and signs of life to the
admin as long as it is served.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from envs.rock.service.auth import Tokens
from envs.rock.service.server import Server
from envs.rock.service.worker import Worker, report
from envs.rock.wire.api import TO_WORKER, WORKER_USER
from envs.rock.wire.client import Client


def make_worker(
    worker: Worker, tokens: Mapping[str, str], admin_url: str, registration: Mapping[str, Any]
) -> web.Application:
    """registration: the worker's name, the url at which the admin reaches it, and what it gives out
    (fleet.Resources).
    """
    application = Server(
        worker, TO_WORKER, Tokens(tokens), "ROCK worker", only_for=WORKER_USER
    ).app()

    async def life(_: web.Application) -> AsyncIterator[None]:
        client = Client(admin_url, tokens[WORKER_USER])
        signs = asyncio.create_task(
            report(worker, client, {**registration, "kinds": await worker.kinds()})
        )
        signs.add_done_callback(
            lambda task: (
                task.cancelled()
                or (
                    task.exception()
                    and logging.error("the admin refused this worker", exc_info=task.exception())
                )
            )
        )
        yield
        signs.cancel()
        await asyncio.gather(signs, return_exceptions=True)
        await worker.close()
        await client.close()

    application.cleanup_ctx.append(life)
    return application
