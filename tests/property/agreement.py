"""The oracles of what the S3 port parses: over any input ours agrees with a second implementation
(``second_parsers``), or one of the rules below, by name, says why ours is the stricter one. Each raises AssertionError
when that is not so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar, cast

from hypothesis import currently_in_test_context, event

from storaged.errors import S3Error
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.http.chunks import LINE_BYTES_MAX, TRAILER_BYTES_MAX, ChunkReader, TransferChunks
from storaged.s3.http.form_data import FormReader, boundary_of
from storaged.s3.http.grammar import Head, parse_head
from storaged.s3.http.limits import Limits
from tests.property.second_parsers import (
    Refused,
    RfcHead,
    aws_chunks,
    email_form,
    llhttp,
    rfc_chunks,
    rfc_form,
    rfc_head,
)

T = TypeVar("T")

LIMITS = Limits()


def note(name: str) -> None:
    """For Hypothesis' statistics: which rule was used."""
    if currently_in_test_context():
        event(name)


def explained(rules: dict[str, Callable[[], object]], what: object) -> None:
    name = next((name for name, holds in rules.items() if holds()), None)
    assert name is not None, f"no rule explains {what!r}"
    note(name)


# --- heads


def _ours(raw: bytes) -> Head | None:
    try:
        return parse_head(raw, LIMITS)
    except S3Error:
        return None


def _of(fields: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for each, value in fields if each == name]


def _joined(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in fields:
        lower, text = name.decode("ascii").lower(), value.strip(b" \t").decode("utf-8", "surrogateescape")
        found[lower] = f"{found[lower]},{text}" if lower in found else text
    return found


_UNDERSTOOD = re.compile(
    rb"(?!(content-(disposition|type)|x-amz-(copy-source|rename-source|tagging|website-redirect-location))$"
    rb"|x-amz-meta-)"
    rb"(host|content-|transfer-encoding|connection|expect|range|origin|date|authorization|if-|x-amz-|x-storaged-).*"
)
"""Names that begin like those whose values decide something."""
_HOST_SYNTAX = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|([A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})*)(:[0-9]{0,5})?")


def _stricter(head: RfcHead) -> dict[str, Callable[[], object]]:
    """Why a head whose syntax is right is refused here."""
    fields, http11 = head.fields, head.version == b"HTTP/1.1"
    lengths, codings, hosts = _of(fields, b"content-length"), _of(fields, b"transfer-encoding"), _of(fields, b"host")
    absolute = re.match(rb"https?://([^/?#]*)", head.target, re.IGNORECASE)
    return {
        "a version that is neither 1.1 nor 1.0": lambda: head.version not in (b"HTTP/1.1", b"HTTP/1.0"),
        "a method has at most 64 characters": lambda: len(head.method) > 64,
        "a head has only so many headers": lambda: len(fields) > LIMITS.headers_max,
        "HTTP/1.1 wants one Host (RFC 9112 3.2)": lambda: len(hosts) > 1 or (http11 and not hosts),
        "a Host is a host and perhaps a port": lambda: any(not _HOST_SYNTAX.fullmatch(host) for host in hosts),
        "a target in absolute form names a host, and that of the Host header": lambda: (
            absolute and (not absolute[1] or absolute[1] not in hosts)
        ),
        "one Content-Length of 1 to 18 digits": lambda: (
            lengths and (len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,18}", lengths[0]))
        ),
        "no Content-Length beside Transfer-Encoding": lambda: lengths and codings,
        "one Transfer-Encoding, chunked, and only in HTTP/1.1": lambda: (
            codings and (len(codings) > 1 or codings[0].lower() != b"chunked" or not http11)
        ),
        "what is understood is ASCII": lambda: any(
            _UNDERSTOOD.fullmatch(name) and not value.isascii() for name, value in fields
        ),
    }


def heads_are_what_the_grammar_says(raw: bytes) -> None:
    raw = raw.partition(b"\r\n\r\n")[0]
    ours = _ours(raw)
    target = raw.split(b" ")[1] if raw.count(b" ") >= 2 else b""
    try:
        head = rfc_head(raw.replace(target, b"/", 1) if ours and not target.isascii() else raw)
    except Refused:
        assert ours is None, "what the grammar does not allow is not taken"
        return
    if ours is None:
        explained(_stricter(head), raw)
        return
    assert ours.method.encode() == head.method
    named = re.match(rb"https?://([^/?#]*)", target, re.IGNORECASE)
    assert ours.headers == ({"host": named[1].decode()} if named else {}) | _joined(head.fields)
    length = head.fields and _of(head.fields, b"content-length")
    assert ours.length == (None if _of(head.fields, b"transfer-encoding") else int(length[0]) if length else 0)


def heads_are_what_llhttp_says(raw: bytes) -> None:
    raw = raw.partition(b"\r\n\r\n")[0]
    ours = _ours(raw)
    try:
        found = llhttp(raw + b"\r\n\r\n")
    except Refused:
        if ours is not None:
            explained(
                {
                    "llhttp knows methods by name": lambda: (
                        ours.method not in ("GET", "PUT", "POST", "HEAD", "DELETE", "OPTIONS")
                    ),
                    "a path is a key's bytes, also those that a URI wants encoded": lambda: (
                        not re.fullmatch(rb"[!\x24-\x3b=?-Z_a-z~]+", ours.target)
                    ),
                    "aiohttp looks into targets and hosts": lambda: (
                        not re.fullmatch(rb"/[A-Za-z0-9/.%?=&]*", raw.split(b" ")[1])
                    ),
                    "aiohttp takes no empty value, or one of bytes above ASCII, in some headers": lambda: any(
                        not value or not value.isascii() for value in ours.headers.values()
                    ),
                },
                raw,
            )
        return
    if ours is None:
        try:
            head = rfc_head(raw)
        except Refused:
            note("the grammar does not allow it")
            return
        explained(_stricter(head), raw)
        return
    assert ours.method == found.method
    named = re.match(rb"https?://([^/?#]*)", found.target.encode("utf-8", "surrogateescape"), re.IGNORECASE)
    assert ours.headers == ({"host": named[1].decode()} if named else {}) | _joined(found.fields)
    assert (ours.length is None) == found.chunked
    options = {option.strip(" \t") for option in ours.headers.get("connection", "").lower().split(",")}
    if {"close", "keep-alive"} <= options:
        assert not ours.keep_alive, "close wins (RFC 9112 9.3); llhttp takes the first in HTTP/1.0"
    else:
        assert ours.keep_alive == (not found.close)
    assert found.complete == (ours.length == 0)


# --- chunks


def _cut(data: bytes, step: int) -> Iterable[bytes]:
    return (data[start : start + step] for start in range(0, len(data), step))


def decoded(decoder: ChunkReader, wire: bytes, step: int) -> bytes | None:
    """None: refused, or not complete."""
    data = b""
    try:
        for piece in _cut(wire, step):
            data += b"".join(bytes(part) for part in decoder.feed(piece))
            while decoder.stopped:
                data += b"".join(bytes(part) for part in decoder.feed(b""))
        if isinstance(decoder, ChunkedDecoder):
            decoder.finish()
    except S3Error:
        return None
    return data if decoder.ended else None


def chunks_are_what_the_grammar_says(wire: bytes, step: int) -> None:
    decoder = TransferChunks()
    ours = decoded(decoder, wire, step)
    try:
        data, rest = rfc_chunks(wire)
    except Refused:
        if ours is not None:
            note("extensions are not read, but for what might end their line")
            assert (ours, bytes(decoder.rest)) == rfc_chunks(wire, read_extensions=False)
        return
    if ours is None:
        explained(
            {
                "a size has at most 15 digits": lambda: re.search(rb"(^|\n)[0-9A-Fa-f]{16,}", wire),
                "a line of a size or of the trailer is only so long": lambda: any(
                    len(line) >= LINE_BYTES_MAX for line in wire.split(b"\n")
                ),
                "a trailer is only so long": lambda: len(wire.rpartition(b"\r\n0")[2]) > TRAILER_BYTES_MAX,
            },
            wire,
        )
        return
    assert ours == data
    assert bytes(decoder.rest) == rest


def chunks_are_what_llhttp_says(wire: bytes, step: int) -> None:
    decoder = TransferChunks()
    ours = decoded(decoder, wire, step)
    head = b"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        found = llhttp(head + wire[: len(wire) - len(decoder.rest)] if ours is not None else head + wire)
    except Refused:
        if ours is not None:
            explained({"llhttp reads extensions and trailers": lambda: b";" in wire or b":" in wire}, wire)
        return
    if ours is None:
        if found.complete:
            explained(
                {
                    "a size has at most 15 digits": lambda: re.search(rb"(^|\n)[0-9A-Fa-f]{16,}", wire),
                    "a trailer is a header": lambda: _refused(rfc_chunks, wire),
                },
                wire,
            )
        return
    assert (found.body, found.complete) == (ours, True)


def _refused(parse: Callable[[bytes], object], wire: bytes) -> bool:
    try:
        parse(wire)
    except Refused:
        return True
    return False


# --- aws-chunked

KEY = sigv4.ChunkKey(b"k" * 32, "20130524T000000Z", "20130524/r/s3/aws4_request", "0" * 64)
_NAME = b"x-amz-checksum-crc32"


def aws_wire(pieces: list[bytes], signed: bool, trailing: bool) -> bytes:
    wire, previous = b"", KEY.seed
    for data in (*pieces, b""):
        wire += b"%x" % len(data)
        if signed:
            previous = sigv4.chunk_signature(KEY, previous, hashlib.sha256(data).hexdigest())
            wire += b";chunk-signature=" + previous.encode()
        wire += b"\r\n" + (data + b"\r\n" if data else b"")
    if trailing:
        wire += _NAME + b":AAAAAA==\r\n"
        if signed:
            wire += (
                b"x-amz-trailer-signature:"
                + sigv4.trailer_signature(KEY, previous, _NAME + b":AAAAAA==\n").encode()
                + b"\r\n"
            )
    return wire + b"\r\n"


def aws_chunked_is_what_aws_describes(wire: bytes, signed: bool, trailing: bool, step: int) -> None:
    decoder = ChunkedDecoder(KEY if signed else None, (_NAME.decode(),) if trailing else ())
    ours = decoded(decoder, wire, step)
    try:
        expected = aws_chunks(
            wire, [_NAME] if trailing else [], (KEY.key, KEY.timestamp, KEY.scope, KEY.seed) if signed else None
        )
    except Refused:
        if ours is not None:
            explained(
                {
                    "AWS's example ends a trailer in LF": lambda: trailing and re.search(rb"[^\r]\n", wire),
                    "names of trailers have no case": lambda: (
                        trailing and re.search(rb"\n(?!x-amz-trailer-signature)(?i:x-amz-trailer-signature):", wire)
                    ),
                },
                wire,
            )
        return
    if ours is None:
        explained(
            {
                "a trailer is printable ASCII": lambda: not wire.isascii() or b"\t" in wire,
                "a line has less than 1 KiB": lambda: any(len(line) >= LINE_BYTES_MAX for line in wire.split(b"\n")),
            },
            wire,
        )
        return
    assert (ours, decoder.trailers) == expected


# --- forms

_TYPE = "multipart/form-data; boundary=b"


def _our_form(body: bytes, step: int) -> tuple[dict[str, str], bytes] | None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in _cut(body, step):
            yield piece

    async def read() -> tuple[dict[str, str], bytes]:
        form = FormReader(pieces(), boundary_of(_TYPE))
        await form.read_fields()
        return form.fields, b"".join([bytes(piece) async for piece in form.file()])

    try:
        return finished(read())
    except S3Error:
        return None


def finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise AssertionError("it waits")


_PARAMETER = (
    rb"[ \t]*;["
    rb" \t]*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)="
    rb'([!#$%&\'*+\-.^_`|~0-9A-Za-z]+|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*")'
)


def _name_of(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The field's name, in lower case; None when the part does not have just one."""
    found = [value for name, value in headers if name == b"content-disposition"]
    if len(found) != 1 or not re.fullmatch(rb"form-data(%b)*[ \t]*" % _PARAMETER, found[0], re.IGNORECASE):
        return None
    parameters = [(name.lower(), value) for name, value in re.findall(_PARAMETER, found[0])]
    if len(dict(parameters)) != len(parameters) or b"name" not in dict(parameters):
        return None
    value = dict(parameters)[b"name"]
    return (value[1:-1].replace(b'\\"', b'"') if value.startswith(b'"') else value).lower() or None


def forms_are_what_the_grammar_says(body: bytes, step: int) -> None:
    ours = _our_form(body, step)
    try:
        parts = rfc_form(body, b"b")
    except Refused:
        if ours is not None:
            explained({"what follows the file is not read": lambda: b'name="file"' in body.lower()}, body)
        return
    names = [_name_of(part.headers) for part in parts]
    file = names.index(b"file") if b"file" in names else len(names)
    if ours is None:
        codings = [
            value.lower()
            for part in parts[: file + 1]
            for name, value in part.headers
            if name == b"content-transfer-encoding"
        ]
        explained(
            {
                "a form has a file": lambda: file == len(names),
                "each part has one Content-Disposition with one name": lambda: None in names[:file],
                "what a part has does not begin with the boundary": lambda: any(
                    part.content.startswith(b"--b") for part in parts[: file + 1]
                ),
                "a field comes once": lambda: len(set(names[:file])) != file,
                "parts come as they are": lambda: any(
                    coding not in (b"7bit", b"8bit", b"binary") for coding in codings
                ),
            },
            body,
        )
        return
    fields = {
        (name or b"").decode("utf-8", "surrogateescape"): part.content.decode("utf-8", "surrogateescape")
        for name, part in zip(names[:file], parts[:file], strict=True)
    }
    assert ours == (fields, parts[file].content)


def a_form_that_is_taken_is_what_an_e_mail_parser_reads(body: bytes) -> None:
    ours = _our_form(body, 1000)
    if ours is None:
        return
    try:
        found = email_form(body, _TYPE)
    except Refused:
        found = []
    names = [(name or "").lower() for name, _ in found]
    try:
        file = names.index("file")
        same = (
            [name.encode().decode("utf-8") for name in names[:file]] == list(ours[0])
            and [content for _, content in found[:file]]
            == [value.encode("utf-8", "surrogateescape") for value in ours[0].values()]
            and found[file][1] == ours[1]
        )
    except (ValueError, UnicodeError):
        same = False
    if not same:
        explained(
            {
                "e-mail takes LF and CR for ends of lines": lambda: re.search(rb"(?<!\r)\n|\r(?!\n)", body),
                "e-mail wants ASCII": lambda: not body.isascii(),
                "e-mail takes headers apart in its own way": lambda: re.search(
                    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\\]|[ \t]+:|=\?", body
                ),
                "e-mail has white space after a boundary": lambda: re.search(rb"--b(--)?[ \t]", body),
            },
            body,
        )
