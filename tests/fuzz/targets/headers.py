"""Headers and parameters of S3 requests, each of which a parser of its own reads; and their signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from urllib.parse import quote, unquote_to_bytes

from msgspec import structs

from storaged.errors import S3Error
from storaged.objects.api import NewMeta, RangeSpec, WriteConditions
from storaged.objects.etags import NO_TAG
from storaged.objects.records import Lock
from storaged.s3 import conditions as c
from storaged.s3 import encryption, locks, xml
from storaged.s3 import headers as h
from storaged.s3.auth import acl, authenticate, form_policy, policy, sigv4
from storaged.s3.http.grammar import parse_head
from storaged.s3.http.limits import Limits
from storaged.s3.operation import adopt_query_headers
from storaged.s3.ops import buckets, multipart
from storaged.s3.request import Request, parse_target
from storaged.s3.routes import BUCKET, OBJECT
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, refused
from tests.property.test_condition_properties import oracle as second_tags

LIMITS = Limits()
NOW_MS = 1_369_353_600_000
FOUR_DIGITS_MS = -30_610_224_000_000
"""The year 1000 begins. In an HTTP date, an earlier year is one of two digits."""

OPERATIONS = sorted(
    {
        operation.name: operation
        for table in (BUCKET, OBJECT)
        for methods in table.values()
        for operation in methods.values()
    }.items()
)


def dates(data: bytes) -> None:
    """A text is refused, or gives a date. Printed in any form that answers use, it is read as the same second again."""
    text = data.decode("utf-8", "surrogateescape")
    for parse in (c.parse_http_time, c.parse_time):
        found = parse(text)
        if found is None:
            continue
        assert c.parse_time(xml.iso_time(found)) == found
        if found >= FOUR_DIGITS_MS:
            assert c.parse_http_time(h.http_time(found // 1000)) == found // 1000 * 1000
    stamp = refused(lambda: sigv4._timestamp_from_headers({"date": text}))
    if isinstance(stamp, str):
        refused(lambda: sigv4.timestamp_ms(stamp))
        in_head = c.parse_http_time(text)
        if in_head is not None and not sigv4._TIMESTAMP.fullmatch(text):
            assert sigv4.timestamp_ms(stamp) == in_head, "the signature's date is another one than the header's"


def ranges(data: bytes) -> None:
    """Our parser reads a range as RFC 9110 says, or finds none. A number beyond every object is as good as any other
    such. A copy's range has two ends. Integers are digits."""
    text = data.decode("utf-8", "surrogateescape")
    found = h.parse_range(text)
    match = re.fullmatch(r"bytes=(?:([0-9]+)-([0-9]*)|-([0-9]+))", text.strip())
    expected = None
    if match is not None:
        ends = [
            text and min(int(text[-4000:]) + 10**18 * text[:-4000].strip("0").isdigit(), 10**18)
            for text in (match[1] or "", match[2] or match[3] or "")
        ]
        first, last = (end if end != "" else None for end in ends)
        if first is None or last is None or first <= last:
            expected = RangeSpec(first, last)
    assert found == expected
    copied = refused(lambda: h.parse_copy_range(text))
    if isinstance(copied, RangeSpec):
        assert copied == found
        assert copied.first is not None
        assert copied.last is not None
    number = refused(lambda: h.integer("n", text, -5, 10**6))
    if isinstance(number, int):
        assert re.fullmatch(r"-?[0-9]+", text)
        assert -5 <= number <= 10**6


def stored_headers(data: bytes) -> None:
    """The headers that describe an object are stored as they were sent, or refused. Each parser of headers returns a
    value or an error of AWS's, whatever other headers there are. Tags are as many as allowed; a lock prints as it was
    asked; a second parser reads the same conditions, and none gets lost."""
    found = refused(lambda: parse_head(b"PUT / HTTP/1.1\r\nHost: h\r\n" + data.partition(b"\r\n\r\n")[0], LIMITS))
    if isinstance(found, S3Error):
        return
    headers = found.headers
    meta = refused(lambda: h.new_meta(headers))
    if isinstance(meta, NewMeta):
        json.dumps([meta.headers, meta.user, meta.tags]).encode()
        for value in (*meta.headers.values(), *meta.user.values()):
            value.encode()
            assert "\r" not in value
            assert "\n" not in value
        assert len(meta.tags) <= 10
        assert all(meta.user[name] == headers[f"x-amz-meta-{name}"] for name in meta.user)
    refused(lambda: h.body_checks(headers, None, (), None))
    trailing = refused(lambda: h.trailing_names(headers))
    if isinstance(trailing, tuple):
        refused(lambda: h.body_checks(headers, 5, trailing, {}))
    refused(lambda: encryption.check(headers))
    refused(lambda: list(acl.grants_in(headers)))
    refused(lambda: h.check_acl(headers))
    refused(lambda: h.checksum_type(headers))
    refused(lambda: multipart._checksum_kind(headers))
    refused(lambda: buckets._countries(headers.get("x-storaged-countries")))
    _lock(headers)
    _conditions(headers)
    for _name, operation in OPERATIONS:
        refused(lambda operation=operation: operation.check_headers(headers))  # type: ignore[misc]


def _lock(headers: dict[str, str]) -> None:
    lock = refused(lambda: locks.asked_lock(headers))
    if isinstance(lock, Lock):
        printed: dict[str, str] = {}
        locks.lock_headers(lock, printed)
        assert locks.asked_lock(printed) == lock, "the lock prints as another one"
    assert isinstance(locks.bypasses(headers), bool)


def _conditions(headers: dict[str, str]) -> None:
    for name in ("if-match", "if-none-match"):
        if name in headers:
            assert c.parse_tags(headers[name]) == second_tags(headers[name])
    now_ms = 1_000_000_000_000
    for dated in (c.read_conditions(headers, now_ms), refused(lambda: c.copy_conditions(headers, now_ms))):
        if not isinstance(dated, S3Error):
            assert dated.if_modified_since_ms is None or dated.if_modified_since_ms <= now_ms
    for parse in (c.write_conditions, _of_deletion, c.source_conditions):
        found = refused(lambda parse=parse: parse(headers))  # type: ignore[misc]
        if not isinstance(found, S3Error) and parse is not c.source_conditions:
            assert (found.if_match is None) == ("if-match" not in headers), "a condition got lost"
    written = refused(lambda: c.write_conditions(headers))
    if not isinstance(written, S3Error):
        assert written.if_none_match != NO_TAG
    if "if-match" in headers:
        assert isinstance(refused(lambda: c.delete_conditions(headers, "null")), S3Error)


def _of_deletion(headers: dict[str, str]) -> WriteConditions:
    return c.delete_conditions(headers, "")


def second_canonical(
    method: str, path: bytes, query: bytes, signed: list[str], headers: dict[str, str], payload: str
) -> bytes:
    """The canonical request, written from AWS's description alone."""
    pairs = []
    for item in query.split(b"&"):
        if item:
            name, _, value = item.partition(b"=")
            pairs.append(
                tuple(quote(unquote_to_bytes(part.replace(b"+", b" ")), safe="-_.~") for part in (name, value))
            )
    listed = "&".join(f"{name}={value}" for name, value in sorted(pairs) if name != "X-Amz-Signature")
    lines = "".join(f"{name}:{re.sub(' +', ' ', headers.get(name, '').strip(' ' + chr(9)))}\n" for name in signed)
    text = f"{method}\n{quote(unquote_to_bytes(path), safe='/-_.~')}\n{listed}\n{lines}\n{';'.join(signed)}\n{payload}"
    return text.encode("utf-8", "surrogateescape")


def second_signature(secret: str, scope: str, stamp: str, canonical: bytes) -> str:
    key = b"AWS4" + secret.encode()
    for step in scope.split("/"):
        key = hmac.new(key, step.encode("utf-8", "surrogateescape"), "sha256").digest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical).hexdigest()}"
    return hmac.new(key, text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()


STAMP, SCOPE, SECRET = "20130524T000000Z", "20130524/r/s3/aws4_request", "secret/+"


def signature(data: bytes) -> None:
    """A request that a second implementation has signed verifies, wherever its signature is. It does not verify when
    one signed bit has changed, unless the canonical form is the same; nor with another signature."""
    choices = Choices(data)
    method, presigned, where, at, bit = (
        choices.pick(("GET", "PUT", "DELETE")),
        choices.flag(),
        choices.number(5),
        choices.byte(),
        choices.number(8),
    )
    line = choices.line()
    head = refused(lambda: parse_head(method.encode() + b" /b HTTP/1.1\r\nHost: h\r\n" + choices.rest(), LIMITS))
    target = refused(lambda: parse_target(b"/" + line))
    if isinstance(head, S3Error) or isinstance(target, S3Error):
        return
    headers = head.headers
    signed = sorted({"host", *headers} - {"authorization"})
    payload = "UNSIGNED-PAYLOAD"
    query = line.partition(b"?")[2]
    canonical = second_canonical(method, target.raw_path, query, signed, headers, payload)
    right = second_signature(SECRET, SCOPE, STAMP, canonical)
    claim = sigv4.Claim("AK", "20130524", "r", "s3", SCOPE, tuple(signed), right, STAMP, 60 if presigned else None)

    def verdict(claim: sigv4.Claim, method: str, raw: bytes, headers: dict[str, str]) -> bool:
        wanted = refused(lambda: parse_target(raw))
        if isinstance(wanted, S3Error):
            return False
        found = refused(lambda: sigv4.verify(claim, SECRET, method, wanted.raw_path, wanted.pairs, headers, payload))
        return not isinstance(found, S3Error)

    raw = b"/" + line
    assert verdict(claim, method, raw, headers), "what is signed right does not verify"
    wrong = right[: at % 64] + ("0" if right[at % 64] != "0" else "1") + right[at % 64 + 1 :]
    for text in (wrong, right.upper() if right.upper() != right else wrong, right + " ", "", "\u0663" * 64, right[:-1]):
        assert not verdict(structs.replace(claim, signature=text), method, raw, headers), "another signature verifies"
    changed_method, changed_raw, changed_headers = method, raw, dict(headers)
    if where == 0:
        changed_method = "POST"
    elif where <= 2:
        place = at % len(raw)
        changed_raw = raw[:place] + bytes((raw[place] ^ 1 << bit,)) + raw[place + 1 :]
    else:
        name = signed[at % len(signed)]
        value = changed_headers[name]
        changed_headers[name] = (
            value[:-1] + chr(ord(value[-1]) ^ 1 << bit) if value and ord(value[-1]) < 128 else value + "x"
        )
    if changed_raw.startswith(b"/"):
        path, _, query = changed_raw.partition(b"?")
        same = second_canonical(changed_method, path, query, signed, changed_headers, payload) == canonical
        assert verdict(claim, changed_method, changed_raw, changed_headers) == same, "a changed request verifies"


def authorization(data: bytes) -> None:
    """The signature fields of a request give a claim, or the error of AWS. A claim is for this service, its Host is
    signed, and its text is bounded by the request's. No claim verifies without the secret. Parameters of the query that
    act as headers contradict none of them."""
    choices = Choices(data)
    line = choices.line()
    head = refused(lambda: parse_head(b"GET / HTTP/1.1\r\nHost: h\r\n" + choices.rest(), LIMITS))
    target = refused(lambda: parse_target(b"/b/k?" + line))
    if isinstance(head, S3Error) or isinstance(target, S3Error):
        return
    request = Request("1", "GET", b"/b/k?" + line, "", False, dict(head.headers), target=target)
    before = dict(request.headers)
    if not isinstance(refused(lambda: adopt_query_headers(request)), S3Error):
        assert all(request.headers[name] == value for name, value in before.items())
    request.headers = dict(before)
    for services in (("s3",), ("iam", "sts")):
        claim = refused(lambda services=services: authenticate.claim_of(request, "", services))  # type: ignore[misc]
        again = refused(lambda services=services: authenticate.claim_of(request, "", services))  # type: ignore[misc]
        if claim is None or isinstance(claim, S3Error):
            assert type(claim) is type(again)
            continue
        assert claim == again
        assert claim.service in services
        assert "host" in claim.signed_headers
        refused(lambda claim=claim: sigv4.check_time(claim, NOW_MS))  # type: ignore[misc]
        refused(lambda claim=claim: sigv4.check_signed_headers(claim, before))  # type: ignore[misc]
        payload = refused(lambda claim=claim: sigv4.payload_hash(claim, before, target.query))  # type: ignore[misc]
        if isinstance(payload, str):
            verified = refused(  # type: ignore[misc]
                lambda claim=claim, payload=payload: sigv4.verify(
                    claim, SECRET, "GET", target.raw_path, target.pairs, before, payload
                )
            )
            assert isinstance(verified, S3Error), "a signature verifies that nobody made with the secret"


def nesting(data: bytes) -> None:
    """JSON of any depth is read, or refused with the error of AWS. What is read is never too deep for the code that
    uses it.
    """
    choices = Choices(data)
    depth, kind = choices.number(4096), choices.number(4)
    inner = b"[" * depth + b"]" * depth if kind & 1 else b'{"a":' * depth + b"1" + b"}" * depth
    document = (
        b'{"Version":"2012-10-17","Id":%b,"Statement":%b}' % (inner, inner) if kind & 2 else b'{"Version":%b}' % inner
    )
    refused(lambda: policy.parse(document))
    for grammar in (policy.IDENTITY, policy.TRUST):
        text = document.decode()
        refused(lambda g=grammar, t=text: policy.check_document(t, g, 6144, "x"))  # type: ignore[misc]
    posted = b'{"expiration":"2030-01-01T00:00:00Z","conditions":[%b]}' % inner
    refused(lambda: form_policy.parse_policy(base64.b64encode(posted).decode()))
    refused(lambda: encryption._check_context(base64.b64encode(inner).decode()))


_NAMES = (
    "content-type: a/b",
    "content-encoding: aws-chunked, gzip",
    "cache-control: x",
    "expires: 0",
    "x-amz-meta-a: b",
    "x-amz-tagging: a=b&c=d",
    "x-amz-storage-class: STANDARD_IA",
    "content-md5: 1B2M2Y8AsgTpgAmY7PhCfg==",
    "x-amz-checksum-crc32: AAAAAA==",
    "x-amz-checksum-algorithm: SHA256",
    "x-amz-checksum-type: COMPOSITE",
    "x-amz-sdk-checksum-algorithm: CRC32",
    "x-amz-trailer: x-amz-checksum-crc32",
    "x-amz-acl: public-read",
    'x-amz-grant-read: id="a", uri="http://acs.amazonaws.com/groups/global/AllUsers"',
    "x-amz-server-side-encryption: aws:kms",
    "x-amz-server-side-encryption-context: e30=",
    "x-amz-server-side-encryption-customer-algorithm: AES256",
    "x-amz-server-side-encryption-customer-key: AAAA",
    "x-amz-server-side-encryption-bucket-key-enabled: true",
    "x-amz-website-redirect-location: /a",
    "x-amz-object-lock-mode: GOVERNANCE",
    "x-amz-object-lock-retain-until-date: 2030-01-01T00:00:00Z",
    "x-amz-object-lock-legal-hold: ON",
    "x-amz-bypass-governance-retention: true",
    'if-match: "a"',
    "if-none-match: *",
    "if-modified-since: Wed, 12 Oct 2009 17:50:00 GMT",
    "x-amz-if-match-size: 5",
    "x-amz-if-match-last-modified-time: 2030-01-01",
    'x-amz-copy-source-if-match: "a"',
    "x-storaged-countries: FR,DE",
    "x-amz-request-payer: requester",
    "content-range: bytes 0-1/2",
    "x-amz-mfa: 1 2",
    "x-amz-expected-bucket-owner: 1",
)
_HEADERS = tuple(f"{name}\r\n".encode() for name in _NAMES)
_CLAIM = (
    b"Authorization: AWS4-HMAC-SHA256 Credential=AK/20130524/r/s3/aws4_request, SignedHeaders=host;x-amz-date,"
    b" Signature=" + b"0" * 64 + b"\r\nx-amz-date: 20130524T000000Z\r\nx-amz-content-sha256: UNSIGNED-PAYLOAD"
)
_QUERY = (
    b"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F20130524%2Fr%2Fs3%2Faws4_request&X-Amz-Date="
    b"20130524T000000Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=" + b"0" * 64
)
_DATES = (
    b"Wed, 12 Oct 2009 17:50:00 GMT",
    b"2030-01-01T00:00:00.123Z",
    b"20130524T000000Z",
    b"9999-12-31T23:59:59-00:01",
    b"Fri, 31 Dec 9999 23:59:59 -0001",
    b"0001-01-01T00:00:00+00:01",
    b"1 Jan 2020 00:00:00 -0000",
)

TARGETS = (
    Target(
        "date",
        dates,
        _DATES,
        Plant(xml, "iso_time", lambda made: lambda ms: made(ms // 1000 * 1000)),
        (b"Jan", b"Feb", b"+2359", b"-0000", b"GMT", b"EST", b"T", b"Z", b"W53", b"24:00", b":60"),
        size_max=128,
    ),
    Target(
        "range",
        ranges,
        (b"bytes=0-5", b"bytes=-5", b"bytes=5-", b"bytes=\xd9\xa3-5", b" bytes=1-1", b"12", b"-3"),
        Plant(h, "_RANGE", lambda _: re.compile(r"bytes=(\d*)-(\d*)")),
        (b"bytes=", b"-", b",", b"\xd9\xa3", b"000"),
        size_max=128,
    ),
    Target(
        "headers",
        stored_headers,
        (
            b"x-amz-meta-a: \xff\xfe",
            b"".join(_HEADERS[:8]) + b"a:b",
            b"".join(_HEADERS[20:26]) + b"a:b",
            b"".join(_HEADERS[15:20]) + b"a:b",
            b"a:b\r\n".join(_HEADERS) + b"a:b",
        ),
        Plant(h, "readable", lambda _: lambda name, value: value),
        _HEADERS,
        steps=25_000,
        steps_a_byte=400,
        peak_bytes=1 << 20,
    ),
    Target(
        "signature",
        signature,
        (
            b"\x01\x00\x01\x05\x02b/k%20x?a=b&c=+d\nx-amz-meta-a:  b  c \r\nx-amz-date: 1",
            b"\x00\x01\x03\x00\x00b//k\xc3\xa9\nA: \xff",
        ),
        Plant(sigv4, "same", lambda _: lambda computed, given: computed.startswith(given[:63])),
        (b"%2F", b"%20", b"+", b"&", b"=", b"X-Amz-Signature=1", b"//", b"/../", b"\r\nx-amz-meta-b: c  d"),
        size_max=1024,
        steps=6000,
        steps_a_byte=80,
    ),
    Target(
        "authorization",
        authorization,
        (b"\n" + _CLAIM, _QUERY + b"\na: b", b"X-Amz-Security-Token=a&x-amz-acl=private\n" + _CLAIM),
        Plant(authenticate.sigv4, "check_scope", lambda _: lambda *_: None),
        (
            _CLAIM,
            _QUERY,
            b"Credential=",
            b"SignedHeaders=host",
            b"Signature=",
            b"aws4_request",
            b"/iam/",
            b"/sts/",
            b"X-Amz-Expires=604800",
            b"99991231T235959Z",
            b"AWS AK:sig",
            b"AWSAccessKeyId=AK",
        ),
        steps=6000,
        steps_a_byte=80,
    ),
    Target(
        "nesting",
        nesting,
        (b"\x00\x05\x00", b"\x03\xdc\x01", b"\x03\xe0\x03"),
        Plant(form_policy, "_object", lambda _: lambda pairs: pairs[0][1][0]),
        (),
        size_max=3,
        steps=20_000,
        peak_bytes=16 << 20,
    ),
)
