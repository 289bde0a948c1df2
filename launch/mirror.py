"""Keeps copies of the trainer's newest weights on the disk of an engine's host, brought there by
deltas.

    python -m launch.mirror --source /shared/run/weights --local /nvme/weights --port 30100        (on the engine's host)

The trainer's side is `Engine(url, mirror=MirrorClient("http://host:30100"))` and
`write_checkpoint(..., delta=True)`.

POST /fetch {"path": DIRECTORY under --source} answers {"path": the copy, "way": "delta" | "full" |
"held", "bytes", "seconds"}.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import pathlib

from aiohttp import web

from rome.engine.mirror import Mirror


def make_app(mirror: Mirror, source: pathlib.Path) -> web.Application:
    """Only what lies under `source` is fetched: whoever reaches this port must not read the host's
    other files.
    """
    one_at_a_time, source = asyncio.Lock(), source.resolve()

    async def fetch(http: web.Request) -> web.Response:
        try:
            body = json.loads(await http.text())
            path, fresh = pathlib.Path(body["path"]).resolve(), bool(body.get("fresh"))
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response(
                {"error": f'send {{"path": DIRECTORY}}, not this: {error!r}'}, status=400
            )
        if path.parent != source:
            return web.json_response(
                {"error": f"{path} does not lie directly in --source {source}"}, status=403
            )
        async with one_at_a_time:
            try:
                transfer = await asyncio.to_thread(mirror.fetch, path, fresh)
            except OSError as error:
                return web.json_response(
                    {
                        "error": (
                            f"{error}; is the trainer's storage mounted here, and is there room in"
                            f" {mirror.local}?"
                        )
                    },
                    status=500,
                )
        logging.info(
            "%s by %s: %d bytes in %.2f s",
            transfer.path.name,
            transfer.way,
            transfer.bytes,
            transfer.seconds,
        )
        return web.json_response(dataclasses.asdict(transfer) | {"path": str(transfer.path)})

    app = web.Application()
    app.router.add_post("/fetch", fetch)
    return app


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
        help="address to listen on; the trainer must reach it, others need not",
    )
    parser.add_argument("--port", type=int, default=30100)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    web.run_app(
        make_app(Mirror(arguments.local), arguments.source),
        host=arguments.host,
        port=arguments.port,
    )


if __name__ == "__main__":
    main()
