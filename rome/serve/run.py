"""Runs the embedded engine: a checkpoint, a scheduler and the HTTP server, until a signal."""

from __future__ import annotations

import asyncio
import logging
import pathlib
import signal
import socket
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from rome.files import read_json
from rome.model.config import ModelConfig
from rome.model.tokenizer import Tokenizer
from rome.serve.programs import Shapes
from rome.serve.protocol import Bounds
from rome.serve.scheduler import Scheduler
from rome.serve.server import Server
from rome.serve.weights import load_weights

SHUTDOWN_SECONDS = 1.0  # for open connections


class ServeError(RuntimeError):
    """The engine could not start, or ended by itself."""


async def serve(
    listener: socket.socket,
    model_path: str,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    weight_version: str = "0",
    with_tokenizer: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Serve a Hugging Face checkpoint until SIGTERM or SIGINT.

    It answers from the start; /health says 200 once the weights are loaded and the programs
    compiled.

    Args:
      listener: a listening socket.
      model_path: directory with config.json and safetensors.
      shapes: fixed shapes of the compiled programs.
      dtype: of weights, cache and computation.
      weight_version: of the weights that it starts with.
      with_tokenizer: False takes and gives token ids only, without text and stop strings.
      arguments: further ones of the command line, shown by /server_info; `api_key` among them is
        asked for and not shown.

    Raises:
      ServeError: the checkpoint cannot be served, or the scheduler's thread ended.
    """
    config = _read_config(model_path)
    if shapes.max_context > config.max_position:
        raise ServeError(
            f"--max_context {shapes.max_context} exceeds the model's {config.max_position}"
            " positions"
        )
    tokenizer = _load_tokenizer(model_path) if with_tokenizer else None
    bounds = Bounds(config.vocab_size, shapes.max_context, config.eos_token_id)
    scheduler = Scheduler(
        lambda: load_weights(model_path, dtype), shapes, tokenizer, weight_version
    )
    shown = {**(arguments or {}), "model_path": model_path, "dtype": dtype}
    server = Server(scheduler, bounds, tokenizer, shown)
    runner = web.AppRunner(
        server.app(), handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    logging.info("listening on http://%s:%d", *listener.getsockname()[:2])
    scheduler.start()
    await _wait_for_end(scheduler)
    failure = scheduler.failure
    await asyncio.to_thread(scheduler.stop)
    await runner.cleanup()
    if failure is not None:
        raise ServeError(failure)


def _read_config(model_path: str) -> ModelConfig:
    path = pathlib.Path(model_path) / "config.json"
    try:
        values = read_json(path, "Fetch or write the checkpoint again.")
    except OSError as error:
        raise ServeError(
            f"cannot read {path} ({error}); --model_path must be a Hugging Face checkpoint"
            " directory"
        ) from error
    except ValueError as error:
        raise ServeError(str(error)) from error
    try:
        return ModelConfig.from_hf(values)
    except ValueError as error:
        raise ServeError(str(error)) from error


def _load_tokenizer(model_path: str) -> Tokenizer:
    try:
        return Tokenizer.load(model_path)
    except (ValueError, FileNotFoundError) as error:
        raise ServeError(str(error)) from error


async def _wait_for_end(scheduler: Scheduler) -> None:
    """Wait for SIGTERM, SIGINT or the end of the scheduler's thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set() and scheduler.failure is None:
        try:
            await asyncio.wait_for(stop.wait(), timeout=1.0)
        except TimeoutError:
            continue
