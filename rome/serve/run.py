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
from rome.model.precision import use_full_precision
from rome.model.qwen3 import Params
from rome.model.sharding import make_engine_mesh
from rome.model.tokenizer import Tokenizer
from rome.serve.adapters import AdapterRoom
from rome.serve.device import NO_ROOM
from rome.serve.programs import Shapes
from rome.serve.protocol import MAX_QUEUED_REQUESTS, REQUEST_SECONDS, Bounds
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
    expert_parallel: int = 1,
    tensor_parallel: int = 1,
    room: AdapterRoom = NO_ROOM,
    with_tokenizer: bool = True,
    max_queued_requests: int = MAX_QUEUED_REQUESTS,
    request_seconds: float = REQUEST_SECONDS,
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
      expert_parallel: devices that share the experts.
      tensor_parallel: devices that share heads and hidden units; as many for each of these.
      room: for adapters that are loaded by name.
      with_tokenizer: False takes and gives token ids only, without text and stop strings.
      max_queued_requests: requests that may wait for a slot; further ones are answered with 503.
      request_seconds: after which a request that has not ended is dropped and answered with 503.
      arguments: further ones of the command line, shown by /server_info; `api_key` among them is
        asked for and not shown.

    Raises:
      ServeError: the checkpoint cannot be served, or the scheduler's thread ended.
    """
    document = _read_json(model_path, "config.json")
    config = _read_config(document)
    if shapes.max_context > config.max_position:
        raise ServeError(
            f"--max_context {shapes.max_context} exceeds the model's {config.max_position}"
            " positions"
        )
    if room.count:
        try:
            room.lora(config)
        except ValueError as error:
            raise ServeError(f"--lora_target_modules: {error}") from error
    tokenizer = _load_tokenizer(model_path) if with_tokenizer else None
    eos_token_ids = _eos_token_ids(model_path, document) | {config.eos_token_id}
    try:
        bounds = Bounds(
            config.vocab_size,
            shapes.max_context,
            eos_token_ids,
            max_queued_requests,
            request_seconds,
        )
    except ValueError as error:
        raise ServeError(str(error)) from error

    def load() -> tuple[Params, ModelConfig]:
        use_full_precision(dtype)
        mesh = make_engine_mesh(expert_parallel, tensor_parallel, config)
        return load_weights(model_path, dtype, mesh)

    scheduler = Scheduler(load, shapes, tokenizer, weight_version, room)
    shown = {**(arguments or {}), "model_path": model_path, "dtype": dtype}
    server = Server(
        scheduler,
        bounds,
        tokenizer,
        shown,
    )
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


def _read_json(model_path: str, name: str) -> dict[str, Any]:
    """Return a JSON object of the checkpoint."""
    path = pathlib.Path(model_path) / name
    try:
        return read_json(path, "Fetch or write the checkpoint again.")
    except OSError as error:
        raise ServeError(
            f"cannot read {path} ({error}); --model_path must be a Hugging Face checkpoint"
            " directory"
        ) from error
    except ValueError as error:
        raise ServeError(str(error)) from error


def _read_config(document: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_hf(document)
    except ValueError as error:
        raise ServeError(str(error)) from error


def _eos_token_ids(model_path: str, config: dict[str, Any]) -> frozenset[int]:
    """Return the end tokens that config.json and generation_config.json name, as SGLang does."""
    documents = [config]
    if (pathlib.Path(model_path) / "generation_config.json").exists():
        documents.append(_read_json(model_path, "generation_config.json"))
    found: set[int] = set()
    for document in documents:
        ids = document.get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(one) is int for one in ids):
            raise ServeError(f"{model_path}: eos_token_id {ids!r} must be token ids")
        found.update(ids)
    return frozenset(found)


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
