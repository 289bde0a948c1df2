"""A gateway: decides what happens to requests, as its settings say.

    python3 gateway.py gateway.ini < requests

A request is a line `CLIENT METHOD PATH [ROLE]`; its answer is `200 TARGET PATH` or an error status.

Settings (INI):

[gateway]
block = CLIENT ...       clients that always get 403
limit = N                requests that a client may make, then 429; without it there is no limit
unlimited = PREFIX ...   clients whose address begins so have no limit
default = TARGET         gets requests that no route fits; without it they get 404

[route /PATH]            for /PATH itself and everything below /PATH/; the longest one that fits
target = NAME            required
methods = GET ...        others get 405; without it all are allowed
role = NAME              other clients get 401; without it all are allowed
strip = yes              the target gets the path without /PATH
"""

import configparser
import sys


def read_settings(text):
    """Return the settings of an INI text."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read_string(text)
    return settings


def answer_all(settings, lines):
    """Return the answers to requests, in order."""
    counts = {}
    return [answer(settings, line.split(), counts) for line in lines if line.strip()]


def answer(settings, words, counts):
    """Return the answer to one request; `counts` has the requests of each client so far."""
    gateway = settings["gateway"] if settings.has_section("gateway") else {}
    client, method, path = words[:3]
    role = words[3] if len(words) > 3 else ""
    if client in gateway.get("block", "").split():
        return "403"
    target = gateway.get("default", "")
    route = find_route(settings, path)
    if route is None and not target:
        return "404"
    if route is not None:
        if method not in route.get("methods", method).split():
            return "405"
        if role != route.get("role", role):
            return "401"
        target = route["target"]
        if route.getboolean("strip", False):
            path = path[len(route.name.split(" ", 1)[1]) :] or "/"
    is_unlimited = any(client.startswith(start) for start in gateway.get("unlimited", "").split())
    if "limit" in gateway and not is_unlimited:
        counts[client] = counts.get(client, 0) + 1
        if counts[client] > int(gateway["limit"]):
            return "429"
    return f"200 {target} {path}"


def find_route(settings, path):
    """Return the section of the longest route that fits, or None."""
    fitting = []
    for name in settings.sections():
        if name.startswith("route "):
            start = name.split(" ", 1)[1]
            if path == start or path.startswith(start + "/"):
                fitting.append((len(start), name))
    return settings[max(fitting)[1]] if fitting else None


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        current = read_settings(file.read())
    print("\n".join(answer_all(current, sys.stdin.read().splitlines())))
