"""The part of E2B's REST interface that creates, lists and ends sandboxes.

It serves programs that were written for E2B (its OpenAPI document, tag "sandboxes"). A `templateID`
is what `image` is elsewhere: a template, an environment of the hub, or "base". Commands and files
use the routes of ROCK: E2B's server inside the sandbox is not imitated.
"""

from __future__ import annotations

import datetime
from typing import Any

from aiohttp import web

from envs.rock.errors import SandboxClosedError
from envs.rock.service.admin import Admin
from envs.rock.service.records import Record
from envs.rock.service.server import USER, Server
from envs.rock.wire.errors import Refusal
from envs.rock.wire.fields import Field, check, parse_json

VERSION = "0.1.0"  # of the in-sandbox server, which E2B's responses name
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
    """Add the routes to an admin's application, and to its OpenAPI document."""
    routes = _Routes(admin)
    one = "/sandboxes/{sandboxID}"
    table = (
        ("POST", "/sandboxes", routes.create, "Make a sandbox."),
        ("GET", "/sandboxes", routes.list_running, "The caller's sandboxes."),
        ("GET", one, routes.get, "One of them."),
        ("DELETE", one, routes.delete, "End it."),
        ("POST", f"{one}/timeout", routes.set_timeout, "Let it live that long from now on."),
    )
    for method, path, handler, summary in table:
        app.router.add_route(method, path, handler)
        item = server.more_documentation.setdefault(path, {})
        item[method.lower()] = {
            "summary": summary,
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
        template = arguments["templateID"]
        record = await self._admin.start_sandbox({"config": {"image": template}}, request[USER])
        record.template = template
        record.metadata = arguments.get("metadata", {})
        record.set_time_to_live(arguments.get("timeout", TIMEOUT_SECONDS))
        return web.json_response(_summary(record), status=201)

    async def list_running(self, request: web.Request) -> web.Response:
        return web.json_response([_details(record) for record in self._running(request)])

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(_details(self._find(request)))

    async def delete(self, request: web.Request) -> web.Response:
        record = self._find(request)
        await self._admin.call("stop", {"sandbox": record.name}, None, request[USER])
        return web.Response(status=204)

    async def set_timeout(self, request: web.Request) -> web.Response:
        record = self._find(request)
        arguments = check(_TIMEOUT, parse_json(await request.read()))
        record.set_time_to_live(arguments["timeout"])
        return web.Response(status=204)

    def _running(self, request: web.Request) -> list[Record]:
        records = self._admin.active_records(request[USER])
        return [record for record in records if record.state == "running"]

    def _find(self, request: web.Request) -> Record:
        name = request.match_info["sandboxID"]
        for record in self._running(request):
            if record.name == name:
                return record
        raise Refusal(
            "unknown_sandbox", f"there is no sandbox {name[:80]!r}"
        ) from SandboxClosedError()


def _summary(record: Record) -> dict[str, Any]:
    return {
        "sandboxID": record.name,
        "clientID": record.placed_on.name,
        "templateID": record.template or "base",
        "envdVersion": VERSION,
    }


def _details(record: Record) -> dict[str, Any]:
    config = record.request.config
    return _summary(record) | {
        "state": "running",
        "startedAt": _format_time(record.began),
        "endAt": _format_time(record.ends_at()),
        "metadata": record.metadata,
        "cpuCount": max(1, round(config.cpus)),
        "memoryMB": config.memory_mb,
        "diskSizeMB": config.disk_mb,
    }


def _format_time(seconds: float) -> str:
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return time.isoformat().replace("+00:00", "Z")
