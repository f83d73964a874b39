"""Input of the S3 port from unknown senders: heads, chunks, forms, targets."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, unquote_to_bytes

from storaged.errors import S3Error
from storaged.s3 import routes
from storaged.s3.auth import aws_chunked, sigv4
from storaged.s3.http import chunks, form_data, grammar
from storaged.s3.http.grammar import broken_so_far
from storaged.s3.http.limits import Limits
from storaged.s3.request import Target as RequestTarget
from storaged.s3.request import parse_target, split_path, virtual_bucket, without_secrets
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, refused
from tests.property import agreement

LIMITS = Limits()
STEPS = (1, 2, 3, 7, 64, 4096)


def head(data: bytes) -> None:
    """Our parser reads a head as the grammar of RFC 9112 and as llhttp do, or refuses it by a named rule. The
    check of a head that is not complete never refuses the beginning of one that is taken, however it is cut."""
    raw = data.partition(b"\r\n\r\n")[0]
    agreement.heads_are_what_the_grammar_says(raw)
    agreement.heads_are_what_llhttp_says(raw)
    taken = refused(lambda: grammar.parse_head(raw, LIMITS))
    if not isinstance(taken, S3Error):
        seen = 0
        for end in sorted({len(raw) * share // 7 for share in range(1, 8)} - {0}):
            assert broken_so_far(raw[:end], LIMITS, seen) is None, "the beginning of a valid head is refused"
            seen = end


def transfer_chunks(data: bytes) -> None:
    """Our parser reads chunks as RFC 9112 says and as llhttp does, in pieces of any size. A turn decodes a bounded
    number of chunks.
    """
    choices = Choices(data)
    step, wire = choices.pick(STEPS), choices.rest()
    agreement.chunks_are_what_the_grammar_says(wire, step)
    agreement.chunks_are_what_llhttp_says(wire, step)
    _turns_are_bounded(chunks.TransferChunks(), wire)


def aws_chunks(data: bytes) -> None:
    """Our parser reads aws-chunked as AWS describes it, signed or not, with a trailer or without. A turn decodes a
    bounded number of chunks.
    """
    choices = Choices(data)
    kind, step, wire = choices.number(4), choices.pick(STEPS), choices.rest()
    agreement.aws_chunked_is_what_aws_describes(wire, bool(kind & 1), bool(kind & 2), step)
    trailing = ("x-amz-checksum-crc32",) if kind & 2 else ()
    _turns_are_bounded(aws_chunked.ChunkedDecoder(None, trailing), wire)


def aws_signed_chunks(data: bytes) -> None:
    """Signed chunks give the body that was signed, or are refused: a change of one byte never gives another body."""
    choices = Choices(data)
    trailing, step, at, bit = choices.flag(), choices.pick(STEPS), choices.number(65536), choices.number(8)
    pieces = [piece for piece in choices.rest().split(b"\n") if piece][:8]
    wire = agreement.aws_wire(pieces, True, trailing)
    agreement.aws_chunked_is_what_aws_describes(wire, True, trailing, step)
    at %= len(wire)
    changed = wire[:at] + bytes((wire[at] ^ 1 << bit,)) + wire[at + 1 :]
    agreement.aws_chunked_is_what_aws_describes(changed, True, trailing, step)
    decoder = aws_chunked.ChunkedDecoder(agreement.KEY, ("x-amz-checksum-crc32",) if trailing else ())
    found = agreement.decoded(decoder, changed, step)
    assert found is None or found == b"".join(pieces), "a body that was changed on its way is taken"


def _turns_are_bounded(decoder: chunks.ChunkReader, wire: bytes) -> None:
    try:
        piece = wire
        while True:
            before = decoder.chunks
            out = decoder.feed(piece)
            assert decoder.chunks - before <= chunks.CHUNKS_A_TURN
            assert len(out) <= chunks.CHUNKS_A_TURN + 1
            if not decoder.stopped:
                break
            piece = b""
        assert len(decoder.rest) <= max(chunks.LINE_BYTES_MAX, len(wire) if decoder.ended else 0)
    except S3Error:
        return


def form(data: bytes) -> None:
    """Our parser reads multipart/form-data as RFC 2046 and RFC 7578 say and as an e-mail parser does, in pieces of any
    size; or it refuses the form by a named rule.
    """
    choices = Choices(data)
    step, body = choices.pick(STEPS), choices.rest()
    agreement.forms_are_what_the_grammar_says(body, step)
    agreement.a_form_that_is_taken_is_what_an_e_mail_parser_reads(body)


def boundary(data: bytes) -> None:
    """An accepted boundary has 1 to 70 characters of RFC 2046, all from the header; any other is refused."""
    text = data.decode("utf-8", "surrogateescape")
    found = refused(lambda: form_data.boundary_of(text))
    if isinstance(found, str):
        assert re.fullmatch(r"[0-9A-Za-z'()+_,\-./:=? ]{1,70}", found)
        assert found in text
        assert not found.endswith(" ")


_SECRET_NAMES = frozenset(
    {
        "x-amz-signature",
        "x-amz-credential",
        "x-amz-security-token",
        "signature",
        "awsaccesskeyid",
        "x-amz-server-side-encryption-customer-key",
        "x-amz-server-side-encryption-customer-key-md5",
        "x-amz-copy-source-server-side-encryption-customer-key",
        "x-amz-copy-source-server-side-encryption-customer-key-md5",
    }
)


def target(data: bytes) -> None:
    """A target is split as the standard library splits it. Its canonical form does not change when it is made again.
    No text of a log has a signature or a customer's key in it. The route of a change refuses repeated parameters."""
    choices = Choices(data)
    method = choices.pick(("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"))
    host, line = choices.line().decode("latin-1"), choices.rest()
    shown = without_secrets(line)
    for item in shown.partition("?")[2].split("&"):
        name, equals, value = item.partition("=")
        if equals and unquote(name).lower() in _SECRET_NAMES:
            assert value == "-", "a log has a secret"
    virtual_bucket(host, ("s3.example.eu",))
    found = refused(lambda: parse_target(line))
    if not isinstance(found, RequestTarget):
        return
    query = line.partition(b"?")[2]
    expected = parse_qsl(
        query.replace(b"+", b" ").decode("latin-1"), keep_blank_values=True, encoding="latin-1", separator="&"
    )
    # the standard library drops a name without a value only where there is nothing at all
    assert [(name.decode("latin-1"), value.decode("latin-1")) for name, value in found.pairs] == expected
    canonical = sigv4.canonical_uri(found.raw_path)
    assert sigv4.canonical_uri(canonical.encode()) == canonical
    assert unquote_to_bytes(canonical) == unquote_to_bytes(found.raw_path)
    named = refused(lambda: split_path(found.raw_path, ""))
    if isinstance(named, S3Error):
        return
    bucket, key = named
    assert (
        bucket.encode() + (b"/" + key if key or b"/" in unquote_to_bytes(found.raw_path)[1:] else b"")
        == unquote_to_bytes(found.raw_path)[1:]
    )
    operation = refused(lambda: routes.find(method, bucket, key, found.query, {}, len(found.pairs)))
    if not isinstance(operation, S3Error) and operation.changes:
        assert len(found.pairs) == len(found.query), "a change takes a parameter that is there twice"


_WORDS = (
    b"GET / HTTP/1.1",
    b"Host: h",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"Connection: close",
    b"Expect: 100-continue",
    b"HTTP/1.0",
    b"http://h/",
    b"X-Amz-Date: 1",
    b"\r\nHost: h",
    b": ",
    b"[::1]:80",
)
_SECRETS = (
    b"X-Amz-Signature=Xecret",
    b"X-Amz-Credential=Xecret",
    b"Signature=Xecret",
    b"%58-Amz-Signature=Xecret",
    b"X-Amz-Security-Token=Xecret",
    b"AWSAccessKeyId=Xecret",
    b"x-amz-server-side-encryption-customer-key=Xecret",
)

_KEY_FIELD = b'--b\r\nContent-Disposition: form-data; name="key"\r\n\r\nv\r\n'
_FILE_FIELD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'

TARGETS = (
    Target(
        "head",
        head,
        (
            b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close",
            b"PUT /b/k?x=1 HTTP/1.1\r\nHost: h:80\r\nContent-Length: 5",
            b"PUT http://h/b HTTP/1.0\r\nTransfer-Encoding: chunked\r\nX-Amz-Meta-A: caf\xe9",
        ),
        Plant(grammar, "_keep_alive", lambda _: lambda connection, http11: True),
        _WORDS,
    ),
    Target(
        "transfer_chunks",
        transfer_chunks,
        (
            b"\x055\r\nhello\r\n0\r\n\r\n",
            b'\x013;a="b"\r\nabc\r\n0\r\nA: b\r\n\r\n',
            b"\x05" + b"1\r\na\r\n" * 90 + b"0\r\n\r\n",
        ),
        Plant(chunks.TransferChunks, "size_line", lambda _: re.compile(rb"([0-9A-Fa-f]{1,15})[^\n]*\r\n")),
        (b"0\r\n\r\n", b"5\r\n", b"1\r\na\r\n", b";a=b", b"A: b\r\n", b"FFFFFFFFFFFFFFFF\r\n"),
    ),
    Target(
        "aws_chunks",
        aws_chunks,
        (b"\x00\x055\r\nhello\r\n0\r\n\r\n", b"\x02\x055\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"),
        Plant(aws_chunked.ChunkedDecoder, "finish", lambda _: lambda self: setattr(self, "ended", True)),
        (
            b"0\r\n\r\n",
            b"5\r\n",
            b";chunk-signature=",
            b"x-amz-checksum-crc32:AAAAAA==\r\n",
            b"x-amz-trailer-signature:",
            b"\n\r\n",
        ),
    ),
    Target(
        "aws_signed_chunks",
        aws_signed_chunks,
        (b"\x00\x05\x00\x00\x00hello\nworld", b"\x01\x05\x00\x20\x01a\nb\nc"),
        Plant(aws_chunked, "same", lambda _: lambda computed, given: computed[:60] == given[:60]),
        (b"\n",),
        steps=40_000,
    ),
    Target(
        "form",
        form,
        (
            b"\x05" + _KEY_FIELD + _FILE_FIELD + b"abc\r\n--b--\r\n",
            b"\x02" + _KEY_FIELD.replace(b'"key"', b"a\r\nContent-Type: text/plain") + _FILE_FIELD + b"a\r\nb\r\n--b--",
            b"\x04"
            + _FILE_FIELD.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n")
            + b"YWJj\r\n--b--",
        ),
        Plant(form_data, "_IDENTITY", lambda known: known | {b"base64"}),
        (
            b"--b",
            b"\r\n--b\r\n",
            b"--b--",
            b"Content-Disposition: form-data",
            b'; name="file"',
            b'; name="key"',
            b"Content-Transfer-Encoding: base64\r\n",
            b"\r\n\r\n",
        ),
    ),
    Target(
        "boundary",
        boundary,
        (b"multipart/form-data; boundary=b", b'multipart/form-data; charset=utf-8; boundary="a b"'),
        Plant(form_data, "_BOUNDARY", lambda _: re.compile(rb"[^\r\n]{1,90}")),
        (b"multipart/form-data", b"; boundary=", b'"', b"\\"),
    ),
    Target(
        "target",
        target,
        (
            b"\x01\n/bucket//key?uploads",
            b"\x00photos.s3.example.eu:9000\n/a%2Fb/c+d?list-type=2&prefix=%C3%A9",
            b"\x03\n/b/k?versionId=1&" + b"&".join(_SECRETS),
        ),
        Plant(sigv4, "canonical_uri", lambda made: lambda raw: made(raw).replace("//", "/")),
        (
            *_SECRETS,
            *(b"?%b" % name.encode() for name in sorted(routes.SUBRESOURCES)),
            b"&uploadId=1",
            b"&partNumber=1",
            b"x-id=GetObject",
            b"%2F",
        ),
    ),
)
