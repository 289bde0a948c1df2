"""What `image` may name: templates, environments and images of the hub, Docker images.

And the sandboxes that are kept ready for templates.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from envs.rock.config import SandboxConfig
from envs.rock.errors import IsolationError
from envs.rock.service.fleet import need
from envs.rock.service.hub import EnvHub
from envs.rock.service.records import ENDED, Plan, Record
from envs.rock.wire.api import CONFIG, Refusal, check, config_from_json

log = logging.getLogger("rock.templates")
POOL_USER = "@ready"  # no name that a token can have
RETRY_SECONDS = 5.0  # after a failure to make one ready
MAX_TEMPLATES = 1000
BASE = "base"  # always there: the worker's own programs, and no files


class _Template:
    def __init__(
        self, plan: Plan, given: dict[str, Any], owner: str, environment: str | None, wanted: int
    ):
        self.plan, self.given, self.owner, self.environment, self.wanted = (
            plan,
            given,
            owner,
            environment,
            wanted,
        )
        self.records: deque[Record] = deque()
        self.failed = float("-inf")


class Templates:
    """start: queues one for the pool."""

    def __init__(self, hub: EnvHub, start: Callable[[Plan], Record]):
        self._hub, self._start = hub, start
        self._templates: dict[str, _Template] = {}

    def plan(self, config: Mapping[str, Any]) -> Plan:
        """What a start with that config means.

        A template brings its own limits; the caller's isolation is at least kept.
        """
        given = check(CONFIG, config)
        image = given.pop("image", None)
        if image is None or image == BASE:
            return _plan(given)
        if template := self._templates.get(image):
            _require(given, template.plan.config, image)
            late = {"start_timeout": given["start_timeout"]} if "start_timeout" in given else {}
            return (
                template.plan._replace(
                    config=config_from_json(
                        {**template.plan.wire, **late}, template.plan.config.backend
                    )
                )
                if late
                else template.plan
            )
        try:
            entry = self._hub.get(image)
        except Refusal:
            return _plan(given | {"image": image}, "docker")
        if entry.kind == "image":
            return _plan(given | {"image": entry.reference}, "docker")
        return _plan(given)._replace(environment=entry.digest)

    async def register(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        name, old = arguments["name"], self._templates.get(arguments["name"])
        if old and old.owner != user:
            raise Refusal("forbidden", f"the template {name} is {old.owner}'s")
        if old:
            raise Refusal("conflict", f"there is a template {name}; delete it first")
        if name == BASE or len(self._templates) >= MAX_TEMPLATES:
            raise Refusal(
                "conflict",
                (
                    f"the name {BASE!r} is taken"
                    if name == BASE
                    else f"there are {MAX_TEMPLATES} templates; delete some"
                ),
            )
        plan = self.plan(arguments["config"])
        if environment := arguments.get("environment"):
            entry = self._hub.get(environment)
            if entry.kind != "environment" or plan.environment:
                raise ValueError(
                    f"{environment!r} is no environment, or `config.image` names one already"
                )
            plan = plan._replace(environment=entry.digest)
        self._templates[name] = _Template(
            plan, arguments["config"], user, environment, arguments.get("ready", 0)
        )
        self.refill(time.monotonic())
        return {"name": name, "ready": arguments.get("ready", 0)}

    async def list(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        return {
            "templates": [
                {
                    "name": name,
                    "owner": one.owner,
                    "config": one.given,
                    "environment": one.environment,
                    "wanted": one.wanted,
                    "ready": self.ready()[name],
                }
                for name, one in sorted(self._templates.items())
            ]
        }

    def delete(self, name: str, user: str) -> list[Record]:
        """Those that were ready for it: they are to be ended."""
        template = self._templates.get(name)
        if template is None:
            raise Refusal("not_found", f"there is no template {name!r}")
        if template.owner != user:
            raise Refusal("forbidden", f"the template {name} is {template.owner}'s")
        del self._templates[name]
        return list(template.records)

    def clear(self) -> None:
        self._templates.clear()

    def take(self, config: Mapping[str, Any]) -> Record | None:
        """One that is ready, if the config names its template."""
        template = self._templates.get(config.get("image", ""))
        if template is None:
            return None
        _require(config, template.plan.config, config["image"])
        record = next((record for record in template.records if record.state == "running"), None)
        if record is not None:
            template.records.remove(record)
            self.refill(time.monotonic())
        return record

    def ended(self, record: Record) -> None:
        for template in self._templates.values():
            if record in template.records:
                template.records.remove(record)
                template.failed = time.monotonic()

    def refill(self, now: float) -> None:
        """Make ready what is missing; after a failure not at once."""
        for name, template in self._templates.items():
            while len(template.records) < template.wanted and now - template.failed > RETRY_SECONDS:
                try:
                    record = self._start(template.plan)
                except Refusal as error:
                    log.warning("template %s: %s", name, error)
                    template.failed = now
                    break
                if record.state in ENDED:
                    break
                template.records.append(record)

    def ready(self) -> dict[str, int]:
        return {
            name: sum(record.state == "running" for record in template.records)
            for name, template in self._templates.items()
        }


def _plan(given: dict[str, Any], backend: str = "embedded") -> Plan:
    config = config_from_json(given, backend)
    return Plan(config, given, need(config), f"{backend}:{config.isolation}")


def _require(given: Mapping[str, Any], config: SandboxConfig, name: str) -> None:
    if (
        given.get("isolation", SandboxConfig.isolation) == "required"
        and config.isolation != "required"
    ):
        raise IsolationError(
            f"the template {name} isolates as well as it can, and isolation='required' was"
            " asked for"
        )
