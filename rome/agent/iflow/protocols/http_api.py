"""A running session over HTTP: its events as a stream, and answers, messages and feedback to it.

| request | does |
|---|---|
| GET /events?after=N | streams events as server-sent events, from event N + 1 on |
| GET /state | returns mode, model, list of what is to do, what waits for an answer, usage |
| POST /prompt {"text"} | begins a turn, or steers the one that is played |
| POST /cancel | ends the turn |
| POST /approve {"request", "decision", "scope", "note"} | allows or denies a call |
| POST /answer {"request", "answer"} | answers a question |
| POST /mode {"mode"} | changes the mode of approval |
| POST /feedback {"target", "verdict", "rating", "text"} | judges an answer |

Each request carries the token, as `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import secrets
import sys
from collections.abc import Mapping
from typing import Any, get_args

from aiohttp import web

from rome.agent.iflow.desk import UnknownRequest
from rome.agent.iflow.events import Decision, Event, Scope
from rome.agent.iflow.feedback import make_feedback
from rome.agent.iflow.interfaces import MODES, InterfaceSession
from rome.agent.iflow.loop import AgentError
from rome.agent.iflow.user_input import InputError, expand


class SessionApi:
    """Answers requests about one open session that carry its token."""

    def __init__(self, session: InterfaceSession, token: str) -> None:
        self._session = session
        self._token = token
        self._turn: asyncio.Task[None] | None = None

    def application(self) -> web.Application:
        """Return the application."""
        app = web.Application(middlewares=[self._check], client_max_size=4 << 20)
        app.router.add_get("/events", self._events)
        app.router.add_get("/state", self._state)
        for action in ("prompt", "cancel", "approve", "answer", "mode", "feedback"):
            app.router.add_post(f"/{action}", functools.partial(self._post, action))
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            return web.json_response({"error": "the token is missing or wrong"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _events(self, request: web.Request) -> web.StreamResponse:
        try:
            after = int(request.query.get("after", "-1"))
        except ValueError:
            return web.json_response({"error": "after is the number of an event"}, status=400)
        log = self._session.agent.log
        waiting: asyncio.Queue[Event] = asyncio.Queue()
        for event in log.events[after + 1 :]:
            waiting.put_nowait(event)
        stop = log.listen(waiting.put_nowait)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(request)
            while True:
                await response.write(_server_sent(await waiting.get()))
        except ConnectionError:
            return response
        finally:
            stop()

    async def _state(self, request: web.Request) -> web.Response:
        agent = self._session.agent
        conversation = agent.conversation
        return web.json_response(
            {
                "session": agent.session,
                "is_working": agent.is_working,
                "mode": conversation.mode,
                "model": agent.model.name,
                "todo": [dataclasses.asdict(item) for item in conversation.todo],
                "waiting": [event.to_json() for event in conversation.open_requests.values()],
                "usage": dataclasses.asdict(conversation.usage),
                "context_tokens": conversation.context_tokens,
                "events": len(agent.log.events),
            }
        )

    async def _post(self, action: str, request: web.Request) -> web.Response:
        """Do what a posted object asks for, and answer its errors."""
        try:
            given = json.loads(await request.text() or "{}")
            if not isinstance(given, dict):
                raise InputError("the body must be a JSON object")
            await self._do(action, given)
        except (UnknownRequest, AgentError) as error:
            return web.json_response({"error": str(error)}, status=409)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({})

    async def _do(self, action: str, given: dict[str, Any]) -> None:
        agent = self._session.agent
        match action:
            case "prompt":
                text = await expand(_text(given, "text"), self._session)
                if self._turn is None or self._turn.done():
                    self._turn = asyncio.create_task(self._play(text))
                else:
                    agent.steer(text)
            case "cancel":
                agent.cancel()
            case "approve":
                decision: Any = _one_of(given, "decision", get_args(Decision))
                scope: Any = _one_of({"scope": "once", **given}, "scope", get_args(Scope))
                note = str(given.get("note", ""))
                agent.desk.respond(_text(given, "request"), decision, scope=scope, note=note)
            case "answer":
                agent.desk.respond(_text(given, "request"), answer=_text(given, "answer"))
            case "mode":
                agent.set_mode(_one_of(given, "mode", tuple(MODES)))
            case "feedback":
                values = {name: given[name] for name in ("rating", "text") if name in given}
                verdict = given.get("verdict", "")
                judged = make_feedback(agent.log, verdict, target=given.get("target"), **values)
                agent.log.append(judged)

    async def _play(self, text: str) -> None:
        await self._session.agent.run(text)
        await self._session.keep()


async def serve(session: InterfaceSession, *, host: str, port: int, token: str = "") -> None:
    """Serve a session until the task is cancelled; the session is closed at the end.

    The address is printed to standard error; port 0 takes a free one, and a token of "" is made and
    printed too. OSError where the port is taken.
    """
    token = token or secrets.token_urlsafe(24)
    app = SessionApi(session, token).application()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    try:
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        bound = runner.addresses[0][1]
        print(f"session at http://{host}:{bound}, token {token}", file=sys.stderr, flush=True)
        await asyncio.Event().wait()
    finally:
        await session.close()
        with contextlib.suppress(asyncio.CancelledError):
            await runner.cleanup()


def _server_sent(event: Event) -> bytes:
    """Return an event as a server-sent one; what is not stored has no id to go on from."""
    lines = [f"event: {event.kind}", f"data: {json.dumps(event.to_json())}"]
    if event.number >= 0:
        lines.insert(0, f"id: {event.number}")
    return ("\n".join(lines) + "\n\n").encode()


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} must be a text, not {value!r}")
    return value


def _one_of(given: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = given.get(name)
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)
