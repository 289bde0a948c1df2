"""SGLang's HTTP routes over the scheduler.

One process, one event loop; everything that touches the device runs in the scheduler's thread.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from aiohttp import web

from rome.model.qwen3 import Params
from rome.serve.protocol import (
    BadRequest,
    Bounds,
    Request,
    SamplingParams,
    TextCodec,
    parse_generate,
)
from rome.serve.scheduler import MEMORY_TAGS, PAUSE_MODES, Scheduler
from rome.serve.stopping import decode
from rome.serve.weights import checksums, find_tensor, load_weights

VERSION = "rome.serve 1"
OPEN_ROUTES = ("/health", "/health_generate")
HEALTH_GENERATE_SECONDS = 20.0
MAX_BODY_BYTES = 64 << 20


class Server:
    """Handlers of all routes.

    Args:
      arguments: the command line's, shown by /server_info.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bounds: Bounds,
        tokenizer: TextCodec | None,
        arguments: dict[str, Any],
    ):
        self.scheduler, self.bounds, self.tokenizer, self.arguments = (
            scheduler,
            bounds,
            tokenizer,
            arguments,
        )
        self._model_path = str(arguments["model_path"])
        self._api_key = arguments.get("api_key")
        self._updating = asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        get, post = app.router.add_get, app.router.add_post
        get("/health", self.health)
        get("/health_generate", self.health_generate)
        for prefix in ("/", "/get_"):  # the names of new and of old SGLang servers
            get(prefix + "model_info", self.model_info)
            get(prefix + "server_info", self.server_info)
        get("/v1/models", self.models)
        post("/generate", self.generate)
        post("/abort_request", self.abort_request)
        post("/pause_generation", self.pause_generation)
        post("/continue_generation", self.continue_generation)
        post("/flush_cache", self.flush_cache)
        get("/flush_cache", self.flush_cache)
        post("/update_weights_from_disk", self.update_weights_from_disk)
        post("/weights_checker", self.weights_checker)
        post("/release_memory_occupation", self.release_memory_occupation)
        post("/resume_memory_occupation", self.resume_memory_occupation)
        post("/get_weights_by_name", self.get_weights_by_name)
        get("/get_weights_by_name", self.get_weights_by_name)
        return app

    # -- generation
    # ---------------------------------------------------------------------------------------------

    async def generate(self, http: web.Request) -> web.StreamResponse:
        requests, is_batch = parse_generate(await _body(http), self.bounds, self.tokenizer)
        events: asyncio.Queue[Request] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            for request in requests:
                request.notify = lambda ended: loop.call_soon_threadsafe(events.put_nowait, ended)
                self.scheduler.submit(request)
            if requests[0].stream:
                return await self._stream(http, requests[0], events)
            for _ in requests:
                await events.get()
        finally:  # also when the client went away
            for request in requests:
                if request.finish is None and self.scheduler.failure is None:
                    self.scheduler.cancel(request)
        for request in requests:
            if status := request.finish.get("status_code"):
                return _error(status, request.finish["message"])
        answers = [
            self._answer(request, len(request.output_ids), request.finish) for request in requests
        ]
        return web.json_response(answers if is_batch else answers[0])

    async def _stream(
        self, http: web.Request, request: Request, events: asyncio.Queue[Request]
    ) -> web.StreamResponse:
        """Server-sent events, each with all output so far."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(http)
        finish = None
        while finish is None:
            await events.get()
            finish, count = request.finish, len(request.output_ids)
            await response.write(
                b"data: " + json.dumps(self._answer(request, count, finish)).encode() + b"\n\n"
            )
        await response.write(b"data: [DONE]\n\n")
        return response

    def _answer(
        self, request: Request, count: int, finish: dict[str, Any] | None
    ) -> dict[str, Any]:
        ids, logprobs = request.output_ids[:count], request.logprobs[:count]
        spans = [
            {"version": version, "start": start, "end": min(end, count)}
            for version, start, end in request.versions
            if start < count
        ]
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish,
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": count,
            "cached_tokens": request.cached_tokens,
            "weight_version": spans[-1]["version"] if spans else self.scheduler.version,
            "weight_versions": spans,
            "e2e_latency": time.monotonic() - request.created,
        }
        if request.return_logprob:
            meta["output_token_logprobs"] = [
                [logprob, token, None] for logprob, token in zip(logprobs, ids)
            ]
            if request.score_from is not None and finish is not None:
                scores = [None, *request.prompt_logprobs]
                meta["input_token_logprobs"] = [
                    [score, token, None] for score, token in zip(scores, request.prompt_ids)
                ][request.score_from :]
        if request.return_routes and finish is not None and request.routes:
            routes = np.concatenate(request.routes)[
                request.routes_from : len(request.prompt_ids) + count - 1
            ]  # none for the last token: nothing was drawn after it
            meta["routed_experts"] = base64.b64encode(
                np.ascontiguousarray(routes, np.int32).tobytes()
            ).decode()
        answer = {"output_ids": ids, "meta_info": meta}
        return answer if self.tokenizer is None else {"text": self._text(request, ids), **answer}

    def _text(self, request: Request, ids: list[int]) -> str:
        """The text without what ended it, unless no_stop_trim asks for it."""
        params, finish = request.sampling, request.finish or {}
        if request.text_end is not None and not params.no_stop_trim:
            return decode(ids, self.tokenizer)[: request.text_end]
        if finish.get("type") == "stop" and request.text_end is None and not params.no_stop_trim:
            ids = ids[:-1]
        return decode(ids, self.tokenizer, skip_special=params.skip_special_tokens)

    async def abort_request(self, http: web.Request) -> web.Response:
        body = await _body(http)
        rid, everything = str(body.get("rid") or ""), bool(body.get("abort_all"))
        if not rid and not everything:
            raise BadRequest(
                "give the rid (or its beginning) of the requests to abort, or abort_all=true"
            )
        self.scheduler.abort(rid, everything)
        return web.Response()

    # -- control
    # ---------------------------------------------------------------------------------------------

    async def pause_generation(self, http: web.Request) -> web.Response:
        mode = (await _body(http)).get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise BadRequest(
                f"pause mode {mode!r} is unknown; choose one of {', '.join(PAUSE_MODES)}"
            )
        await self._in_thread(lambda: self.scheduler.pause(mode))
        return web.json_response({"message": f"Generation paused ({mode}).", "status": "ok"})

    async def continue_generation(self, http: web.Request) -> web.Response:
        await self._in_thread(self.scheduler.resume, refused=ValueError)
        return web.json_response({"message": "Generation continued.", "status": "ok"})

    async def flush_cache(self, http: web.Request) -> web.Response:
        if not await self._in_thread(self.scheduler.flush):
            return _error(400, "requests are in flight; pause with mode abort first")
        return web.Response(text="Cache flushed.\n")

    async def update_weights_from_disk(self, http: web.Request) -> web.Response:
        """Loads beside the old weights and swaps between two steps: a directory that cannot be used
        changes nothing.

        With flush_cache (the default) running requests compute their cache anew by the new weights;
        without it they go on as they are.
        """
        body = await _body(http)
        path = body.get("model_path")
        if not isinstance(path, str):
            raise BadRequest("model_path must name a Hugging Face checkpoint directory")
        if body.get("abort_all_requests"):
            self.scheduler.abort("", everything=True)
        async with self._updating:
            if "resume" in self.scheduler.lent.get("weights", ""):
                raise BadRequest(self.scheduler.lent["weights"])
            try:
                params, _ = await asyncio.to_thread(
                    load_weights, path, self.scheduler.config.dtype, self.scheduler.config
                )
            except (ValueError, OSError) as error:
                return web.json_response(
                    {
                        "success": False,
                        "message": f"kept the old weights: {error}",
                        "num_paused_requests": 0,
                    },
                    status=400,
                )
            version = (
                str(body["weight_version"])
                if body.get("weight_version") is not None
                else self.scheduler.version
            )
            running = await self._in_thread(
                lambda: self.scheduler.swap(params, version, fresh=body.get("flush_cache", True))
            )
            self._model_path = path
        return web.json_response(
            {
                "success": True,
                "message": "Succeeded to update model weights.",
                "num_paused_requests": running,
            }
        )

    async def release_memory_occupation(self, http: web.Request) -> web.Response:
        """Deletes the arrays of the given tags (all by default), so that another process can have
        the device's memory.
        """
        tags = _memory_tags(await _body(http))
        async with self._updating:
            await self._in_thread(lambda: self.scheduler.release_memory(tags), refused=ValueError)
        logging.info("memory released: %s", ", ".join(tags))
        return web.json_response(None)

    async def resume_memory_occupation(self, http: web.Request) -> web.Response:
        """The cache is allocated again.

        Weights must be loaded by /update_weights_from_disk before anything runs: nothing is sampled
        from old ones.
        """
        tags = _memory_tags(await _body(http))
        async with self._updating:
            await self._in_thread(lambda: self.scheduler.take_back_memory(tags))
        return web.json_response(None)

    def _loaded(self) -> Params:
        if self.scheduler.params is None:
            raise BadRequest(self.scheduler.lent["weights"])
        return self.scheduler.params

    async def weights_checker(self, http: web.Request) -> web.Response:
        action = (await _body(http)).get("action")
        if action != "checksum":
            raise BadRequest(f"action {action!r} is not supported; supported: 'checksum'")
        sums = await asyncio.to_thread(checksums, self._loaded(), self.scheduler.config)
        return web.json_response(
            {
                "success": True,
                "message": "sha256 by tensor",
                "ranks": [{"rank": 0, "checksums": sums}],
            }
        )

    async def get_weights_by_name(self, http: web.Request) -> web.Response:
        body = dict(http.query) if http.method == "GET" else await _body(http)
        tensor = await asyncio.to_thread(
            find_tensor, self._loaded(), self.scheduler.config, str(body.get("name"))
        )
        if tensor is None:
            raise BadRequest(
                f"no weight is named {body.get('name')!r}; names are those of the checkpoint's"
                " tensors"
            )
        return web.json_response(
            np.asarray(tensor, np.float32)[: int(body.get("truncate_size", 100))].tolist()
        )

    # -- information
    # ---------------------------------------------------------------------------------------------

    async def health(self, http: web.Request) -> web.Response:
        return web.Response(
            status=200 if self.scheduler.ready.is_set() and self.scheduler.failure is None else 503
        )

    async def health_generate(self, http: web.Request) -> web.Response:
        """Generates a token.

        An engine that is paused or at work is well if its thread answers: a probe would wait behind
        everybody else.
        """
        if not self.scheduler.ready.is_set() or self.scheduler.failure is not None:
            return web.Response(status=503)
        try:
            async with asyncio.timeout(HEALTH_GENERATE_SECONDS):
                if await self._in_thread(
                    lambda: self.scheduler.paused or self.scheduler.lent or self.scheduler.busy()
                ):
                    return web.Response()
                ended: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
                loop = asyncio.get_running_loop()
                probe = Request(
                    uuid.uuid4().hex, [0], SamplingParams(max_new_tokens=1, temperature=0.0)
                )
                probe.notify = lambda request: loop.call_soon_threadsafe(
                    lambda: ended.done() or ended.set_result(request)
                )
                self.scheduler.submit(probe)
                return web.Response(status=200 if (await ended).finish["type"] != "abort" else 503)
        except TimeoutError:
            return web.Response(status=503)

    async def model_info(self, http: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": self._model_path,
                "served_model_name": self._model_path,
                "tokenizer_path": str(self.arguments["model_path"]),
                "is_generation": True,
                "weight_version": self.scheduler.version,
                "vocab_size": self.bounds.vocab_size,
                "max_context": self.bounds.max_context,
            }
        )

    async def server_info(self, http: web.Request) -> web.Response:
        shown = {name: value for name, value in self.arguments.items() if name != "api_key"}
        return web.json_response(
            shown
            | {
                "engine": "rome.serve",
                "version": VERSION,
                "internal_states": [self.scheduler.load_figures()],
            }
        )

    async def models(self, http: web.Request) -> web.Response:
        entry = {
            "id": self._model_path,
            "object": "model",
            "owned_by": "rome",
            "max_model_len": self.bounds.max_context,
        }
        return web.json_response({"object": "list", "data": [entry]})

    async def _in_thread(
        self, function: Callable[[], Any], refused: type[Exception] | tuple[()] = ()
    ) -> Any:
        """Between two steps. Errors of type `refused` are the client's mistakes."""
        try:
            return await asyncio.wrap_future(self.scheduler.call(function))
        except refused as error:
            raise BadRequest(str(error)) from None

    @web.middleware
    async def _guard(self, http: web.Request, handler: Callable) -> web.StreamResponse:
        """Checks the key and gives every error SGLang's shape."""
        if self._api_key and http.path not in OPEN_ROUTES:
            if not hmac.compare_digest(
                http.headers.get("Authorization", "").encode(), f"Bearer {self._api_key}".encode()
            ):
                return _error(401, "Unauthorized")
        if not self.scheduler.ready.is_set() and http.path not in (*OPEN_ROUTES, "/generate"):
            return _error(503, self.scheduler.failure or "the engine is starting")
        try:
            return await handler(http)
        except BadRequest as error:
            return _error(400, str(error))
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except RuntimeError as error:
            if self.scheduler.failure is None:
                raise
            return _error(500, str(error))


async def _body(http: web.Request) -> dict[str, Any]:
    """The JSON object of a request; no body is an empty one."""
    text = await http.text()
    try:
        body = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _memory_tags(body: dict[str, Any]) -> list[str]:
    tags = body.get("tags") or list(MEMORY_TAGS)
    if not isinstance(tags, list) or not set(tags) <= set(MEMORY_TAGS):
        raise BadRequest(f"tags must be of {', '.join(MEMORY_TAGS)}, got {tags!r}")
    return tags


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)
