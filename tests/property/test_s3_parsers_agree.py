"""Two parsers of the same bytes are how requests are smuggled: over hostile input ours agrees with second
implementations, or one of
the rules below, by name, says why it is the stricter one."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from storaged.errors import S3Error
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.http.chunks import ChunkReader, TransferChunks
from storaged.s3.http.form_data import FormReader, boundary_of
from storaged.s3.http.grammar import Head, parse_head
from storaged.s3.http.limits import Limits
from tests.examples import examples
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

LIMITS = Limits()
EXAMPLES = settings(max_examples=examples(400), deadline=None)

HOSTILE = (
    b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x7f", b"\x80", b"\x85", b"\xa0", b"\xff", b"\xc2\xa0", b"\xe2\x80\x83",  # noqa: E501
    b"\xe2\x84\xaa", b"\xd9\xa5", b":", b",", b";", b"=", b'"', b"\\", b"/", b"@", b"[", b"%", b"0", b"1", b"a", b"x", b"-", b"--", b"\r\n\r\n",  # noqa: E501
)  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes of something right are put in, taken out, or doubled."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("in", "in", "out", "over", "double")))
        size = draw(st.integers(1, 4))
        if kind == "out":
            data = data[:at] + data[at + size :]
        elif kind == "double":
            data = data[:at] + data[at : at + 3 * size] * 2 + data[at + 3 * size :]
        else:
            data = data[:at] + draw(st.sampled_from(HOSTILE)) + data[at + (size if kind == "over" else 0) :]
    return data


def explained(rules: dict[str, Callable[[], object]], what: object) -> None:
    name = next((name for name, holds in rules.items() if holds()), None)
    assert name is not None, f"no rule explains {what!r}"
    event(name)


# --- heads

_VALUES = {
    b"Host": (b"h", b"h:80", b"", b"[::1]:9000", b"h,h", b"a b"),
    b"Content-Length": (b"0", b"5", b"05", b"+5", b"5,5", b"5 5", b"0x5", b"", b"99999999999999999999"),
    b"Transfer-Encoding": (
        b"chunked",
        b"Chunked",
        b"gzip, chunked",
        b"identity",
        b"chunked, chunked",
        b"chun\xe2\x84\xaaed",
        b"chunked\xc2\xa0",
        b"",
    ),
    b"Connection": (b"close", b"keep-alive", b"Close, x", b"keep-alive, close", b"\xe2\x84\xaaeep-alive"),
    b"Expect": (b"100-continue",),
    b"X-Amz-Date": (b"20130524T000000Z", b"\xd9\xa5"),
    b"X-Amz-Meta-A": (b"v", b"caf\xe9", b"", b" v\t"),
    b"Range": (b"bytes=0-", b"bytes=\xd9\xa5-"),
}
_FIELDS = st.one_of(
    *(
        st.builds(b"%b:%b%b".__mod__, st.tuples(st.just(name), st.sampled_from((b"", b" ")), st.sampled_from(values)))
        for name, values in _VALUES.items()
    )
)
_HEADS = st.builds(
    lambda line, host, fields: b"\r\n".join([line, *host, *fields]),
    st.builds(
        b"%b %b %b".__mod__,
        st.tuples(
            st.sampled_from((b"GET", b"PUT", b"POST", b"HEAD", b"DELETE", b"OPTIONS")),
            st.sampled_from(
                (
                    b"/",
                    b"/b/k?x=1",
                    b"/b//k%20",
                    b"http://h/b",
                    b"http://x/b",
                    b"https://h:443/",
                    b"*",
                    b"http:///a",
                    b"/a#b",
                    b"/\xc3\xa9",
                )
            ),
            st.sampled_from(
                (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9")
            ),
        ),
    ),
    st.sampled_from(([b"Host: h"], [b"Host: h"], [b"Host: h"], [])),
    st.lists(_FIELDS, max_size=3),
)


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
    rb"(?!(content-(disposition|type)|x-amz-(copy-source|rename-source|tagging|website-redirect-location))$|x-amz-meta-)"
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


@EXAMPLES
@given(broken(_HEADS))
@example(b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chun\xe2\x84\xaaed")
@example(b"GET http://h HTTP/1.1\r\nHost: h")
@example(b"GET /a\xc3\xa9 HTTP/1.1\r\nHost: h")
@example(b"GET / HTTP/1.1\r\nHost: h\r\nRangenge: bytes=\xd9\xa5-")
def test_heads_are_what_the_grammar_says(raw: bytes) -> None:
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
    named = re.match(rb"https?://([^/?#]*)", head.target, re.IGNORECASE)
    assert ours.headers == ({"host": named[1].decode()} if named else {}) | _joined(head.fields)
    length = head.fields and _of(head.fields, b"content-length")
    assert ours.length == (None if _of(head.fields, b"transfer-encoding") else int(length[0]) if length else 0)


@EXAMPLES
@given(broken(_HEADS))
def test_heads_are_what_llhttp_says(raw: bytes) -> None:
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
            event("the grammar does not allow it")
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

_EXTENSIONS = st.sampled_from((b"", b"", b";a", b";a=b", b' ; a="b;\\"c"', b";", b";=", b"; a b"))
_TRAILERS = st.lists(
    st.sampled_from((b"A: b\r\n", b"Content-Length: 5\r\n", b"X:\r\n", b"a\r\n", b": b\r\n", b"A : b\r\n")), max_size=2
)


@st.composite
def _chunked(draw: st.DrawFn) -> bytes:
    wire = b""
    for _ in range(draw(st.integers(0, 3))):
        data = draw(st.sampled_from((b"a", b"hello", b"\r\n", b"0\r\n\r\n", b"5\r\n", b"x" * 20)))
        size = draw(st.sampled_from((b"%x", b"%X", b"%03x"))) % len(data)
        wire += size + draw(_EXTENSIONS) + b"\r\n" + data + b"\r\n"
    return wire + b"0" + draw(_EXTENSIONS) + b"\r\n" + b"".join(draw(_TRAILERS)) + b"\r\n"


def _cut(data: bytes, step: int) -> Iterable[bytes]:
    return (data[start : start + step] for start in range(0, len(data), step))


def _decode(decoder: ChunkReader, wire: bytes, step: int) -> bytes | None:
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


@EXAMPLES
@given(broken(_chunked()), st.sampled_from((1, 2, 3, 7, 1000)))
@example(b"1\r\na\r\n" * 200 + b"0\r\n\r\n", 5)
def test_chunks_are_what_the_grammar_says(wire: bytes, step: int) -> None:
    decoder = TransferChunks()
    ours = _decode(decoder, wire, step)
    try:
        data, rest = rfc_chunks(wire)
    except Refused:
        if ours is not None:
            event("extensions are not read, but for what might end their line")
            assert (ours, bytes(decoder.rest)) == rfc_chunks(wire, read_extensions=False)
        return
    if ours is None:
        explained({"a size has at most 15 digits": lambda: re.search(rb"(^|\n)[0-9A-Fa-f]{16,}", wire)}, wire)
        return
    assert ours == data
    assert bytes(decoder.rest) == rest


@EXAMPLES
@given(broken(_chunked()), st.sampled_from((1, 3, 1000)))
def test_chunks_are_what_llhttp_says(wire: bytes, step: int) -> None:
    decoder = TransferChunks()
    ours = _decode(decoder, wire, step)
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

_KEY = sigv4.ChunkKey(b"k" * 32, "20130524T000000Z", "20130524/r/s3/aws4_request", "0" * 64)
_NAME = b"x-amz-checksum-crc32"


def _aws_wire(pieces: list[bytes], signed: bool, trailing: bool) -> bytes:
    wire, previous = b"", _KEY.seed
    for data in (*pieces, b""):
        wire += b"%x" % len(data)
        if signed:
            previous = sigv4.chunk_signature(_KEY, previous, hashlib.sha256(data).hexdigest())
            wire += b";chunk-signature=" + previous.encode()
        wire += b"\r\n" + (data + b"\r\n" if data else b"")
    if trailing:
        wire += _NAME + b":AAAAAA==\r\n"
        if signed:
            wire += (
                b"x-amz-trailer-signature:"
                + sigv4.trailer_signature(_KEY, previous, _NAME + b":AAAAAA==\n").encode()
                + b"\r\n"
            )
    return wire + b"\r\n"


@EXAMPLES
@given(
    st.data(),
    st.lists(st.sampled_from((b"a", b"hello", b"\r\n", b"0\r\n\r\n")), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from((1, 5, 1000)),
)
def test_aws_chunked_is_what_aws_describes(
    data: st.DataObject, pieces: list[bytes], signed: bool, trailing: bool, step: int
) -> None:
    wire = data.draw(broken(st.just(_aws_wire(pieces, signed, trailing))))
    decoder = ChunkedDecoder(_KEY if signed else None, (_NAME.decode(),) if trailing else ())
    ours = _decode(decoder, wire, step)
    try:
        expected = aws_chunks(
            wire, [_NAME] if trailing else [], (_KEY.key, _KEY.timestamp, _KEY.scope, _KEY.seed) if signed else None
        )
    except Refused:
        if ours is not None:
            explained({"AWS's example ends a trailer in LF": lambda: trailing and re.search(rb"[^\r]\n", wire)}, wire)
        return
    if ours is None:
        explained({"a trailer is printable ASCII": lambda: not wire.isascii() or b"\t" in wire}, wire)
        return
    assert (ours, decoder.trailers) == expected


# --- forms

_TYPE = "multipart/form-data; boundary=b"
_DISPOSITIONS = st.sampled_from(
    (
        b'form-data; name="key"', b'form-data; name="Key"', b"form-data; name=acl", b'form-data; name="a;b"', b'Form-Data; NAME="x"', b"form-data",  # noqa: E501
        b'form-data; name="a"; name="b"', b'form-data; filename="n; name=q"; name="y"', b'attachment; name="z"', b'form-data; name="\\"q\\""',  # noqa: E501
    )
)  # fmt: skip
_PART_HEADERS = st.sampled_from(
    (
        b"",
        b"",
        b"",
        b"\r\nContent-Type: text/plain",
        b"\r\nContent-Transfer-Encoding: base64",
        b'\r\nContent-Disposition: form-data; name="key"',
        b"\r\nX: a\r\n b",
    )
)
_CONTENTS = st.sampled_from((b"", b"v", b"a\r\nb", b"--b", b"\r\n--bx", b"\n--b", b"\r\n\r\n", b"\xff\x00"))


@st.composite
def _forms(draw: st.DrawFn) -> bytes:
    parts = [(draw(_DISPOSITIONS), draw(_PART_HEADERS), draw(_CONTENTS)) for _ in range(draw(st.integers(0, 3)))]
    parts.append((b'form-data; name="file"; filename="f"', draw(_PART_HEADERS), draw(_CONTENTS)))
    if draw(st.booleans()):
        parts.append((b'form-data; name="submit"', b"", b"after the file"))
    start = draw(st.sampled_from((b"", b"", b"preamble\r\n")))
    return (
        start
        + b"".join(b"--b\r\nContent-Disposition: %b%b\r\n\r\n%b\r\n" % part for part in parts)
        + b"--b--"
        + draw(st.sampled_from((b"", b"\r\n", b"x")))
    )


def _our_form(body: bytes, step: int) -> tuple[dict[str, str], bytes] | None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in _cut(body, step):
            yield piece

    async def read() -> tuple[dict[str, str], bytes]:
        form = FormReader(pieces(), boundary_of(_TYPE))
        await form.read_fields()
        return form.fields, b"".join([bytes(piece) async for piece in form.file()])

    try:
        return asyncio.run(read())
    except S3Error:
        return None


_PARAMETER = (
    rb"[ \t]*;["
    rb' \t]*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)=([!#$%&\'*+\-.^_`|~0-9A-Za-z]+|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*")'  # noqa: E501
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


@EXAMPLES
@given(broken(_forms()), st.sampled_from((1, 4, 1000)))
def test_forms_are_what_the_grammar_says(body: bytes, step: int) -> None:
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


@EXAMPLES
@given(broken(_forms()))
def test_a_form_that_is_taken_is_what_an_e_mail_parser_reads(body: bytes) -> None:
    ours = _our_form(body, 1000)
    if ours is None:
        return
    found = email_form(body, _TYPE)
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
