"""OpenAI's HTTP routes: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from rome.model.tokenizer import Tokenizer
from rome.serve.checks import BadRequest
from rome.serve.generation import Generation, failure_of
from rome.serve.grammar import KINDS
from rome.serve.openai_api import (
    Answers,
    chat_ids,
    prompt_of,
    read_tools,
    to_generate,
    wants_usage,
)
from rome.serve.protocol import Bounds
from rome.serve.request import Request, TextCodec
from rome.serve.required_calls import call_grammar
from rome.serve.scheduler import Scheduler
from rome.serve.wire import Busy, Handler, error, error_body, open_stream, read_body, send_event


class OpenAIRoutes:
    """Handlers of the /v1 routes.

    Args:
      generation: runs the requests.
      scheduler: for the adapters that are loaded.
      bounds: limits of requests.
      tokenizer: None for a server that takes and gives token ids only.
      model: returns the name of the model that is served.
    """

    def __init__(
        self,
        generation: Generation,
        scheduler: Scheduler,
        bounds: Bounds,
        tokenizer: TextCodec | None,
        model: Callable[[], str],
    ):
        self._generation = generation
        self._scheduler = scheduler
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._model = model

    def gets(self) -> dict[str, Handler]:
        """Return the handlers of GET, by route."""
        return {"/v1/models": self.models, "/v1/models/{name:.+}": self.one_model}

    def posts(self) -> dict[str, Handler]:
        """Return the handlers of POST, by route."""
        return {"/v1/completions": self.completions, "/v1/chat/completions": self.chat}

    async def models(self, http: web.Request) -> web.Response:
        """Return the model and its loaded adapters."""
        return web.json_response({"object": "list", "data": self._entries()})

    async def one_model(self, http: web.Request) -> web.Response:
        """Return the model or an adapter by name."""
        name = http.match_info["name"]
        for entry in self._entries():
            if entry["id"] in (name, f"/{name}"):  # a path's first slash is lost in a URL
                return web.json_response(entry)
        return error(404, f"no model {name!r} is served; /v1/models lists them")

    def _entries(self) -> list[dict[str, Any]]:
        entry = {
            "id": self._model(),
            "object": "model",
            "created": 0,
            "owned_by": "rome",
            "max_model_len": self._bounds.max_context,
        }
        adapters = [
            entry | {"id": name, "root": path, "parent": self._model()}
            for name, path in self._scheduler.device.adapters.listed.items()
        ]
        return [entry, *adapters]

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """Answer /v1/completions."""
        body = await read_body(http)
        asked = self._asked(body, is_chat=False) | prompt_of(body)
        requests, _ = await self._generation.parse(asked)
        return await self._respond(http, body, requests, is_chat=False)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """Answer /v1/chat/completions."""
        body = await read_body(http)
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, Tokenizer):
            raise BadRequest(
                "this server has no tokenizer (--skip_tokenizer_init), so it renders no chats: send"
                " input_ids to /generate"
            )
        asked = self._asked(body, is_chat=True)
        # Rendering is quick for a chat of some pages and not for one of megabytes.
        ids = await asyncio.to_thread(chat_ids, body, tokenizer)
        asked["input_ids"] = ids
        rest = max(self._bounds.max_context - len(ids), 1)
        sampling = asked["sampling_params"]
        sampling.setdefault("max_new_tokens", rest)
        grammar = call_grammar(body, read_tools(body), tokenizer)
        if grammar is not None:
            if any(sampling.get(kind) for kind in KINDS):
                raise BadRequest(
                    "tool_choice that requires a call and another form of the answer exclude each"
                    " other; leave one out"
                )
            sampling["ebnf"] = grammar
        requests, _ = await self._generation.parse(asked)
        return await self._respond(http, body, requests, is_chat=True)

    def _asked(self, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        return to_generate(body, self._scheduler.device.adapters.listed, is_chat)

    async def _respond(
        self, http: web.Request, body: dict[str, Any], requests: list[Request], is_chat: bool
    ) -> web.StreamResponse:
        tokenizer = self._tokenizer if isinstance(self._tokenizer, Tokenizer) else None
        model = body.get("model") or self._model()
        answers = Answers(body, requests, tokenizer, model, is_chat)
        if requests[0].stream:
            return await self._stream(http, answers, requests, wants_usage(body))
        await self._generation.finish(requests)
        failed = failure_of(requests)
        if failed is not None:
            return error(failed["status_code"], failed["message"])
        return web.json_response(answers.whole())

    async def _stream(
        self, http: web.Request, answers: Answers, requests: list[Request], with_usage: bool
    ) -> web.StreamResponse:
        self._generation.admit(requests)  # refused as any other request, before the stream begins
        response = await open_stream(http)
        try:
            async with contextlib.aclosing(self._generation.follow(requests)) as news:
                async for request in news:
                    failed = failure_of([request])
                    if failed is not None:
                        text = json.dumps(error_body(failed["status_code"], failed["message"]))
                        await send_event(response, text)
                        continue
                    for chunk in answers.chunks(request):
                        await send_event(response, json.dumps(chunk))
        except (BadRequest, Busy) as refusal:
            await send_event(response, json.dumps(error_body(503, str(refusal))))
        if with_usage:
            await send_event(response, json.dumps(answers.usage_chunk()))
        await send_event(response, "[DONE]")
        return response
