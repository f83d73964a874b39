"""The grammar of HTTP/1.1 request heads (RFC 9110, RFC 9112). Pure: bytes in, values out. For bodies see ``chunks``.

Theory of operation. This parser faces hostile clients, and often runs behind a proxy. Requests can be smuggled where
two parsers read the same bytes differently. So each thing can be said in one way, and what a lenient parser would
repair is refused: the request gets an answer (400 BadRequest unless another one is named below), changes nothing, and
its connection is closed, because the start of the next request can't be known. A head is checked as a whole by a
translation table, and split by ``str.split``. Both are native code, as fast as a parser in C that calls back for each
header.

Refused, and why:

* a line that ends in LF alone, a CR without LF: parsers disagree on whether such a line ends
* control characters and NUL in a target or a value: they would reach logs and other servers
* white space before a header's colon, a header that begins with white space (obs-fold): names are compared, and one of
  two parsers would miss it
* a name or a method that is no token, a line without a colon, a request line that is not three words
* Content-Length that is not plain digits, or comes twice, even with the same value; Content-Length with
  Transfer-Encoding; Transfer-Encoding in HTTP/1.0: where the body ends would be unclear
* Transfer-Encoding that is not ``chunked`` alone: 501 NotImplemented
* a byte that is not ASCII in a header that this server interprets: Unicode knows more digits, spaces, and lower cases
  of ``k`` than other parsers do
* Authorization twice: another parser might verify one, and this one the other
* no Host, or two, in HTTP/1.1 (RFC 9112 3.2); a Host that is no host; versions other than HTTP/1.0 and HTTP/1.1
* a target in absolute form whose host is not that of the Host header (RFC 9112 3.2.2); with the same host it is
  accepted, and means its path
* more bytes, lines or headers than ``Limits`` allows: 400 RequestHeaderSectionTooLarge

One empty line before a request is skipped, as RFC 9112 2.2 asks. Header values may have bytes that are not ASCII. They
are decoded as UTF-8, with surrogate escapes for invalid bytes, so that they can be returned unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from storaged import errors
from storaged.errors import BadRequest, RequestHeaderSectionTooLarge
from storaged.s3.http.hosts import check_host, origin_form
from storaged.s3.http.limits import Limits

HEAD_END = b"\r\n\r\n"
CR = 13

_ALLOWED = bytes(code for code in range(256) if code == 9 or 32 <= code != 127)
"""What a line may contain: everything but control characters. HTAB is white space."""
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

_METHODS = {name.encode(): name for name in ("GET", "PUT", "HEAD", "POST", "DELETE", "OPTIONS")}
_VERSIONS = {b"HTTP/1.1": True, b"HTTP/1.0": False}
_ONCE = frozenset({"authorization", "content-length", "host", "transfer-encoding"})
LENGTH_DIGITS_MAX = 18

_INTERPRETED = (
    "x-amz-", "x-storaged-", "authorization", "connection", "content-", "date", "expect", "host", "if-", "origin",
    "range", "transfer-encoding",
)  # fmt: skip
"""Prefixes of the headers whose values this server interprets."""
_ANY_BYTES = frozenset(
    {
        "content-disposition", "content-type", "x-amz-copy-source", "x-amz-rename-source", "x-amz-tagging",
        "x-amz-website-redirect-location",
    }
)  # fmt: skip
"""Of those, the headers that are stored as they are, or that name objects and tags. x-amz-meta-* are another
exception."""

_NAMES_MAX = 1024
_NAME_CHARS_MAX = 64
_names: dict[str, str] = {}
"""A header's name as a client spells it -> lower case. Clients spell few names, always in the same way."""


class Head(Struct, frozen=True):
    """A request's head.

    ``headers`` by lower-case name; several of one name are joined by commas, as Signature Version 4 wants it.
    ``length``: Content-Length, or None for a chunked body. ``declared`` False: the head has neither, which in HTTP
    means an empty body. ``keep_alive``: the client wants to send more requests. ``expects_continue``: it waits for
    ``100 Continue``. ``http11``: the version is HTTP/1.1, not 1.0.
    """

    method: str
    target: bytes
    headers: dict[str, str]
    length: int | None
    declared: bool
    keep_alive: bool
    expects_continue: bool
    http11: bool


def parse_head(raw: bytes, limits: Limits) -> Head:
    """``raw``: the bytes before the empty line. Raises BadRequest, RequestHeaderSectionTooLarge, NotImplemented."""
    lines = raw.decode("utf-8", "surrogateescape").split("\r\n")
    # Only the CRLFs between lines may be outside of _ALLOWED: a stray CR or LF, or any control character, makes the
    # rest longer.
    if len(raw.translate(None, _ALLOWED)) != 2 * len(lines) - 2:
        raise BadRequest()
    if (
        len(raw) > limits.header_line_bytes_max
        or len(raw) > limits.header_section_bytes_max
        or len(lines) > limits.headers_max
    ):
        _check_size(raw, limits)
    words = raw.partition(b"\r\n")[0].split(b" ")
    if len(words) != 3 or not words[1] or b"\t" in words[1]:
        raise BadRequest()
    http11 = _VERSIONS.get(words[2])
    if http11 is None:
        raise BadRequest("Only HTTP/1.1 and HTTP/1.0 are supported.")
    del lines[0]
    headers = _parse_headers(lines)
    if not raw.isascii():
        _check_ascii(headers)
    host = headers.get("host")
    if host is not None:
        check_host(host)
    elif http11:
        raise BadRequest("The Host header is missing.")
    target = words[1]
    if not target.startswith(b"/"):
        target = origin_form(target, headers)
    length, declared = _framing(headers, http11)
    keep_alive, expects = http11, False
    if "connection" in headers:
        keep_alive = _keep_alive(headers["connection"], http11)
    if "expect" in headers:
        expects = http11 and _ascii_lower(headers["expect"]) == "100-continue"
    return Head(
        _METHODS.get(words[0]) or _method(words[0]), target, headers, length, declared, keep_alive, expects, http11
    )


def _parse_headers(lines: list[str]) -> dict[str, str]:
    """Values by lower-case name. Raises BadRequest."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        lower = _names.get(name) or _lower(name)
        if not colon:
            raise BadRequest()
        value = value.strip(" \t")
        if lower in headers:
            if lower in _ONCE:
                raise BadRequest(f"There is more than one {lower} header.")
            value = f"{headers[lower]},{value}"
        headers[lower] = value
    return headers


def broken_so_far(data: bytes, limits: Limits, seen: int = 0) -> Exception | None:
    """Why a head that is not complete yet can't become a valid one, so that its client need not wait; else None.
    ``seen``: that many of the bytes passed this check before, and are not checked again: a head may come byte by byte.
    """
    if len(data) > limits.header_line_bytes_max + limits.header_section_bytes_max:
        return RequestHeaderSectionTooLarge(MaxSizeAllowed=str(limits.header_section_bytes_max))
    if seen:
        data = data[seen - 1 if data[seen - 1] == CR else seen :]
    if data.translate(None, _ALLOWED).strip(b"\r\n") or data.count(b"\n") != data.count(b"\r\n"):
        return BadRequest()
    return None


def _check_size(raw: bytes, limits: Limits) -> None:
    lines = raw.split(b"\r\n")
    if (
        len(lines) - 1 > limits.headers_max
        or len(raw) - len(lines[0]) > limits.header_section_bytes_max
        or any(len(line) > limits.header_line_bytes_max for line in lines)
    ):
        raise RequestHeaderSectionTooLarge(MaxSizeAllowed=str(limits.header_section_bytes_max))


def _lower(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise BadRequest()
    lower = name.lower()
    if len(name) <= _NAME_CHARS_MAX:
        if len(_names) >= _NAMES_MAX:
            _names.clear()  # a client invents names; those that other clients use are soon back
        _names[name] = lower
    return lower


def _method(word: bytes) -> str:
    """A method that S3 does not have: the answer is MethodNotAllowed if it is a token at all."""
    text = word.decode("latin-1")
    if len(text) > _NAME_CHARS_MAX or not _TOKEN.fullmatch(text):
        raise BadRequest()
    return text


def _framing(headers: Mapping[str, str], http11: bool) -> tuple[int | None, bool]:
    """(length, declared) of a head. Raises BadRequest, NotImplemented."""
    text = headers.get("content-length")
    if "transfer-encoding" in headers:
        if text is not None or not http11:
            raise BadRequest("Transfer-Encoding cannot be used with Content-Length, nor in HTTP/1.0.")
        if _ascii_lower(headers["transfer-encoding"]) != "chunked":
            raise errors.NotImplemented("The only Transfer-Encoding is chunked.")
        return None, True
    if text is None:
        return 0, False
    if not (text.isascii() and text.isdigit() and len(text) <= LENGTH_DIGITS_MAX):
        raise BadRequest("Content-Length is not a number.")
    return int(text), True


def _check_ascii(headers: Mapping[str, str]) -> None:
    """Headers that this server interprets must be ASCII: else a digit, a space or a letter of another script could
    count as one of ASCII's. Raises BadRequest."""
    for name, value in headers.items():
        if not value.isascii() and must_be_ascii(name):
            raise BadRequest(f"The {name} header has bytes that are not ASCII.")


def must_be_ascii(name: str) -> bool:
    """Whether this server interprets the value of a header. ``name``: in lower case."""
    return name.startswith(_INTERPRETED) and not (name in _ANY_BYTES or name.startswith("x-amz-meta-"))


def _ascii_lower(value: str) -> str:
    """The lower case of a header that decides where a request ends. It must be ASCII: to Unicode, ``chun\u212aed`` is
    ``chunked``. Raises BadRequest."""
    if not value.isascii():
        raise BadRequest("A header that says how the request is framed has bytes that are not ASCII.")
    return value.lower()


def _keep_alive(connection: str, http11: bool) -> bool:
    options = [option.strip(" \t") for option in _ascii_lower(connection).split(",")]
    return "close" not in options if http11 else "keep-alive" in options and "close" not in options
