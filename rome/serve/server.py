"""SGLang's HTTP routes over the scheduler.

One process, one event loop; everything that touches the device runs in the scheduler's thread.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import web

from rome.model.qwen3 import Params
from rome.serve.adapters import read_adapters
from rome.serve.checks import (
    BadRequest,
    check_flag,
    check_text,
    parse_memory_tags,
    parse_row_count,
)
from rome.serve.generation import Generation
from rome.serve.metrics import to_prometheus
from rome.serve.openai_routes import OpenAIRoutes
from rome.serve.protocol import Bounds
from rome.serve.request import Request, SamplingParams, TextCodec
from rome.serve.scheduler import PAUSE_MODES, Scheduler
from rome.serve.update import WeightUpdates
from rome.serve.weights import checksums, find_tensor
from rome.serve.wire import Busy, Handler, busy, error, read_body

VERSION = "rome.serve 1"
OPEN_ROUTES = (
    "/health",
    "/health_generate",
    "/ready",
    "/metrics",
)  # served without a key, and while it starts
HEALTH_GENERATE_SECONDS = 20.0
CLIENT_CLOSED = 499  # nginx's status for it; none is registered
MAX_BODY_BYTES = 64 << 20
DEFAULT_TRUNCATE_SIZE = 100  # rows of a tensor that /get_weights_by_name shows


class Server:
    """Handlers of all routes.

    Args:
      scheduler: runs the requests.
      bounds: limits of requests.
      tokenizer: None for a server that takes and gives token ids only.
      arguments: of the command line, shown by /server_info. `model_path` is required; `api_key` is
        asked for and not shown.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bounds: Bounds,
        tokenizer: TextCodec | None,
        arguments: Mapping[str, Any],
    ):
        self.scheduler = scheduler
        self.bounds = bounds
        self.tokenizer = tokenizer
        self.arguments = arguments
        self._model_path = str(arguments["model_path"])
        self._api_key = arguments.get("api_key")
        self._generation = Generation(scheduler, bounds, tokenizer)
        self._updates = WeightUpdates(scheduler)

    def app(self) -> web.Application:
        """Return the HTTP application."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        gets: dict[str, Handler] = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_model_info": self.model_info,  # the names of old SGLang servers
            "/get_server_info": self.server_info,
            "/ready": self.health,
            "/get_load": self.get_load,
            "/metrics": self.metrics,
            "/flush_cache": self.flush_cache,
            "/get_weights_by_name": self.get_weights_by_name,
        }
        posts: dict[str, Handler] = {
            "/generate": self._generation.generate,
            "/abort_request": self.abort_request,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/flush_cache": self.flush_cache,
            "/update_weights_from_disk": self.update_weights_from_disk,
            "/update_weight_version": self.update_weight_version,
            "/weights_checker": self.weights_checker,
            "/load_lora_adapter": self.load_lora_adapter,
            "/unload_lora_adapter": self.unload_lora_adapter,
            "/release_memory_occupation": self.release_memory_occupation,
            "/resume_memory_occupation": self.resume_memory_occupation,
            "/get_weights_by_name": self.get_weights_by_name,
        }
        openai = OpenAIRoutes(
            self._generation, self.scheduler, self.bounds, self.tokenizer, lambda: self._model_path
        )
        gets |= openai.gets()
        posts |= openai.posts()
        for route, handler in gets.items():
            app.router.add_get(route, handler)
        for route, handler in posts.items():
            app.router.add_post(route, handler)
        return app

    # -- control
    # ---------------------------------------------------------------------------------------------

    async def abort_request(self, http: web.Request) -> web.Response:
        """End requests by the beginning of their id, with what they have so far."""
        body = await read_body(http)
        rid = check_text("rid", body.get("rid") or "")
        everything = check_flag("abort_all", body.get("abort_all") or False)
        if not rid and not everything:
            raise BadRequest(
                "give the rid (or its beginning) of the requests to abort, or abort_all=true"
            )
        self.scheduler.abort(rid, everything)
        return web.Response()

    async def pause_generation(self, http: web.Request) -> web.Response:
        """Stop sampling, in one of SGLang's modes."""
        body = await read_body(http)
        mode = body.get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise BadRequest(
                f"pause mode {mode!r} is unknown; choose one of {', '.join(PAUSE_MODES)}"
            )
        await self._in_thread(lambda: self.scheduler.pause(mode))
        return web.json_response({"message": f"Generation paused ({mode}).", "status": "ok"})

    async def continue_generation(self, http: web.Request) -> web.Response:
        """Continue sampling."""
        await self._in_thread(self.scheduler.resume, refused=ValueError)
        return web.json_response({"message": "Generation continued.", "status": "ok"})

    async def flush_cache(self, http: web.Request) -> web.Response:
        """Forget all cached prefixes; refused while requests are in flight."""
        if not await self._in_thread(self.scheduler.flush):
            return error(400, "requests are in flight; pause with mode abort first")
        return web.Response(text="Cache flushed.\n")

    async def update_weights_from_disk(self, http: web.Request) -> web.Response:
        """Replace the weights, parameter by parameter; requests wait meanwhile.

        `rome.serve.update` says what a failure leaves. With flush_cache (the default) running
        requests compute their cache anew with the new weights; without it they continue as they
        are.
        """
        body = await read_body(http)
        path = body.get("model_path")
        if not isinstance(path, str) or not path or "\0" in path:
            raise BadRequest("model_path must name a Hugging Face checkpoint directory")
        version = check_text("weight_version", body.get("weight_version") or self.scheduler.version)
        fresh = check_flag("flush_cache", body.get("flush_cache", True))
        if check_flag("abort_all_requests", body.get("abort_all_requests") or False):
            self.scheduler.abort("", everything=True)
        outcome = await self._updates.run(path, version, fresh)
        if outcome.error is None:
            self._model_path = path
        answer = {
            "success": outcome.error is None,
            "message": outcome.error or "Succeeded to update model weights.",
            "num_paused_requests": outcome.running,
        }
        return web.json_response(answer, status=200 if outcome.error is None else 400)

    async def update_weight_version(self, http: web.Request) -> web.Response:
        """Rename the version of the weights, which stay as they are."""
        body = await read_body(http)
        version = check_text("new_version", body.get("new_version"))
        if check_flag("abort_all_requests", body.get("abort_all_requests", True)):
            self.scheduler.abort("", everything=True)
        await self._in_thread(lambda: self.scheduler.rename(version))
        answer = {
            "success": True,
            "message": f"Weight version updated to {version}",
            "new_version": version,
        }
        return web.json_response(answer)

    async def load_lora_adapter(self, http: web.Request) -> web.Response:
        """Load adapters in PEFT's layout under a name; requests give it as `lora_path`.

        Nothing is paused. An adapter that cannot be loaded changes nothing.
        """
        body = await read_body(http)
        name = check_text("lora_name", body.get("lora_name"))
        path = check_text("lora_path", body.get("lora_path"))
        if not name or not path or "\0" in path:
            raise BadRequest("give lora_name, and lora_path: a directory that PEFT wrote")
        device = self.scheduler.device
        try:
            adapters = await asyncio.to_thread(read_adapters, path, device.config)
            await self._in_thread(lambda: device.adapters.load(name, path, adapters), ValueError)
        except (ValueError, OSError) as error:
            return self._adapters_answer(f"{name!r} is not loaded: {error}")
        return self._adapters_answer(None)

    async def unload_lora_adapter(self, http: web.Request) -> web.Response:
        """Forget an adapter; requests that have it go on, and its slot is free after them."""
        body = await read_body(http)
        name = check_text("lora_name", body.get("lora_name"))
        device = self.scheduler.device
        try:
            await self._in_thread(lambda: device.adapters.unload(name), ValueError)
        except BadRequest as error:
            return self._adapters_answer(str(error))
        return self._adapters_answer(None)

    def _adapters_answer(self, error: str | None) -> web.Response:
        answer = {
            "success": error is None,
            "loaded_adapters": self.scheduler.device.adapters.listed,
        }
        if error is not None:
            answer["error_message"] = error
        return web.json_response(answer, status=200 if error is None else 400)

    async def release_memory_occupation(self, http: web.Request) -> web.Response:
        """Delete the arrays of the given tags (all by default) to free the device's memory."""
        tags = parse_memory_tags(await read_body(http))
        async with self._updates.lock:
            await self._in_thread(lambda: self.scheduler.release_memory(tags), refused=ValueError)
        logging.info("memory released: %s", ", ".join(tags))
        return web.json_response(None)

    async def resume_memory_occupation(self, http: web.Request) -> web.Response:
        """Allocate the cache again.

        Weights must be loaded by /update_weights_from_disk before anything runs: nothing is sampled
        from old ones.
        """
        tags = parse_memory_tags(await read_body(http))
        async with self._updates.lock:
            await self._in_thread(lambda: self.scheduler.take_back_memory(tags))
        return web.json_response(None)

    async def weights_checker(self, http: web.Request) -> web.Response:
        """Return a hash of every tensor of the weights, or of an adapter (`lora_name`)."""
        body = await read_body(http)
        action = body.get("action")
        if action != "checksum":
            raise BadRequest(f"action {action!r} is not supported; supported: 'checksum'")
        device = self.scheduler.device
        name = check_text("lora_name", body.get("lora_name") or "")
        if name:
            sums = await self._in_thread(lambda: device.adapters.checksums(name), ValueError)
        else:
            async with self._updates.lock:
                sums = await asyncio.to_thread(checksums, self._loaded_params(), device.config)
        answer = {
            "success": True,
            "message": "sha256 by tensor",
            "ranks": [{"rank": 0, "checksums": sums}],
        }
        return web.json_response(answer)

    async def get_weights_by_name(self, http: web.Request) -> web.Response:
        """Return the first rows of one tensor."""
        body = dict(http.query) if http.method == "GET" else await read_body(http)
        name = check_text("name", body.get("name"))
        size = parse_row_count(body.get("truncate_size", DEFAULT_TRUNCATE_SIZE))
        config = self.scheduler.device.config
        async with self._updates.lock:
            tensor = await asyncio.to_thread(find_tensor, self._loaded_params(), config, name)
        if tensor is None:
            raise BadRequest(
                f"no weight is named {name!r}; names are those of the checkpoint's tensors"
            )
        return web.json_response(np.asarray(tensor, np.float32)[:size].tolist())

    def _loaded_params(self) -> Params:
        device = self.scheduler.device
        if device.params is None:
            raise BadRequest(device.missing["weights"])
        return device.params

    # -- information
    # ---------------------------------------------------------------------------------------------

    async def health(self, http: web.Request) -> web.Response:
        """Return 200 when the engine is ready to answer, else 503."""
        return web.Response(status=200 if self._is_running() else 503)

    async def health_generate(self, http: web.Request) -> web.Response:
        """Generate a token, and return 200 if that works.

        An engine that is paused or busy is healthy if its thread answers: a probe would wait behind
        all other requests.
        """
        if not self._is_running():
            return web.Response(status=503)
        try:
            async with asyncio.timeout(HEALTH_GENERATE_SECONDS):
                works = await self._probe()
        except TimeoutError:
            works = False
        return web.Response(status=200 if works else 503)

    async def _probe(self) -> bool:
        """Sample one token unless the engine is paused or busy; return whether that went well."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        probe = Request(uuid.uuid4().hex, [0], SamplingParams(max_new_tokens=1, temperature=0.0))
        probe.notify = lambda request: loop.call_soon_threadsafe(ended.set)
        if not await self._in_thread(lambda: self.scheduler.try_probe(probe)):
            return True
        try:
            await ended.wait()
        finally:  # a pause may have frozen it
            if probe.finish is None and self.scheduler.failure is None:
                self.scheduler.cancel(probe)
        return probe.finish is not None and "status_code" not in probe.finish

    async def model_info(self, http: web.Request) -> web.Response:
        """Return the model's path, weight version and limits."""
        answer = {
            "model_path": self._model_path,
            "served_model_name": self._model_path,
            "tokenizer_path": str(self.arguments["model_path"]),
            "is_generation": True,
            "weight_version": self.scheduler.version,
            "vocab_size": self.bounds.vocab_size,
            "max_context": self.bounds.max_context,
        }
        return web.json_response(answer)

    async def server_info(self, http: web.Request) -> web.Response:
        """Return the command line's arguments, and how busy the engine is."""
        answer = {name: value for name, value in self.arguments.items() if name != "api_key"}
        answer["engine"] = "rome.serve"
        answer["version"] = VERSION
        answer["internal_states"] = [self.scheduler.load_metrics()]
        return web.json_response(answer)

    async def get_load(self, http: web.Request) -> web.Response:
        """Return how many requests there are, in the form that SGLang's router reads."""
        load = self.scheduler.load_metrics()
        used = load["pages"] - load["pages_available"]
        entry = {
            "dp_rank": 0,
            "num_reqs": load["running"] + load["prefilling"] + load["waiting"],
            "num_waiting_reqs": load["waiting"],
            "num_tokens": used * self.scheduler.shapes.page_tokens,
        }
        return web.json_response([entry])

    async def metrics(self, http: web.Request) -> web.Response:
        """Return the figures that Prometheus collects."""
        load = self.scheduler.load_metrics()
        return web.Response(text=to_prometheus(self._generation.totals, load, self._model_path))

    def _is_running(self) -> bool:
        return self.scheduler.ready.is_set() and self.scheduler.failure is None

    # -- for all routes
    # ---------------------------------------------------------------------------------------------

    async def _in_thread(
        self, function: Callable[[], Any], refused: type[Exception] | tuple[()] = ()
    ) -> Any:
        """Run a function in the scheduler's thread, between two steps.

        Exceptions of type `refused` are the client's mistakes.
        """
        try:
            return await asyncio.wrap_future(self.scheduler.call(function))
        except refused as error:
            raise BadRequest(str(error)) from None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the API key, and give every error SGLang's form."""
        is_open = request.path in OPEN_ROUTES
        if not is_open and not self._has_key(request):
            return error(401, "Unauthorized")
        if not self.scheduler.ready.is_set() and not is_open and request.path != "/generate":
            return error(503, self.scheduler.failure or "the engine is starting")
        try:
            return await handler(request)
        except BadRequest as refusal:
            return error(400, str(refusal))
        except RecursionError:
            return error(400, "the body is nested too deeply")
        except Busy as reason:
            return busy(reason)
        except web.HTTPException as answer:
            return error(answer.status, answer.reason)
        except ConnectionResetError:  # amid its answer, which nobody reads any more
            return error(CLIENT_CLOSED, "the client went away")
        except Exception as failure:
            if self.scheduler.failure is None:  # else the scheduler has logged why it ended
                logging.exception("%s %s failed", request.method, request.path)
            return error(500, f"{type(failure).__name__}: {failure}")

    def _has_key(self, http: web.Request) -> bool:
        if not self._api_key:
            return True
        given = http.headers.get("Authorization", "").encode()
        return hmac.compare_digest(given, f"Bearer {self._api_key}".encode())
