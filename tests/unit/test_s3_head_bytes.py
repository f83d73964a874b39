"""Heads are understood from bytes: no rule of Unicode makes one word of another, and a target in absolute form is what
it names.
"""

from __future__ import annotations

import time

import pytest

from storaged import errors
from storaged.s3.auth import sigv4
from storaged.s3.http.grammar import parse_head
from storaged.s3.http.hosts import check_host
from storaged.s3.http.limits import Limits
from storaged.s3.request import parse_target

LIMITS = Limits()


@pytest.mark.parametrize(
    "letter", [chr(code) for code in range(0x80, 0x3000) if chr(code).lower().isascii() or chr(code).isspace()]
)
def test_no_letter_is_taken_for_one_of_ascii(letter: str) -> None:
    for value in (f"chun{letter}ed", f"{letter}chunked", f"chunked{letter}"):
        with pytest.raises(errors.BadRequest):
            parse_head(f"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: {value}".encode(), LIMITS)


@pytest.mark.parametrize(
    "host",
    [
        "h",
        "h:80",
        "h:",
        "",
        "127.0.0.1:9000",
        "[::1]",
        "[::1]:80",
        "a-b.c_d.example",
        "bucket.s3.example.eu",
        "h%41",
        "[v1.a:b]",
    ],
)
def test_a_host_is_a_name_or_an_address_and_perhaps_a_port(host: str) -> None:
    assert parse_head(b"GET / HTTP/1.1\r\nHost: %s" % host.encode(), LIMITS).headers["host"] == host


@pytest.mark.parametrize(
    "host",
    [
        "a b",
        "a,b",
        "a/b",
        "u@h",
        "h:80x",
        "h:-1",
        "::1",
        "[::1",
        "[::1]x",
        "h:\u0661",
        "h%4",
        "h?x",
        "h#",
        "[a]",
        "h\\",
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(errors.BadRequest):
        parse_head(b"GET / HTTP/1.1\r\nHost: %s" % host.encode(), LIMITS)


# --- RFC 9112 3.2.2


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        ("http://h/b/k?x=1", "h", b"/b/k?x=1"),
        ("HTTPS://h/b/k", "h", b"/b/k"),
        ("http://H:80/", "h", b"/"),
        ("https://h/", "h:443", b"/"),
        ("http://h:/a", "h", b"/a"),
        ("http://h:9000//a", "h:9000", b"//a"),
        ("http://[::1]:9000/a", "[::1]:9000", b"/a"),
        ("http://h", "h", b"/"),
        ("http://h?x=1", "h", b"/?x=1"),
    ],
)
def test_a_target_in_absolute_form_means_its_path(target: str, host: str, path: bytes) -> None:
    head = parse_head(f"GET {target} HTTP/1.1\r\nHost: {host}".encode(), LIMITS)
    assert head.target == path
    assert head.headers["host"] == host


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("http://other/b/k", "h"),
        ("http://h:81/", "h"),
        ("http://h/", "h:443"),
        ("https://h/", "h:80"),
        ("http://u@h/", "h"),
        ("http:///b/k", ""),
        ("http://h h/", "h"),
        ("ftp://h/k", "h"),
        ("http:/h/k", "h"),
        ("h:80", "h"),
        ("*", "h"),
    ],
)
def test_a_target_that_contradicts_its_host_or_is_of_another_form_is_refused(target: str, host: str) -> None:
    with pytest.raises(errors.S3Error):
        parse_target(parse_head(f"GET {target} HTTP/1.1\r\nHost: {host}".encode(), LIMITS).target)


def test_in_http_1_0_an_absolute_target_names_the_host() -> None:
    assert parse_head(b"GET http://h:80/a HTTP/1.0", LIMITS).headers["host"] == "h:80"


# --- all that is understood is ASCII

UNDERSTOOD = (
    "authorization", "content-encoding", "content-language", "content-md5", "date", "if-match", "if-none-match", "if-modified-since", "if-range", "origin", "range", "x-amz-acl",  # noqa: E501
    "x-amz-checksum-crc32", "x-amz-checksum-mode", "x-amz-content-sha256", "x-amz-date", "x-amz-decoded-content-length", "x-amz-max-parts",  # noqa: E501
    "x-amz-metadata-directive", "x-amz-mp-object-size", "x-amz-sdk-checksum-algorithm", "x-amz-storage-class", "x-amz-trailer",  # noqa: E501
    "x-amz-unheard-of", "x-storaged-countries",
)  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
@pytest.mark.parametrize("value", ["\u0661", "SHA\u0661", "\u017fHA1", "1\u00a0", "\u212a"])
def test_a_header_that_is_understood_is_ascii(name: str, value: str) -> None:
    with pytest.raises(errors.BadRequest):
        parse_head(f"GET / HTTP/1.1\r\nHost: h\r\n{name}: {value}".encode(), LIMITS)


@pytest.mark.parametrize(
    "name",
    [
        "x-amz-meta-a",
        "content-disposition",
        "content-type",
        "cache-control",
        "user-agent",
        "x-amz-copy-source",
        "x-amz-tagging",
        "x-other",
    ],
)
def test_a_header_that_is_kept_or_ignored_may_have_any_letters(name: str) -> None:
    assert (
        parse_head(f"GET / HTTP/1.1\r\nHost: h\r\n{name}: gr\u00fc\u00df".encode(), LIMITS).headers[name]
        == "gr\u00fc\u00df"
    )


@pytest.mark.parametrize("stamp", ["2013052\u0664T000000Z", "\u0662\u0660\u0661\u0663\u0660\u0665\u0662\u0664T000000Z"])
def test_a_date_has_digits_of_ascii(stamp: str) -> None:
    query = {
        "X-Amz-Algorithm": sigv4.ALGORITHM, "X-Amz-Credential": f"A/{stamp[:8]}/r/s3/aws4_request", "X-Amz-Date": stamp,
        "X-Amz-SignedHeaders": "host", "X-Amz-Signature": "0", "X-Amz-Expires": "10",
    }  # fmt: skip
    with pytest.raises(errors.AuthorizationQueryParametersError):
        sigv4.claim_from_query(query)


@pytest.mark.parametrize("expires", ["\u0661\u0660", "1_0", " 10", "+10", "10 ", "9" * 5000, "1e3", ""])
def test_how_long_a_url_holds_is_a_plain_number(expires: str) -> None:
    query = {
        "X-Amz-Algorithm": sigv4.ALGORITHM, "X-Amz-Credential": "A/20130524/r/s3/aws4_request", "X-Amz-Date": "20130524T000000Z",  # noqa: E501
        "X-Amz-SignedHeaders": "host", "X-Amz-Signature": "0", "X-Amz-Expires": expires,
    }  # fmt: skip
    with pytest.raises(errors.AuthorizationQueryParametersError):
        sigv4.claim_from_query(query)


def test_only_spaces_and_tabs_around_a_value_are_not_signed() -> None:
    plain, spaced = (
        sigv4.canonical_headers(["x-amz-meta-a"], {"x-amz-meta-a": value}) for value in ("v", "\u00a0v\u2003")
    )
    assert plain != spaced, "else who stands between could change what is stored"


@pytest.mark.parametrize(
    "host", ["[" + ":" * 16_000, "[" + "1:" * 8000 + "]x", "[v" + "1" * 16_000, "a" * 16_000 + "@"]
)
def test_a_hostile_host_is_refused_at_once(host: str) -> None:
    """An expression with two repetitions that match the same text takes a second for it, before any signature."""
    began_s = time.thread_time()
    with pytest.raises(errors.BadRequest):
        check_host(host)
    assert time.thread_time() - began_s < 0.2
