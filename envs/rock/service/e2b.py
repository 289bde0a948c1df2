"""The part of E2B's REST interface that makes, lists and ends sandboxes (its OpenAPI, "sandboxes"),
for programs that were written for it.

A `templateID` is what `image` is elsewhere: a template, an environment of the hub, or "base". What
runs inside a sandbox is asked for by the other routes: E2B's own in-sandbox server is not imitated.
"""

from __future__ import annotations

import datetime
from typing import Any

from aiohttp import web

from envs.rock.errors import SandboxClosedError
from envs.rock.service.admin import Admin
from envs.rock.service.records import Record
from envs.rock.service.server import USER, Server
from envs.rock.wire.api import Field, Refusal, check, parse_json

VERSION = "0.1.0"  # of the in-sandbox server, which E2B's answers name
TIMEOUT_SECONDS = 15.0  # E2B's default time to live
_CREATE = {
    "templateID": Field("string", "what to start", required=True, low=1, high=200),
    "timeout": Field("number", "seconds to live", low=1, high=7 * 24 * 3600),
    "metadata": Field("map", "any", high=100),
    "envVars": Field("map", "not supported here: give them with each command", high=100),
}
_TIMEOUT = {
    "timeout": Field(
        "number", "seconds to live from now on", required=True, low=1, high=7 * 24 * 3600
    )
}


def mount(server: Server, admin: Admin, app: web.Application) -> None:
    """Add the routes to the admin's application, and to its documentation."""
    routes = _Routes(admin)
    table = (
        ("POST", "/sandboxes", routes.create, "Make a sandbox."),
        ("GET", "/sandboxes", routes.list, "The caller's sandboxes."),
        ("GET", "/sandboxes/{sandboxID}", routes.get, "One of them."),
        ("DELETE", "/sandboxes/{sandboxID}", routes.delete, "End it."),
        (
            "POST",
            "/sandboxes/{sandboxID}/timeout",
            routes.set_timeout,
            "Let it live that long from now on.",
        ),
    )
    for method, path, handler, says in table:
        app.router.add_route(method, path, handler)
        item = server.more_documentation.setdefault(path, {})
        item[method.lower()] = {
            "summary": says,
            "tags": ["E2B"],
            "responses": {"default": {"description": "As E2B has it."}},
        }
        if "{" in path:
            item["parameters"] = [
                {"name": "sandboxID", "in": "path", "required": True, "schema": {"type": "string"}}
            ]


class _Routes:
    def __init__(self, admin: Admin):
        self._admin = admin

    async def create(self, request: web.Request) -> web.Response:
        arguments = check(_CREATE, parse_json(await request.read()))
        if arguments.get("envVars"):
            raise ValueError("envVars are not supported: give variables with each command")
        answer = await self._admin.call(
            "start", {"config": {"image": arguments["templateID"]}}, None, request[USER]
        )
        record = self._record(answer["sandbox"], request[USER])
        record.template, record.metadata = arguments["templateID"], arguments.get("metadata", {})
        record.live(arguments.get("timeout", TIMEOUT_SECONDS))
        return web.json_response(_brief(record), status=201)

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response(
            [
                _full(record)
                for record in self._admin.running(request[USER])
                if record.state == "running"
            ]
        )

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(
            _full(self._record(request.match_info["sandboxID"], request[USER]))
        )

    async def delete(self, request: web.Request) -> web.Response:
        record = self._record(request.match_info["sandboxID"], request[USER])
        await self._admin.call("stop", {"sandbox": record.name}, None, request[USER])
        return web.Response(status=204)

    async def set_timeout(self, request: web.Request) -> web.Response:
        record = self._record(request.match_info["sandboxID"], request[USER])
        record.live(check(_TIMEOUT, parse_json(await request.read()))["timeout"])
        return web.Response(status=204)

    def _record(self, name: str, user: str) -> Record:
        found = [
            record
            for record in self._admin.running(user)
            if record.name == name and record.state == "running"
        ]
        if not found:
            raise Refusal(
                "unknown_sandbox", f"there is no sandbox {name[:80]!r}"
            ) from SandboxClosedError()
        return found[0]


def _brief(record: Record) -> dict[str, Any]:
    return {
        "sandboxID": record.name,
        "clientID": record.member.name,
        "templateID": record.template or "base",
        "envdVersion": VERSION,
    }


def _full(record: Record) -> dict[str, Any]:
    config = record.plan.config
    return _brief(record) | {
        "state": "running",
        "startedAt": _date(record.began),
        "endAt": _date(record.ends_at()),
        "metadata": record.metadata,
        "cpuCount": max(1, round(config.cpus)),
        "memoryMB": config.memory_mb,
        "diskSizeMB": config.disk_mb,
    }


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")
