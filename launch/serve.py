"""The embedded engine: serves a Hugging Face checkpoint of a Qwen3-MoE over SGLang's HTTP protocol.

    python -m launch.serve --model_path DIR --port 30000 [--skip_tokenizer_init]

It listens at once; /health answers 200 when everything is loaded and compiled. It runs where JAX
runs, which JAX_PLATFORMS decides.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time

from rome.engine.process import PORT_IN_USE


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model_path",
        "--model-path",
        required=True,
        help="directory with config.json and safetensors",
    )
    parser.add_argument("--port", type=int, default=30000, help="0 takes a free one and prints it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--api_key", "--api-key", help="asked for as a bearer token by every route but health"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights, cache and computation",
    )
    parser.add_argument(
        "--skip_tokenizer_init",
        "--skip-tokenizer-init",
        action="store_true",
        help="ids in, ids out; no text and no stop strings",
    )
    parser.add_argument(
        "--weight_version",
        "--weight-version",
        default="0",
        help="version of the weights that it starts with",
    )
    parser.add_argument("--slots", type=int, default=64, help="sequences whose cache is kept")
    parser.add_argument(
        "--max_context", type=int, default=384, help="tokens of prompt and answer together"
    )
    parser.add_argument("--prefill_rows", type=int, default=8, help="prompts prefilled at once")
    parser.add_argument(
        "--prefill_chunk",
        type=int,
        default=32,
        help="prompt tokens a row and call; prefixes are cached in such chunks",
    )
    parser.add_argument("--decode_rows", type=int, default=16, help="sequences decoded at once")
    parser.add_argument(
        "--decode_steps", type=int, default=4, help="tokens a request and decode call"
    )
    parser.add_argument(
        "--parent_pid", type=int, help="end when the parent is not this process any more"
    )
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    if arguments.parent_pid:
        threading.Thread(target=end_with_parent, args=(arguments.parent_pid,), daemon=True).start()
    listener = listen(arguments.host, arguments.port)
    asyncio.run(serve(arguments, listener))


def end_with_parent(parent: int) -> None:
    """However the parent ended, even killed: an orphan has another parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow happens."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        print(
            f"launch.serve: cannot listen on {host}:{port}: {error.strerror}. Choose another"
            " --port, or end who has it.",
            file=sys.stderr,
        )
        sys.exit(PORT_IN_USE if error.errno == errno.EADDRINUSE else 1)
    return listener


def read_config(model_path: str) -> dict:
    path = pathlib.Path(model_path) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(
            f"launch.serve: cannot read {path} ({error}); --model_path must be a Hugging Face"
            " checkpoint directory"
        )


async def serve(arguments: argparse.Namespace, listener: socket.socket) -> None:
    values = read_config(arguments.model_path)
    from aiohttp import (
        web,
    )  # after the port is taken: what follows imports JAX, which takes seconds

    from rome.model.config import ModelConfig
    from rome.model.tokenizer import Tokenizer
    from rome.serve.programs import Shapes
    from rome.serve.protocol import Bounds
    from rome.serve.scheduler import Scheduler
    from rome.serve.server import Server
    from rome.serve.weights import load_weights

    try:
        config = ModelConfig.from_hf(values)
        tokenizer = None if arguments.skip_tokenizer_init else Tokenizer.load(arguments.model_path)
        shapes = Shapes(
            arguments.slots,
            arguments.max_context,
            arguments.prefill_rows,
            arguments.prefill_chunk,
            min(arguments.decode_rows, arguments.slots),
            arguments.decode_steps,
        )
        if arguments.max_context > config.max_position:
            raise ValueError(
                f"--max_context {arguments.max_context} exceeds the model's {config.max_position}"
                " positions"
            )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"launch.serve: {error}")
    bounds = Bounds(config.vocab_size, arguments.max_context, config.eos_token_id)
    scheduler = Scheduler(
        lambda: load_weights(arguments.model_path, arguments.dtype),
        shapes,
        tokenizer,
        arguments.weight_version,
    )
    server = Server(scheduler, bounds, tokenizer, vars(arguments))
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    logging.info("listening on http://%s:%d", *listener.getsockname()[:2])
    scheduler.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    while not stop.is_set() and scheduler.failure is None:
        try:
            await asyncio.wait_for(stop.wait(), timeout=1.0)
        except TimeoutError:
            continue
    failure = scheduler.failure
    await asyncio.to_thread(scheduler.stop)
    await runner.cleanup()
    if failure is not None:
        sys.exit(f"launch.serve: {failure}")


if __name__ == "__main__":
    main()
