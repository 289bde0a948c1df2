"""What `image` may name, and the sandboxes that are kept ready for templates.

An image is a template, an environment or image of the hub, or a Docker image.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from envs.rock.config import SandboxConfig
from envs.rock.errors import IsolationError
from envs.rock.images.hub import EnvHub
from envs.rock.service.fleet import need
from envs.rock.service.records import ENDED, Record, StartRequest
from envs.rock.wire.codec import CONFIG, config_from_json
from envs.rock.wire.errors import Refusal
from envs.rock.wire.fields import check

log = logging.getLogger("rock.templates")
POOL_USER = "@ready"  # cannot be the name of a token's user
RETRY_SECONDS = 5.0  # after a failure to make one ready
MAX_TEMPLATES = 1000
BASE = "base"  # always exists: the worker's own programs, and no files


class _Template:
    """A named start request, and the sandboxes that are kept ready for it."""

    def __init__(
        self,
        request: StartRequest,
        config: dict[str, Any],
        owner: str,
        environment: str | None,
        wanted: int,
    ):
        self.request = request
        self.config = config  # as it was registered
        self.owner = owner
        self.environment = environment
        self.wanted = wanted  # sandboxes to keep ready
        self.records: deque[Record] = deque()
        self.failed = float("-inf")  # when one could not be made ready

    def ready(self) -> int:
        return sum(record.state == "running" for record in self.records)


class Templates:
    """All templates of an admin.

    Args:
      hub: where the names of environments and images are looked up.
      start: queues a sandbox that is to be kept ready.
    """

    def __init__(self, hub: EnvHub, start: Callable[[StartRequest], Record]):
        self._hub = hub
        self._start = start
        self._templates: dict[str, _Template] = {}

    def resolve(self, config: Mapping[str, Any]) -> StartRequest:
        """Return what a start with this config means.

        A template brings its own limits; the caller may only change its start_timeout.

        Raises:
          ValueError: the config is malformed.
          IsolationError: the template isolates less than the caller asks.
        """
        given = check(CONFIG, config)
        image = given.pop("image", None)
        if image is None or image == BASE:
            return _make_request(given)
        template = self._templates.get(image)
        if template:
            _require_isolation(given, template.request.config, image)
            if "doors" in given:
                raise ValueError(
                    f"doors beside the template {image}: its sandboxes are made before anyone can"
                    " answer there; start from an environment or an image"
                )
            return _with_timeout(template.request, given.get("start_timeout"))
        try:
            entry = self._hub.get(image)
        except Refusal:
            return _make_request(given | {"image": image}, "docker")
        if entry.kind == "image":
            return _make_request(given | {"image": entry.reference}, "docker")
        return _make_request(given)._replace(environment=entry.digest)

    async def register(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Add a template, and begin to make sandboxes ready for it."""
        name = arguments["name"]
        self._check_free(name, user)
        request = self.resolve(arguments["config"])
        environment = arguments.get("environment")
        if environment:
            entry = self._hub.get(environment)
            if entry.kind != "environment" or request.environment:
                raise ValueError(
                    f"{environment!r} is no environment, or `config.image` names one already"
                )
            request = request._replace(environment=entry.digest)
        wanted = arguments.get("ready", 0)
        self._templates[name] = _Template(request, arguments["config"], user, environment, wanted)
        self.refill(time.monotonic())
        return {"name": name, "ready": wanted}

    def _check_free(self, name: str, user: str) -> None:
        old = self._templates.get(name)
        if old and old.owner != user:
            raise Refusal("forbidden", f"the template {name} is {old.owner}'s")
        if old:
            raise Refusal("conflict", f"there is a template {name}; delete it first")
        if name == BASE:
            raise Refusal("conflict", f"the name {BASE!r} is taken")
        if len(self._templates) >= MAX_TEMPLATES:
            raise Refusal("conflict", f"there are {MAX_TEMPLATES} templates; delete some")

    async def list_all(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Return all templates, by name."""
        templates = []
        for name, template in sorted(self._templates.items()):
            templates.append(
                {
                    "name": name,
                    "owner": template.owner,
                    "config": template.config,
                    "environment": template.environment,
                    "wanted": template.wanted,
                    "ready": template.ready(),
                }
            )
        return {"templates": templates}

    def delete(self, name: str, user: str) -> list[Record]:
        """Remove a template; return the sandboxes that were ready for it, which are to be ended."""
        template = self._templates.get(name)
        if template is None:
            raise Refusal("not_found", f"there is no template {name!r}")
        if template.owner != user:
            raise Refusal("forbidden", f"the template {name} is {template.owner}'s")
        del self._templates[name]
        return list(template.records)

    def clear(self) -> None:
        """Remove all templates."""
        self._templates.clear()

    def take(self, config: Mapping[str, Any]) -> Record | None:
        """Return a sandbox that is ready, if the config names a template that has one."""
        image = config.get("image", "")
        template = self._templates.get(image)
        if template is None:
            return None
        _require_isolation(config, template.request.config, image)
        if config.get("doors"):
            return None  # which `resolve` refuses
        for record in template.records:
            if record.state == "running":
                template.records.remove(record)
                self.refill(time.monotonic())
                return record
        return None

    def ended(self, record: Record) -> None:
        """Note that a sandbox has ended, which may have been kept ready."""
        for template in self._templates.values():
            if record in template.records:
                template.records.remove(record)
                template.failed = time.monotonic()

    def refill(self, now: float) -> None:
        """Start the sandboxes that are missing; after a failure not before RETRY_SECONDS."""
        for name, template in self._templates.items():
            while len(template.records) < template.wanted and now - template.failed > RETRY_SECONDS:
                try:
                    record = self._start(template.request)
                except Refusal as error:
                    log.warning("template %s: %s", name, error)
                    template.failed = now
                    break
                if record.state in ENDED:
                    break
                template.records.append(record)

    def ready(self) -> dict[str, int]:
        """Return the number of sandboxes that are ready, by template."""
        return {name: template.ready() for name, template in self._templates.items()}


def _make_request(given: dict[str, Any], backend: str = "embedded") -> StartRequest:
    config = config_from_json(given, backend)
    return StartRequest(config, given, need(config), f"{backend}:{config.isolation}")


def _with_timeout(request: StartRequest, start_timeout: float | None) -> StartRequest:
    if start_timeout is None:
        return request
    given = {**request.wire, "start_timeout": start_timeout}
    return request._replace(config=config_from_json(given, request.config.backend))


def _require_isolation(given: Mapping[str, Any], config: SandboxConfig, template: str) -> None:
    wanted = given.get("isolation", SandboxConfig.isolation)
    if wanted == "required" and config.isolation != "required":
        raise IsolationError(
            f"the template {template} isolates as well as it can, and isolation='required' was"
            " asked for"
        )
