"""Heartbeats: how a worker stays known to an admin on another machine."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from envs.rock.errors import SandboxError
from envs.rock.service.fleet import DEAD_SECONDS, HEARTBEAT_SECONDS
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from envs.rock.wire.errors import Disconnected

log = logging.getLogger("rock.worker")


async def report(worker: Worker, admin: Client, registration: Mapping[str, Any]) -> None:
    """Register a worker with an admin and send heartbeats until cancelled.

    An admin that counts the worker as lost, or that was restarted, knows none of its sandboxes. The
    worker then ends them all and registers again. So it does after DEAD_SECONDS without an answer:
    the admin is dead, or counts the worker as lost, and only the worker can end the sandboxes.

    Raises:
      SandboxError: the admin does not accept the workers' token.
    """
    is_registered = False
    heard = time.monotonic()
    while True:
        try:
            if is_registered:
                await _send_heartbeat(worker, admin)
            else:
                request = {**registration, "incarnation": worker.incarnation}
                await admin.ask("worker/register", request)
                log.info("registered with %s", admin.url)
                is_registered = True
            heard = time.monotonic()
        except Disconnected:
            log.warning("the admin at %s does not answer", admin.url)
            if is_registered and time.monotonic() - heard > DEAD_SECONDS:
                await worker.close()
                is_registered = False
        except SandboxError as error:
            if error.code in ("unauthorized", "forbidden"):
                raise
            if error.code == "not_found":
                log.warning("the admin does not know this worker: ending all of its sandboxes")
                await worker.close()
                is_registered = False
            else:  # perhaps it is busy: the next heartbeat may get through
                log.warning("the admin at %s refused a heartbeat: %s", admin.url, error)
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def _send_heartbeat(worker: Worker, admin: Client) -> None:
    request = {
        "incarnation": worker.incarnation,
        "ended": worker.ended(),
        "held": worker.held(),
    }
    answer = await admin.ask("worker/heartbeat", request)
    await worker.drop(map(str, answer.get("forgotten", ())))
