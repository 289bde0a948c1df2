"""Which traffic goes through a proxy of the environment: what leaves this machine, and only that.

Engines, mirrors and environment servers often run beside the program that calls them. A proxy that
is set for downloads cannot reach them. HTTP_PROXY, HTTPS_PROXY and NO_PROXY mean here what they
mean to curl, and a loopback address never goes through a proxy, whatever they say.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
import urllib.request
from typing import Any

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def environment_proxy(url: str) -> str | None:
    """Return the proxy that the environment sets for a URL, or None for a direct connection.

    Sessions get it as `aiohttp.ClientSession(proxy=...)`. The option `trust_env` would do more: it
    sends the passwords of ~/.netrc, and fails where a request has a key of its own.
    """
    if is_loopback(url):
        return None
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def is_loopback(url: str) -> bool:
    """Return whether a URL names this machine: localhost, 127.0.0.0/8, ::1 or 0.0.0.0."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return False
    return address.is_loopback or address.is_unspecified


def open_directly(url: str, seconds: float) -> Any:
    """Return the answer of one GET that goes through no proxy, as urllib's `urlopen` does.

    Raises:
      OSError: there is no answer within `seconds`, or its status is an error.
    """
    return _DIRECT.open(url, timeout=seconds)
