r"""Serve sandboxes to other machines: an admin that gives them out, and workers that run them.

    python -m launch.rock admin     # with a worker in it, on this machine's loopback
    python -m launch.rock admin --workers=0 --host=10.0.0.5 --public --token_file=tokens
    python -m launch.rock worker --admin=http://10.0.0.5:8730 --host=10.0.0.6 \
        --public --token_file=tokens
    python -m launch.rock admin --host=10.0.0.5 --public --token_file=tokens \
        --ray_address=auto          # a worker on every node (requirements-ray.txt)

The token file has one "name token" a line and mode 600. It is made at the first start; with
--public it must be made by hand, and be the same for the admin and the workers. The name "worker"
is reserved for the workers. Callers use SandboxConfig(backend="remote", url=..., token=...).

The admin also serves environments (/apis/v1/envs/gem), /metrics and /openapi.json. The connection
is not encrypted: between machines put it behind a proxy with TLS, or into a private network.
"""

import dataclasses
import functools
import socket
import sys

from absl import app, flags

import envs.games
import envs.problems
import envs.tasks.harbor
import envs.tasks.terminal
import envs.worlds  # noqa: F401 (these imports register the environments that the admin serves)
from envs.gem.server import GemService
from envs.rock.service.command import ROLES, Options, UsageError, run
from launch._main import parse_flags

FLAGS = flags.FLAGS
flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; all but loopback need --public.")
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
    "admin: 1 for a worker in its own process, 0 for none.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_list("backends", ["embedded"], "Sandboxes that a worker makes: embedded, docker.")
flags.DEFINE_float(
    "auto_clear_seconds",
    300.0,
    "admin: idle time after which a sandbox is removed.",
    lower_bound=1.0,
)
flags.DEFINE_string(
    "ray_address",
    None,
    "admin: a Ray cluster (auto, HOST:PORT) each of whose nodes gets a worker; the admin's own"
    " process has none then.",
)
flags.DEFINE_string(
    "ray_resource", "", "admin: use only nodes that offer this resource of Ray's; empty: all."
)
flags.DEFINE_string("admin", None, "worker: address of the admin.")
flags.DEFINE_string("name", socket.gethostname(), "worker: its name.")
flags.DEFINE_string(
    "advertise",
    None,
    "worker: where the admin reaches it; admin with --ray_address: where its workers reach it."
    " By default http://HOST:PORT.",
)
flags.DEFINE_integer("memory_mb", 0, "Memory to give out; 0: four fifths of what is free.")
flags.DEFINE_float("cpus", 0.0, "Processors to give out; 0: 32 times this machine's.")
flags.DEFINE_integer("sandboxes", 0, "Sandboxes at most; 0: as file descriptors allow.")


def main(argv: list[str]) -> None:
    """Run the service that the first argument names."""
    if len(argv) != 2 or argv[1] not in ROLES:
        sys.exit(
            "launch.rock: say what to start: python -m launch.rock admin|worker (--help shows the"
            " flags)"
        )
    values = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Options)}
    # the admin's own guard has checked the caller's token before
    environments = GemService(None, anonymous=True)
    try:
        run(argv[1], Options(**values), extend=environments.mount)
    except UsageError as error:
        sys.exit(f"launch.rock: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, "launch.rock"))
