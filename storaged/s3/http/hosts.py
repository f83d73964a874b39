"""Hosts as requests name them: in the Host header, and in a target of absolute form. Pure.

Sources: RFC 3986 3.2.2 and 3.2.3 (host, port), RFC 9110 7.2 (Host), RFC 9112 3.2.2 (absolute form).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from storaged.errors import BadRequest

_HOST = re.compile(
    rb"(?:\[(?:(?=[0-9A-Fa-f.]*:)[0-9A-Fa-f:.]+|[vV][0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+;=:]+)\]"
    rb"|(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?"
)
"""An address in brackets, which has a colon, or a name, and a port. No two repetitions match the same text one after
the other: a head of 16 KB would take a second. RFC 3986 allows a comma in a name; this server does not, since a list
of hosts is not one host."""
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_PORTS = {b"http": b":80", b"https": b":443"}

_KNOWN_MAX = 1024
_KNOWN_CHARS_MAX = 300
_known: set[str] = set()
"""A cache of valid hosts: clients name few, always the same."""


def check_host(host: str) -> None:
    """Raises BadRequest for a host that is not valid. An empty one is: RFC 9110 7.2 wants it where a target has no
    authority."""
    if host in _known:
        return
    if not host.isascii() or not _HOST.fullmatch(host.encode("ascii")):
        raise BadRequest("The Host header is not a valid host with an optional port.")
    if len(host) <= _KNOWN_CHARS_MAX:
        if len(_known) >= _KNOWN_MAX:
            _known.clear()  # a client invents hosts; those that other clients use are soon back
        _known.add(host)


def origin_form(target: bytes, headers: MutableMapping[str, str]) -> bytes:
    """The path and query of a target in absolute form; any other target unchanged.

    The Host header must name the same host. RFC 9112 wants it ignored, but a signature covers it, and two parsers must
    not choose differently. HTTP/1.0 may omit it: then it is set. Raises BadRequest.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return target
    scheme, named, rest = match[1].lower(), match[2], match[3]
    if not named or not _HOST.fullmatch(named):
        raise BadRequest("The target of the request names no host.")
    given = headers.setdefault("host", named.decode("ascii")).encode("ascii")
    if _normal(named, scheme) != _normal(given, scheme):
        raise BadRequest("The target of the request and its Host header name different hosts.")
    return rest if rest.startswith(b"/") else b"/" + rest


def _normal(host: bytes, scheme: bytes) -> bytes:
    """In lower case, without the scheme's own port."""
    return host.lower().removesuffix(_PORTS[scheme]).removesuffix(b":")
