"""ROCK's services: an admin that gives out sandboxes, and workers on other machines that have them.

    python -m launch.rock admin                        an admin with a worker in it, on this machine's loopback
    python -m launch.rock admin --workers=0 --host=10.0.0.5 --public --token_file=tokens
    python -m launch.rock worker --admin=http://10.0.0.5:8730 --host=10.0.0.6 --public --token_file=tokens
    python -m launch.rock admin --host=10.0.0.5 --public --token_file=tokens --ray_address=auto    a worker on every node of a Ray cluster (requirements-ray.txt)

Tokens: one file, "name token" a line, mode 600; made at the first start, with --public by hand (the
same for admin and workers). The name "worker" is the workers' own. Callers use
SandboxConfig(backend="remote", url=..., token=...). The admin also serves environments
(/apis/v1/envs/gem), E2B's /sandboxes, /metrics and /openapi.json. The connection is not encrypted:
between machines put it behind a proxy with TLS, or into a network that is yours alone.
"""

import asyncio
import ipaddress
import logging
import pathlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from absl import app, flags
from aiohttp import web

import envs.games
import envs.problems
import envs.tasks.harbor
import envs.tasks.terminal
import envs.worlds  # noqa: F401
from envs.gem.server import GemService
from envs.rock.service import e2b
from envs.rock.service.admin import Admin
from envs.rock.service.apps import make_worker
from envs.rock.service.auth import Tokens, load_or_make_tokens, load_tokens
from envs.rock.service.fleet import machine_resources
from envs.rock.service.hub import EnvHub
from envs.rock.service.metrics import Metrics
from envs.rock.service.server import RUNNER, Server
from envs.rock.service.worker import Worker
from envs.rock.wire.api import TO_ADMIN, WORKER_USER

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on. Another than loopback needs --public."
)
flags.DEFINE_integer(
    "port",
    None,
    "Port; 0 chooses one. 8730 for an admin, 8731 for a worker by default.",
    lower_bound=0,
    upper_bound=65535,
)
flags.DEFINE_bool("public", False, "Listen where other machines can reach it.")
flags.DEFINE_string("data", "~/.rock", "Directory of the hub and of the token file.")
flags.DEFINE_string("token_file", None, "Names and tokens; by default DATA/tokens.")
flags.DEFINE_integer(
    "workers",
    1,
    "admin: 1 has a worker in its own process, 0 has none.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_list("backends", ["embedded"], "What a worker makes: embedded, docker.")
flags.DEFINE_float(
    "auto_clear_seconds",
    300.0,
    "admin: a sandbox that nobody used for so long is removed.",
    lower_bound=1.0,
)
flags.DEFINE_string(
    "ray_address",
    None,
    "admin: a Ray cluster (auto, HOST:PORT) whose nodes get a worker each; none in the admin's own"
    " process then.",
)
flags.DEFINE_string(
    "ray_resource", "", "admin: only nodes that offer this resource of Ray's; empty: all."
)
flags.DEFINE_string("admin", None, "worker: address of the admin.")
flags.DEFINE_string("name", socket.gethostname(), "worker: its name.")
flags.DEFINE_string(
    "advertise",
    None,
    "worker: where the admin reaches it; admin with --ray_address: where its workers do; by default"
    " http://HOST:PORT.",
)
flags.DEFINE_integer("memory_mb", 0, "Memory to give out; 0: four fifths of what is free.")
flags.DEFINE_float("cpus", 0.0, "Processors to give out; 0: 32 times this machine's.")
flags.DEFINE_integer("sandboxes", 0, "Sandboxes at most; 0: as descriptors allow.")


def make_admin(
    data: pathlib.Path,
    tokens: dict[str, str],
    worker: Worker | None,
    auto_clear_seconds: float,
    resources: tuple = (),
    make_fleet: Callable[[Admin], Any] | None = None,
) -> web.Application:
    """The admin's application; its life is the application's. make_fleet: what brings workers by
    itself (ray_fleet.RayFleet).
    """
    metrics = Metrics()
    admin = Admin(EnvHub(data), tokens[WORKER_USER], metrics, auto_clear_seconds)
    server = Server(admin, TO_ADMIN, Tokens(tokens), "ROCK admin", metrics=metrics)
    application = server.app()
    e2b.mount(server, admin, application)
    GemService(None, anonymous=True).mount(
        application
    )  # the admin's own guard has asked for a token before

    async def life(_: web.Application) -> AsyncIterator[None]:
        if worker is not None:
            admin.add_worker(
                "local",
                worker,
                await worker.kinds(),
                machine_resources(*resources),
                worker.incarnation,
                local=True,
            )
        await admin.start()
        fleet = make_fleet(admin) if make_fleet else None
        if fleet:
            await fleet.start()
        yield
        await admin.close()
        if fleet:
            await fleet.close()

    application.cleanup_ctx.append(life)
    return application


async def serve(make: Callable[[str], web.Application], host: str, port: int, what: str) -> None:
    """Until SIGTERM or Ctrl-C. make: the application, for the address that it has."""
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        sys.exit(
            f"launch.rock: cannot listen on {host}:{port} ({error}); choose another --host or"
            " --port"
        )
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    runner = web.AppRunner(make(url), **RUNNER)
    ended = asyncio.Event()
    await runner.setup()
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # after the setup: Ray, where it is used, sets its own
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        await web.SockSite(runner, listener).start()
        print(f"{what} at {url}", flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in ("admin", "worker"):
        sys.exit(
            "launch.rock: say what to start: python -m launch.rock admin|worker (--help shows the"
            " flags)"
        )
    if unknown := [name for name in FLAGS.backends if name not in ("embedded", "docker")]:
        sys.exit(
            f"launch.rock: --backends={unknown[0]} is unknown; a worker makes embedded, docker"
        )
    if argv[1] == "worker" and not (FLAGS.admin or "").startswith(("http://", "https://")):
        sys.exit(
            "launch.rock: a worker needs --admin, the address of the admin that it works for, as"
            f" http://HOST:PORT{f'; not {FLAGS.admin!r}' if FLAGS.admin else ''}"
        )
    if FLAGS.public and not FLAGS.token_file:
        sys.exit(
            "launch.rock: with --public name the file of names and tokens by --token_file=FILE, the"
            " same on every machine: one that is made up here no other would know"
        )
    if not FLAGS.public and not _is_loopback(FLAGS.host):
        sys.exit(
            f"launch.rock: --host={FLAGS.host} can be reached from other machines; add --public if"
            " that is meant"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    data = pathlib.Path(FLAGS.data).expanduser()
    token_file = (
        pathlib.Path(FLAGS.token_file).expanduser() if FLAGS.token_file else data / "tokens"
    )
    try:
        tokens = load_tokens(token_file) if FLAGS.public else load_or_make_tokens(token_file)
        if WORKER_USER not in tokens:
            raise ValueError(
                f'{token_file} has no token of the name "{WORKER_USER}", by which admin and workers'
                " know each other"
            )
    except (OSError, ValueError) as error:
        sys.exit(f"launch.rock: {error}")
    print(f"tokens: {token_file}", flush=True)
    resources = (FLAGS.memory_mb, FLAGS.cpus, 0, FLAGS.sandboxes)
    if argv[1] == "admin":
        worker = Worker(tuple(FLAGS.backends)) if FLAGS.workers and not FLAGS.ray_address else None
        make, port = (
            lambda url: make_admin(
                data, tokens, worker, FLAGS.auto_clear_seconds, resources, _ray_fleet(url, tokens)
            ),
            8730,
        )
    else:
        worker, port = Worker(tuple(FLAGS.backends)), 8731
        make = lambda url: make_worker(
            worker,
            tokens,
            FLAGS.admin,
            {
                "name": FLAGS.name,
                "url": FLAGS.advertise or url,
                **machine_resources(*resources)._asdict(),
            },
        )
    asyncio.run(serve(make, FLAGS.host, port if FLAGS.port is None else FLAGS.port, argv[1]))


def _ray_fleet(url: str, tokens: dict[str, str]) -> Callable[[Admin], Any] | None:
    if not FLAGS.ray_address:
        return None
    if not FLAGS.advertise and FLAGS.host in ("0.0.0.0", "::"):
        sys.exit(
            f"launch.rock: with --ray_address and --host={FLAGS.host} say by"
            " --advertise=http://HOST:PORT where the nodes reach this admin"
        )
    try:
        from envs.rock.service.ray_fleet import RayFleet  # here: Ray is nobody else's requirement
    except ImportError as error:
        sys.exit(
            f"launch.rock: --ray_address needs Ray ({error}); pip install -r requirements-ray.txt"
        )
    return lambda admin: RayFleet(
        admin,
        FLAGS.advertise or url,
        {WORKER_USER: tokens[WORKER_USER]},
        FLAGS.ray_address,
        tuple(FLAGS.backends),
        FLAGS.ray_resource,
        (FLAGS.memory_mb, FLAGS.cpus, FLAGS.sandboxes),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    app.run(main)
