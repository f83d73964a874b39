"""Which Host headers the port of health and metrics accepts.

The port is on loopback and asks for no password, so a web page must not reach it through a browser. With a name of its
own that suddenly means 127.0.0.1 (DNS rebinding), its script could read the answers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

from aiohttp import web


def names_this_machine(host: str) -> bool:
    """Whether a Host header is an address or localhost: no page of the web has such an origin."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@web.middleware
async def local_hosts(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuses requests for other names with 421."""
    if not names_this_machine(request.headers.get("Host", "")):
        raise web.HTTPMisdirectedRequest(reason="Ask this port by an address or as localhost.")
    return await handler(request)
