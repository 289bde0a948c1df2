"""Serves a Hugging Face checkpoint of a Qwen3-MoE over SGLang's HTTP protocol: the embedded engine.

    python -m launch.serve --model_path DIR --port 30000 [--skip_tokenizer_init]

It listens at once; /health answers 200 when everything is loaded and compiled. It runs where JAX
runs, which JAX_PLATFORMS decides.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import socket
import sys
import threading
import time

from rome.engine.process import PORT_IN_USE
from rome.serve.protocol import MAX_QUEUED_REQUESTS, REQUEST_SECONDS

BACKLOG = 1024


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="launch.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", "--model-path", required=True, help="folder: config.json and safetensors")
    add("--port", type=int, default=30000, help="0 takes a free one and prints it")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--api_key", "--api-key", help="bearer token that every route but health asks for")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all arrays")
    add(
        "--skip_tokenizer_init",
        "--skip-tokenizer-init",
        action="store_true",
        help="token ids in, token ids out; no text and no stop strings",
    )
    add(
        "--expert_parallel",
        "--expert-parallel",
        type=int,
        default=1,
        help="devices that share the experts, in each share of --tensor_parallel",
    )
    add(
        "--tensor_parallel",
        "--tensor-parallel",
        type=int,
        default=1,
        help="devices that share heads, the cache with them, and hidden units of experts",
    )
    add("--weight_version", "--weight-version", default="0", help="of the first weights")
    add("--slots", type=int, default=64, help="requests that run at once")
    add("--max_context", type=int, default=384, help="tokens of prompt and answer together")
    add(
        "--cache_tokens",
        type=int,
        default=0,
        help="tokens whose keys and values are kept; 0: slots times max_context",
    )
    add("--page_tokens", type=int, default=16, help="tokens of a page, the unit that is shared")
    add(
        "--call_tokens",
        type=int,
        default=256,
        help="tokens that are computed at once, at most. Above 32 an engine on a CPU without a C++"
        " compiler may give results whose last bits depend on what else is computed",
    )
    add(
        "--decode_steps",
        "--decode-steps",
        type=int,
        default=8,
        help="steps that one dispatch takes at most while no prompt is to be computed; a new"
        " request waits for as many",
    )
    add(
        "--max_queued_requests",
        "--max-queued-requests",
        type=int,
        default=MAX_QUEUED_REQUESTS,
        help="requests that may wait for a slot; further ones get 503 and Retry-After",
    )
    add(
        "--request_seconds",
        type=float,
        default=REQUEST_SECONDS,
        help="a request that takes longer is dropped and gets 503",
    )
    add(
        "--max_loaded_loras",
        "--max-loaded-loras",
        type=int,
        default=0,
        help="adapters that /load_lora_adapter may load at once; 0 takes no memory for any",
    )
    add("--max_lora_rank", "--max-lora-rank", type=int, default=16, help="largest rank of them")
    add(
        "--lora_target_modules",
        "--lora-target-modules",
        default="all",
        help="matrices that they may adapt, comma-separated: all, attention, experts, mlp, q_proj",
    )
    add("--parent_pid", type=int, help="end when the parent is not this process any more")
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
    divide_cpu(arguments.expert_parallel * arguments.tensor_parallel)
    # Only after the port is taken: these import JAX, which takes seconds.
    from rome.serve.adapters import AdapterRoom
    from rome.serve.programs import Shapes
    from rome.serve.run import ServeError, serve

    try:
        shapes = Shapes(
            slots=arguments.slots,
            max_context=arguments.max_context,
            cache_tokens=arguments.cache_tokens,
            page_tokens=arguments.page_tokens,
            call_tokens=arguments.call_tokens,
            decode_steps=arguments.decode_steps,
        )
        room = AdapterRoom(
            arguments.max_loaded_loras, arguments.max_lora_rank, arguments.lora_target_modules
        )
    except ValueError as error:
        sys.exit(f"launch.serve: {error}")
    service = serve(
        listener,
        arguments.model_path,
        shapes,
        dtype=arguments.dtype,
        weight_version=arguments.weight_version,
        expert_parallel=arguments.expert_parallel,
        tensor_parallel=arguments.tensor_parallel,
        room=room,
        with_tokenizer=not arguments.skip_tokenizer_init,
        max_queued_requests=arguments.max_queued_requests,
        request_seconds=arguments.request_seconds,
        arguments=vars(arguments),
    )
    try:
        asyncio.run(service)
    except ServeError as error:
        sys.exit(f"launch.serve: {error}")


def divide_cpu(count: int) -> None:
    """Make so many devices of a CPU, where that is what JAX runs on and XLA_FLAGS do not say.

    A mesh can then be tried out anywhere; it is no faster than one device.
    """
    if count > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        jax.config.update("jax_num_cpu_devices", count)


def end_with_parent(parent: int) -> None:
    """End this process when its parent has ended, however: an orphan has another parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; exit with PORT_IN_USE if the port is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        print(
            f"launch.serve: cannot listen on {host}:{port}: {error.strerror}. Choose another"
            " --port, or stop the program that uses it.",
            file=sys.stderr,
        )
        sys.exit(PORT_IN_USE if error.errno == errno.EADDRINUSE else 1)
    return listener


if __name__ == "__main__":
    main()
