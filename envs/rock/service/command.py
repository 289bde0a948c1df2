"""The command behind launch/rock.py: checks its flags, then serves an admin or a worker."""

import asyncio
import dataclasses
import importlib.util
import ipaddress
import logging
import os
import pathlib
import socket
import urllib.parse
from collections.abc import Callable, Sequence

from aiohttp import web

from envs.rock.service.admin import Admin
from envs.rock.service.apps import Fleet, make_admin, make_worker
from envs.rock.service.auth import load_or_make_tokens, load_tokens
from envs.rock.service.fleet import is_wildcard, machine_resources
from envs.rock.service.serving import listen, serve, url_of
from envs.rock.service.worker import Worker
from envs.rock.wire.operations import WORKER_USER

ROLES = ("admin", "worker")
BACKENDS = ("embedded", "docker")
DEFAULT_PORTS = {"admin": 8730, "worker": 8731}


class UsageError(ValueError):
    """The command cannot be carried out; the message says which flag to change."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the command's flags, which launch/rock.py describes."""

    host: str
    port: int | None
    public: bool
    data: str
    token_file: str | None
    workers: int
    backends: Sequence[str]
    auto_clear_seconds: float
    ray_address: str | None
    ray_resource: str
    admin: str | None
    name: str
    advertise: str | None
    memory_mb: int
    cpus: float
    sandboxes: int


def run(role: str, options: Options, extend: Callable[[web.Application], None]) -> None:
    """Serve an admin or a worker until SIGTERM or SIGINT.

    Args:
      role: one of ROLES.
      options: the flags.
      extend: adds more routes to an admin's application.

    Raises:
      UsageError: the flags do not fit together, or the token file or the address cannot be used.
    """
    _check(role, options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    tokens = _load_tokens(options)
    listener = _listen(options.host, _port(role, options))
    url = url_of(options.host, listener)
    if role == "admin":
        application = _admin_application(options, tokens, url, extend)
    else:
        application = _worker_application(options, tokens, url)
    asyncio.run(serve(application, listener, announcement=f"{role} at {url}"))


def _check(role: str, options: Options) -> None:
    for backend in options.backends:
        if backend not in BACKENDS:
            raise UsageError(
                f"--backends={backend} is unknown; a worker makes {', '.join(BACKENDS)}"
            )
    admin = options.admin or ""
    if role == "worker" and not admin.startswith(("http://", "https://")):
        given = f"; not {admin!r}" if admin else ""
        raise UsageError(
            f"a worker needs --admin, the address of its admin, as http://HOST:PORT{given}"
        )
    if options.public and not options.token_file:
        raise UsageError(
            "with --public name the file of names and tokens by --token_file=FILE, the same on"
            " every machine: no other machine would know tokens that are made here"
        )
    if not options.public and not _is_loopback(options.host):
        raise UsageError(
            f"--host={options.host} can be reached from other machines; add --public if that is"
            " meant"
        )
    if role == "worker":
        address = options.advertise or f"//{options.host}"
        if is_wildcard(urllib.parse.urlsplit(address).hostname or ""):
            raise UsageError(
                f"a worker on {options.host} must say by --advertise=http://HOST:PORT where its"
                " admin reaches it; all addresses of a machine are none"
            )
    if role == "admin" and options.ray_address:
        _check_ray(options)


def _check_ray(options: Options) -> None:
    if not options.advertise and options.host in ("0.0.0.0", "::"):
        raise UsageError(
            f"with --ray_address and --host={options.host} say by --advertise=http://HOST:PORT"
            " where the nodes reach this admin"
        )
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray_address needs Ray; pip install -r requirements-ray.txt")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(role: str, options: Options) -> int:
    return DEFAULT_PORTS[role] if options.port is None else options.port


def _load_tokens(options: Options) -> dict[str, str]:
    path = _data(options) / "tokens"
    if options.token_file:
        path = _expand("--token_file", options.token_file)
    try:
        tokens = load_tokens(path) if options.public else load_or_make_tokens(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    if WORKER_USER not in tokens:
        raise UsageError(
            f'{path} has no token of the name "{WORKER_USER}", by which admin and workers know each'
            " other"
        )
    print(f"tokens: {path}", flush=True)
    return tokens


def _data(options: Options) -> pathlib.Path:
    return _expand("--data", options.data)


def _expand(flag: str, path: str) -> pathlib.Path:
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{flag}={path} is below a home directory, which this user does not have (HOME is not"
            f" set, and user id {os.getuid()} has no entry in passwd); set HOME, or give"
            f" {flag} a path without ~"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error}); choose another --host or --port"
        ) from error


def _admin_application(
    options: Options,
    tokens: dict[str, str],
    url: str,
    extend: Callable[[web.Application], None],
) -> web.Application:
    worker = None
    if options.workers and not options.ray_address:
        worker = Worker(tuple(options.backends))
    resources = (options.memory_mb, options.cpus, 0, options.sandboxes)

    def make_fleet(admin: Admin) -> Fleet:
        from envs.rock.service.ray_fleet import RayFleet  # imports Ray, which is optional

        return RayFleet(
            admin,
            options.advertise or url,
            {WORKER_USER: tokens[WORKER_USER]},
            options.ray_address or "auto",
            tuple(options.backends),
            options.ray_resource,
            (options.memory_mb, options.cpus, options.sandboxes),
        )

    return make_admin(
        _data(options),
        tokens,
        worker,
        options.auto_clear_seconds,
        resources,
        make_fleet if options.ray_address else None,
        extend,
    )


def _worker_application(options: Options, tokens: dict[str, str], url: str) -> web.Application:
    resources = machine_resources(options.memory_mb, options.cpus, 0, options.sandboxes)
    registration = {
        "name": options.name,
        "url": options.advertise or url,
        **resources._asdict(),
    }
    worker = Worker(tuple(options.backends))
    return make_worker(worker, tokens, options.admin or "", registration)
