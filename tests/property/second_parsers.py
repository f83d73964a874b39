"""Second implementations of what the S3 port parses, for comparison only: llhttp (Node's parser, as aiohttp builds it
in), the standard
library's e-mail parser, and small ones written straight from the grammars, which take all bytes at once and know
nothing of pieces, limits or speed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from email.parser import BytesParser
from typing import Any, NamedTuple

from aiohttp._http_parser import HttpRequestParser  # type: ignore[attr-defined]
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError


class Refused(Exception):
    """The second implementation does not take it; or it is not complete."""


# --- RFC 9112 and RFC 9110, by their ABNF

TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_FIELD = rb"(%b+):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[ \t\x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*" % TCHAR
_REQUEST_LINE = re.compile(rb"(%b+) ([\x21-\x7e]+) (HTTP/[0-9]\.[0-9])" % TCHAR)
_FIELD_LINE = re.compile(_FIELD)


class RfcHead(NamedTuple):
    method: bytes
    target: bytes
    version: bytes
    fields: list[tuple[bytes, bytes]]


def rfc_head(raw: bytes) -> RfcHead:
    """``request-line CRLF *( field-line CRLF )``, without its last CRLF: syntax alone."""
    first, *lines = raw.split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    fields = [_FIELD_LINE.fullmatch(each) for each in lines]
    if line is None or not all(fields):
        raise Refused
    return RfcHead(line[1], line[2], line[3], [(field[1].lower(), field[2]) for field in fields if field])


_CHUNK_EXT = (
    rb"(?:[ \t]*;[ \t]*%b+(?:[ \t]*=[ \t]*(?:%b+|\"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t"
    rb" \x21-\x7e\x80-\xff])*\"))?)*"
    % (
        TCHAR,
        TCHAR,
    )
)
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)%b\r\n" % _CHUNK_EXT)
_CHUNK_UNREAD_EXT = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILER_SECTION = re.compile(rb"(?:%b\r\n)*\r\n" % _FIELD)


def rfc_chunks(wire: bytes, *, read_extensions: bool = True) -> tuple[bytes, bytes]:
    """``*chunk last-chunk trailer-section CRLF``: (the data, what follows)."""
    data, at = b"", 0
    while True:
        match = (_CHUNK if read_extensions else _CHUNK_UNREAD_EXT).match(wire, at)
        if match is None:
            raise Refused
        size, at = int(match[1], 16), match.end()
        if size == 0:
            break
        if size > len(wire) or wire[at + size : at + size + 2] != b"\r\n":
            raise Refused
        data, at = data + wire[at : at + size], at + size + 2
    match = _TRAILER_SECTION.match(wire, at)
    if match is None:
        raise Refused
    return data, wire[match.end() :]


# --- llhttp


class Llhttp(NamedTuple):
    method: str
    target: str
    fields: list[tuple[bytes, bytes]]
    close: bool
    chunked: bool
    body: bytes
    complete: bool


_LOOP = asyncio.new_event_loop()


def llhttp(data: bytes) -> Llhttp:
    """The one request in ``data``; its body may be incomplete."""

    async def parse() -> Any:
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_line_size=2**16, max_field_size=2**16)
        try:
            return parser.feed_data(data)[0]
        except (HttpProcessingError, ValueError) as error:
            raise Refused(str(error)) from error

    messages = _LOOP.run_until_complete(parse())
    if len(messages) != 1:
        raise Refused(f"{len(messages)} requests")
    message, payload = messages[0]
    if payload.exception() is not None:
        raise Refused(str(payload.exception()))
    body = b"".join(getattr(payload, "_buffer", ()))
    fields = [(name.lower(), value) for name, value in message.raw_headers]
    return Llhttp(message.method, message.path, fields, message.should_close, message.chunked, body, payload.is_eof())


# --- aws-chunked, by AWS's description


def aws_chunks(
    wire: bytes, trailing: list[bytes], sign: tuple[bytes, str, str, str] | None
) -> tuple[bytes, dict[str, str]]:
    """(the data, the trailers). ``sign``: key, timestamp, scope, seed. Everything there is, exactly as documented."""
    data, trailers, at, previous = b"", {}, 0, sign[3] if sign else ""
    empty = hashlib.sha256(b"").hexdigest()

    def expect(text: bytes) -> None:
        nonlocal at
        if not wire.startswith(text, at):
            raise Refused(text)
        at += len(text)

    def signature(kind: str, *last: str) -> str:
        assert sign is not None
        text = "\n".join((f"AWS4-HMAC-SHA256-{kind}", sign[1], sign[2], previous, *last))
        return hmac.new(sign[0], text.encode(), "sha256").hexdigest()

    while True:
        size = re.compile(rb"[0-9A-Fa-f]{1,11}").match(wire, at)
        if size is None:
            raise Refused("size")
        at = size.end()
        count = int(size[0], 16)
        header_end = wire.find(b"\r\n", at)
        piece = wire[header_end + 2 : header_end + 2 + count]
        if sign:
            previous = signature("PAYLOAD", empty, hashlib.sha256(piece).hexdigest())
            expect(f";chunk-signature={previous}".encode())
        expect(b"\r\n")
        if not count:
            break
        expect(piece)
        if len(piece) < count:
            raise Refused("short")
        expect(b"\r\n")
        data += piece
    for _ in trailing:
        field = re.compile(_FIELD + rb"\r\n").match(wire, at)
        if field is None or field[1].lower() not in trailing or field[1].lower().decode() in trailers:
            raise Refused("trailer")
        at = field.end()
        trailers[field[1].lower().decode()] = field[2].decode("latin-1")
    if sign and trailing:
        listed = "".join(f"{name}:{value}\n" for name, value in trailers.items())
        expect(
            b"x-amz-trailer-signature:"
            + signature("TRAILER", hashlib.sha256(listed.encode("latin-1")).hexdigest()).encode()
            + b"\r\n"
        )
    expect(b"\r\n")
    if at != len(wire):
        raise Refused("more")
    return data, trailers


# --- multipart/form-data: RFC 2046 5.1.1, RFC 7578


class FormPart(NamedTuple):
    headers: list[tuple[bytes, bytes]]
    content: bytes


def rfc_form(body: bytes, boundary: bytes) -> list[FormPart]:
    """The parts up to the close delimiter, or all that end in a delimiter."""
    _, *rest = (b"\r\n" + body).split(b"\r\n--" + boundary)
    parts: list[FormPart] = []
    for number, each in enumerate(rest):
        if each.startswith(b"--") and (len(each) == 2 or each.startswith(b"--\r\n")):
            return parts
        if not each.startswith(b"\r\n") or number == len(rest) - 1:
            raise Refused
        head, separator, content = each.partition(b"\r\n\r\n")
        if not separator:
            raise Refused
        fields = [_FIELD_LINE.fullmatch(line) for line in head.split(b"\r\n")[1:]]
        if not all(fields):
            raise Refused
        parts.append(FormPart([(field[1].lower(), field[2]) for field in fields if field], content))
    raise Refused


def email_form(body: bytes, content_type: str) -> list[tuple[str | None, bytes]]:
    """(name, content) of each part, as the standard library reads an e-mail."""
    message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    if not message.is_multipart():
        raise Refused
    found = []
    for part in message.get_payload():
        assert not isinstance(part, str)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        found.append((str(name) if name is not None else None, content if isinstance(content, bytes) else b""))
    return found
