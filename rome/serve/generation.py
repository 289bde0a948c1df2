"""Requests between HTTP and the scheduler: their ids, their queue, their deadline, their news.

Used from the server's event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiohttp import web

from rome.serve.answer import make_answer
from rome.serve.checks import BadRequest
from rome.serve.metrics import Totals
from rome.serve.protocol import Bounds, asks_for_grammar, parse_generate
from rome.serve.request import Request, TextCodec
from rome.serve.scheduler import Scheduler
from rome.serve.wire import Busy, error, error_body, open_stream, read_body, send_event


class Generation:
    """Takes requests to the scheduler and back, and answers /generate.

    Args:
      scheduler: runs the requests.
      bounds: limits of requests.
      tokenizer: None for a server that takes and gives token ids only.

    Attributes:
      totals: of the requests that have ended.
    """

    def __init__(self, scheduler: Scheduler, bounds: Bounds, tokenizer: TextCodec | None):
        self.totals = Totals()
        self._scheduler = scheduler
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._open: dict[str, Request] = {}  # by rid: those that are not answered yet

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """Answer /generate: one request or a batch, at once or as a stream."""
        requests, is_batch = await self.parse(await read_body(http))
        if requests[0].stream:
            return await self._stream(http, requests, is_batch)
        await self.finish(requests)
        failed = failure_of(requests)
        if failed is not None:
            return error(failed["status_code"], failed["message"])
        answers = [self._answer(request) for request in requests]
        return web.json_response(answers if is_batch else answers[0])

    async def parse(self, body: Any) -> tuple[list[Request], bool]:
        """Do as `parse_generate`, beside other requests where it may take long.

        Raises:
          BadRequest: the body cannot be served.
        """
        if asks_for_grammar(body):
            return await asyncio.to_thread(parse_generate, body, self._bounds, self._tokenizer)
        return parse_generate(body, self._bounds, self._tokenizer)

    async def finish(self, requests: Sequence[Request]) -> None:
        """Run requests to their ends.

        Raises:
          BadRequest: an id is in use, or there are more requests than the server ever takes.
          Busy: the queue is full, or they did not end in time.
        """
        async with contextlib.aclosing(self.follow(requests)) as news:
            async for _ in news:
                continue

    async def follow(self, requests: Sequence[Request]) -> AsyncIterator[Request]:
        """Run requests, and yield each that has news: new tokens of a stream, or its end.

        Ends when all have ended. Close it: requests that still run then are cancelled, since their
        client has gone away.

        Raises:
          BadRequest: an id is in use, or there are more requests than the server ever takes.
          Busy: the queue is full, or they did not end in time.
        """
        self.admit(requests)
        news: asyncio.Queue[Request] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._bounds.request_seconds

        def notify(request: Request) -> None:
            loop.call_soon_threadsafe(news.put_nowait, request)

        try:
            for request in requests:
                request.notify = notify
                self._open[request.rid] = request
                self._scheduler.submit(request)
            running = set(requests)
            while running:
                try:
                    async with asyncio.timeout_at(ends):
                        request = await news.get()
                except TimeoutError:
                    seconds = self._bounds.request_seconds
                    raise Busy(f"the request did not end within {seconds:g} s") from None
                if request not in running:  # told of its last tokens after it had ended
                    continue
                if request.finish is not None:
                    running.remove(request)
                    self.totals.add(request, time.monotonic())
                yield request
        finally:
            for request in requests:
                self._open.pop(request.rid, None)
                if request.finish is None and self._scheduler.failure is None:
                    self._scheduler.cancel(request)

    def admit(self, requests: Sequence[Request]) -> None:
        """Raise BadRequest or Busy where these requests cannot be taken now."""
        for request in requests:
            if request.rid in self._open:
                raise BadRequest(f"Duplicate request ID detected: {request.rid}")
        max_open = self._scheduler.shapes.slots + self._bounds.max_queued_requests
        if len(requests) > max_open:
            raise BadRequest(f"a batch of {len(requests)} prompts; send at most {max_open} at once")
        if len(self._open) + len(requests) > max_open:
            raise Busy("the request queue is full")

    async def _stream(
        self, http: web.Request, requests: Sequence[Request], is_batch: bool
    ) -> web.StreamResponse:
        """Send server-sent events, each with all output of a request so far."""
        self.admit(requests)  # refused as any other request, before the stream begins
        response = await open_stream(http)
        places = {request: place for place, request in enumerate(requests)}
        try:
            async with contextlib.aclosing(self.follow(requests)) as news:
                async for request in news:
                    answer = self._answer(request)
                    failed = answer["meta_info"]["finish_reason"] or {}
                    if failed.get("status_code"):
                        answer = error_body(failed["status_code"], failed["message"])
                    if is_batch:
                        answer["index"] = places[request]
                    await send_event(response, json.dumps(answer))
        except (BadRequest, Busy) as refusal:
            await send_event(response, json.dumps(error_body(503, str(refusal))))
        await send_event(response, "[DONE]")
        return response

    def _answer(self, request: Request) -> dict[str, Any]:
        return make_answer(request, self._scheduler.version, self._tokenizer)


def failure_of(requests: Sequence[Request]) -> dict[str, Any] | None:
    """Return the finish_reason of the first request that ended with an HTTP error, or None."""
    for request in requests:
        finish = request.finish or {}
        if finish.get("status_code"):
            return finish
    return None
