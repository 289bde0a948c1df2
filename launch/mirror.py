"""Keeps copies of the trainer's newest weights on the disk of an engine's host.

On the engine's host:

    python -m launch.mirror --source /shared/run/weights --local /nvme/weights --port 30100

The trainer's side is `Engine(url, mirror=MirrorClient("http://host:30100"))` and
`write_checkpoint(..., delta=True)`; weights are then copied as differences where possible.

POST /fetch {"path": DIRECTORY under --source} answers {"path": the copy, "way": "delta" | "full" |
"held", "bytes", "seconds"}.
"""

from __future__ import annotations

import argparse
import logging
import pathlib

from aiohttp import web

from rome.engine.mirror import Mirror, make_app


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch.mirror",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        required=True,
        type=pathlib.Path,
        help="the trainer's weights directory, as this host sees it",
    )
    parser.add_argument(
        "--local",
        required=True,
        type=pathlib.Path,
        help="directory of the copies, on a fast disk that the engine can read",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; only the trainer needs to reach it",
    )
    parser.add_argument("--port", type=int, default=30100)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    app = make_app(Mirror(arguments.local), arguments.source)
    web.run_app(app, host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
