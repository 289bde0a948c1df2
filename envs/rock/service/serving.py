"""Serving an application: a listening socket, its URL, and a server that ends on a signal."""

import asyncio
import signal
import socket

from aiohttp import web

BACKLOG = 1024
MAX_LINE_BYTES = 64 << 10  # of a request line: a path of 4096 bytes fits in a query
SHUTDOWN_SECONDS = 2.0  # callers that wait in rounds ask again after a restart


def listen(host: str, port: int) -> socket.socket:
    """Return a TCP socket that listens on an address; port 0 chooses a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL at which a listening socket is reached under a host's name or address."""
    port = listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def make_runner(application: web.Application) -> web.AppRunner:
    """Return a runner with the settings that the services need.

    A caller that closes its connection cancels the request. Nothing is written to an access log.
    """
    return web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        handler_cancellation=True,
        max_line_size=MAX_LINE_BYTES,
    )


async def serve(
    application: web.Application, listener: socket.socket, announcement: str = ""
) -> None:
    """Serve an application until SIGTERM or SIGINT, or until cancelled.

    Args:
      application: what to serve.
      listener: a socket of `listen`.
      announcement: a line to print once requests are accepted.
    """
    ended = asyncio.Event()
    runner = make_runner(application)
    await runner.setup()
    for number in (signal.SIGTERM, signal.SIGINT):  # after the setup: Ray installs its own handlers
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        await web.SockSite(runner, listener).start()
        if announcement:
            print(announcement, flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()
