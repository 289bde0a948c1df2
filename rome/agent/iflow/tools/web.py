"""Fetches a page of the web as text. Off unless it is asked for by name.

Addresses inside a network, this machine's own among them, are refused at each step of a redirect
and for each address that a name stands for.
"""

from __future__ import annotations

import html.parser
import ipaddress
import re
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from rome.agent.iflow.places.output import is_long, join
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

SECONDS = 30.0
MAX_BYTES = 2 << 20
MAX_REDIRECTS = 5
_SILENT = {"script", "style", "noscript", "template", "svg", "head"}
_BREAKS = {"p", "div", "br", "li", "tr", "pre", "section", "article", "ul", "ol", "table"}
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}


class WebFetchTool(Tool):
    """Fetches a page; `allows_private` lets it reach addresses inside a network."""

    name = "web_fetch"
    description = "Fetch a page of the web by its address, and read it as text."
    parameters = takes("url", url=of("string", "http:// or https://"))
    is_parallel = True
    accesses = "network"
    shown = ("url",)

    def __init__(self, *, allows_private: bool = False) -> None:
        self._allows_private = allows_private

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        resolver: AbstractResolver = ThreadedResolver()
        if not self._allows_private:
            resolver = _PublicResolver(resolver)
        connector = aiohttp.TCPConnector(resolver=resolver)
        limit = aiohttp.ClientTimeout(total=SECONDS)
        url = arguments["url"]
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
                status, kind, data = await self._follow(session, url)
        except TimeoutError as error:
            raise ToolError(f"{url} did not answer within {SECONDS:g} seconds") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # aiohttp wraps what the resolver says.
            reason = getattr(error, "os_error", None) or error
            raise ToolError(f"{url} cannot be fetched: {reason}") from error
        if not kind.startswith("text/") and not re.search(r"json|xml|javascript", kind):
            raise ToolError(f"{url} is {kind}, and no text")
        text = data.decode(errors="replace")
        if "html" in kind:
            text = to_text(text)
        file = ""
        if is_long(text):
            file = f"{context.workspace.outputs}/fetched-{time.time_ns():x}.txt"
            await context.workspace.write(file, text.encode(errors="replace"))
            text = join(text, text, len(data), file)
        return ToolResult(text, "ok" if status < 400 else "error", file=file)

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> tuple[int, str, bytes]:
        """Return status, type and content of a page, redirects followed."""
        for _ in range(MAX_REDIRECTS + 1):
            self._check(url)
            async with session.get(url, allow_redirects=False) as response:
                target = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and target:
                    url = urljoin(url, target)
                    continue
                data = await response.content.read(MAX_BYTES)
                while len(data) < MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
                    data += more
                return response.status, response.content_type, data[:MAX_BYTES]
        raise ToolError(f"{url}: more than {MAX_REDIRECTS} redirects")

    def _check(self, url: str) -> None:
        """Raise ToolError for an address that is none, or that names a private host by number."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ToolError(f"{url!r} is no address that begins with http:// or https://")
        if not self._allows_private and is_private(parts.hostname):
            raise ToolError(f"{parts.hostname} is an address inside a network, which is refused")


class _PublicResolver(AbstractResolver):
    """Resolves names, and refuses those that stand for a private address."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name."""
        found = await self._resolver.resolve(host, port, family)
        if any(is_private(one["host"]) for one in found):
            raise OSError(f"{host} stands for an address inside a network, which is refused")
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._resolver.close()


def is_private(host: str) -> bool:
    """Return whether a host is an address, however it is written, that is not a public one."""
    try:
        # As the system's own functions read it: 127.1, 0x7f000001 and 2130706433 are addresses.
        address = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        address = host.partition("%")[0]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return not (inner or parsed).is_global or parsed.is_multicast


def to_text(page: str) -> str:
    """Return what a page of HTML says: headings, paragraphs, lists, and where links lead."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = [" ".join(line.split()) for line in "".join(reader.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0
        self._links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self._silent = 0  # a head that was never closed
        self._silent += tag in _SILENT
        if tag in _HEADINGS:
            self.parts.append(f"\n\n{_HEADINGS[tag]}")
        elif tag in _BREAKS:
            self.parts.append("\n- " if tag == "li" else "\n")
        elif tag == "a":
            self._links.append(dict(attrs).get("href") or "")
        elif tag in ("td", "th"):
            self.parts.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in _SILENT))
        if tag in _HEADINGS or tag in ("p", "pre", "table"):
            self.parts.append("\n\n")
        elif tag == "a" and self._links:
            target = self._links.pop()
            if target and not target.startswith(("#", "javascript:")):
                self.parts.append(f" ({target})")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)
