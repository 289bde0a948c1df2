"""Tasks to configure a service: a gateway that routes, limits and refuses requests.

The agent writes gateway.ini. The verifier runs the service, its own copy, with that file on
requests that the agent has not seen, and compares what it answers.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random

from envs.tasks.made import gateway
from envs.tasks.made.draft import Case, Draft

SERVICE = pathlib.Path(gateway.__file__).read_text()
PATHS = ["/api", "/static", "/admin", "/health", "/reports", "/files", "/login", "/metrics"]
TARGETS = ["core", "assets", "backoffice", "probe", "ledger", "disk", "identity", "gauge"]
CLIENTS = ["10.0.0.5", "10.0.0.9", "10.0.1.7", "192.168.2.2", "192.168.2.30"]
CASES = 5
REQUESTS = 40


@dataclasses.dataclass(frozen=True)
class Route:
    """What the gateway must do with the requests below a path."""

    path: str
    target: str
    methods: tuple[str, ...]
    role: str
    strip: bool


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"services/{seed}")
    paths = rng.sample(range(len(PATHS)), rng.choice((3, 4)))
    routes = [
        Route(
            PATHS[index],
            TARGETS[index],
            tuple(sorted(rng.sample(("GET", "POST", "PUT", "DELETE"), rng.choice((1, 2))))),
            rng.choice(("", "", "staff", "root")),
            rng.random() < 0.4,
        )
        for index in paths
    ]
    nested = dataclasses.replace(
        routes[0], path=f"{routes[0].path}/v2", target="edge", strip=not routes[0].strip
    )
    routes.append(nested)
    blocked = rng.choice(CLIENTS)
    network = "192.168.2." if not blocked.startswith("192") else "10.0.0."
    limit = rng.choice((3, 4, 5))
    fallback = rng.choice(("", "landing"))
    settings = _settings(routes, blocked, network, limit, fallback)
    cases = []
    for _ in range(CASES):
        requests = _requests(rng, routes)
        answers = gateway.answer_all(gateway.read_settings(settings), requests)
        cases.append(
            Case(
                ("python3", "gateway.py", "{app}/gateway.ini"),
                stdin="\n".join(requests) + "\n",
                files={"gateway.py": SERVICE},
                stdout="\n".join(answers),
            )
        )
    wishes = "\n".join(f"- {_wish(route)}" for route in routes)
    rest = f"go to the target `{fallback}`" if fallback else "get the answer 404"
    return Draft(
        name=f"services/gateway-{seed}",
        domain="services",
        family="services-gateway",
        language="config",
        instruction=f"""\
/app/gateway.py is a gateway that reads requests from its standard input, one a line (`CLIENT \
METHOD PATH [ROLE]`), and prints what it does with each; its own text explains its settings. Write \
/app/gateway.ini so that `python3 gateway.py gateway.ini` does this:

{wishes}
- All other requests {rest}.
- The client {blocked} is refused always.
- A client gets at most {limit} requests, except those from {network}*, which have no limit. A \
request that is refused for another reason does not count.

Where two paths fit, the longer one is meant. The gateway is run with your file on many requests; \
gateway.py itself stays as it is.""",
        program="gateway.ini",
        oracle=settings,
        cases=cases,
        files={"gateway.py": SERVICE},
        origin={"seed": seed},
    )


def _wish(route: Route) -> str:
    who = f" by clients with the role `{route.role}`" if route.role else ""
    how = ", the path without that part" if route.strip else ", with the whole path"
    return (
        f"{' and '.join(route.methods)} requests below `{route.path}`{who} go to the target"
        f" `{route.target}`{how}; other requests there are refused."
    )


def _settings(routes: list[Route], blocked: str, network: str, limit: int, fallback: str) -> str:
    lines = ["[gateway]", f"block = {blocked}", f"limit = {limit}", f"unlimited = {network}"]
    if fallback:
        lines.append(f"default = {fallback}")
    for route in routes:
        lines += ["", f"[route {route.path}]", f"target = {route.target}"]
        lines.append(f"methods = {' '.join(route.methods)}")
        if route.role:
            lines.append(f"role = {route.role}")
        if route.strip:
            lines.append("strip = yes")
    return "\n".join(lines) + "\n"


def _requests(rng: random.Random, routes: list[Route]) -> list[str]:
    requests = []
    for _ in range(REQUESTS):
        route = rng.choice(routes)
        path = rng.choice(
            (route.path, f"{route.path}/a/b", f"{route.path}/v2/x", f"{route.path}x", "/other")
        )
        # Half of the requests are as their route wants them.
        fits = rng.random() < 0.6
        method = rng.choice(route.methods if fits else ("GET", "POST", "PUT", "DELETE"))
        role = route.role if fits else rng.choice(("", "staff", "root"))
        # Clients without a limit ask more often, or most answers would be that it is reached.
        client = rng.choice((*CLIENTS, "192.168.2.2", "10.0.0.5", f"172.16.0.{rng.randint(1, 30)}"))
        requests.append(f"{client} {method} {path} {role}".strip())
    return requests
