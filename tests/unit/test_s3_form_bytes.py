"""Browser forms read from bytes: every form has one meaning, and what its policy says holds all together."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator

import pytest

from storaged import errors
from storaged.s3.auth.form_policy import check_policy, parse_policy
from storaged.s3.http.form_data import FormReader, boundary_of

LATER = "2099-01-01T00:00:00Z"

NOW_MS = 1_700_000_000_000


async def read(body: bytes, boundary: str = "b", step: int = 1 << 20) -> tuple[dict[str, str], str, bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    form = FormReader(pieces(), boundary)
    await form.read_fields()
    return form.fields, form.filename, b"".join([bytes(piece) async for piece in form.file()])


def part(disposition: str | bytes, value: bytes = b"v", more: bytes = b"") -> bytes:
    text = disposition.encode() if isinstance(disposition, str) else disposition
    return b"--b\r\nContent-Disposition: " + text + b"\r\n" + more + b"\r\n" + value + b"\r\n"


FILE = part('form-data; name="file"; filename="f"', b"data") + b"--b--\r\n"


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
async def test_a_form_is_its_fields_and_its_file(step: int) -> None:
    body = (
        part('form-data; name="Key"')
        + part("FORM-DATA;NAME=acl ")
        + part('form-data; filename="C:\\a\\b\\"c.txt"; name="file"', b"da\r\n--ta")
        + b"--b--"
    )
    assert await read(body, step=step) == ({"key": "v", "acl": "v"}, 'b"c.txt', b"da\r\n--ta")


@pytest.mark.parametrize(
    "body",
    [
        part('form-data; name="a"') + part('form-data; name="A"') + FILE,
        part('form-data; name="a"; name="b"') + FILE,
        part('form-data; filename="x; name="b""') + FILE,
        part('form-data; filename="; name="key""; x="y') + FILE,
        part('attachment; name="a"') + FILE,
        part("form-data") + FILE,
        part('form-data; name="a" x') + FILE,
        part('form-data; name="a') + FILE,
        part(b'form-data; name="a\x00"') + FILE,
        part('form-data; name="a"', more=b'Content-Disposition: form-data; name="b"\r\n') + FILE,
        part('form-data; name="a"', more=b"Content-Transfer-Encoding: base64\r\n") + FILE,
        part('form-data; name="a"', more=b"no colon\r\n") + FILE,
        part('form-data; name="a"', more=b"X: a\r\n b\r\n") + FILE,
        part('form-data; name="a"', more=b"X : a\r\n") + FILE,
        b"--b \r\n" + part('form-data; name="a"')[5:] + FILE,
        b"--bx\r\n" + part('form-data; name="a"')[5:] + FILE,
        FILE.replace(b"--b--\r\n", b"--bx"),
        FILE.replace(b"--b--\r\n", b"--b"),
        FILE.replace(b"--b--\r\n", b"--b-"),
        FILE.replace(b"--b--\r\n", b"--b--x"),
        FILE.replace(b"data", b"--b"),
        part('form-data; name="a"', b"--bx") + FILE,
        FILE.replace(b"--b--\r\n", b""),
        b"--b--\r\n",
        FILE.replace(b"\r\n", b"\n"),
    ],
)
async def test_a_form_that_parsers_may_read_otherwise_is_malformed(body: bytes) -> None:
    with pytest.raises(errors.MalformedPOSTRequest):
        await read(body)


async def test_what_follows_the_file_is_ignored() -> None:
    assert (await read(FILE[:-4] + b"\r\n" + part('form-data; name="key"')[3:] + b"--b--"))[2] == b"data"


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", "abc"),
        ('Multipart/Form-Data;BOUNDARY="a b(c)"', "a b(c)"),
        ("multipart/form-data; charset=utf-8 ; boundary=----WebKit'()+_./:=?", "----WebKit'()+_./:=?"),
    ],
)
def test_the_boundary_is_what_the_content_type_says(content_type: str, boundary: str) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=a; boundary=b",
        'multipart/form-data; x="; boundary=a"',
        "multipart/form-data boundary=a",
        "multipart/form-datax; boundary=a",
        "multipart/form-data; boundary=" + "a" * 71,
        "multipart/form-data; boundary=a\u00e9",
        'multipart/form-data; boundary="a "',
        'multipart/form-data; boundary="a\\"b"',
        "multipart/form-data; boundary=a, multipart/form-data; boundary=b",
    ],
)
def test_a_content_type_without_one_boundary_is_malformed(content_type: str) -> None:
    with pytest.raises(errors.MalformedPOSTRequest):
        boundary_of(content_type)


# --- policies


def encoded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def with_conditions(*conditions: object) -> str:
    return encoded(json.dumps({"expiration": LATER, "conditions": [{"bucket": "bucket"}, *conditions]}))


def test_of_several_length_ranges_all_hold() -> None:
    found = parse_policy(
        with_conditions(
            ["content-length-range", 0, 10], ["content-length-range", 5, 1000], ["content-length-range", 2, 20]
        )
    )
    assert (found.size_min, found.size_max) == (5, 10)


def test_length_ranges_that_exclude_each_other_allow_nothing() -> None:
    with pytest.raises(errors.InvalidPolicyDocument):
        parse_policy(with_conditions(["content-length-range", 0, 4], ["content-length-range", 5, 10]))


@pytest.mark.parametrize("low", ["\u0661", "1_0", " 1", "+1", "-1", "1.0", 1.0, True, None, "9" * 30, ""])
def test_a_bound_of_a_length_range_is_a_plain_number(low: object) -> None:
    with pytest.raises(errors.InvalidPolicyDocument):
        parse_policy(with_conditions(["content-length-range", low, 10**18]))


@pytest.mark.parametrize(
    "document",
    [
        '{"expiration": "2099-01-01T00:00:00Z", "conditions": [], "conditions": [{"bucket": "bucket"}]}',
        '{"expiration": "2099-01-01T00:00:00Z", "expiration": "2099-01-01T00:00:00Z", "conditions": []}',
        '{"expiration": "2099-01-01T00:00:00Z", "conditions": [{"bucket": "a", "bucket": "bucket"}]}',
        '{"expiration": "\u0662\u0660\u0669\u0669-01-01T00:00:00Z", "conditions": []}',
        '{"expiration": "2099-01-01T00:00:00Z", "conditions": []}'.encode("utf-16"),
        b'{"expiration": "\xff", "conditions": []}',
    ],
)
def test_a_policy_that_can_be_read_in_two_ways_is_invalid(document: str | bytes) -> None:
    with pytest.raises(errors.InvalidPolicyDocument):
        parse_policy(encoded(document))


def test_letters_beyond_ascii_are_not_taken_for_others() -> None:
    found = parse_policy(with_conditions({"\u212aey": "a"}))
    with pytest.raises(errors.AccessDenied):
        check_policy(found, {"key": "a"}, "bucket", NOW_MS)


# --- fields that act as headers


def test_a_condition_that_a_policy_repeats_is_checked_once() -> None:
    """A long Content-Type that is split for each of them would keep other requests waiting."""
    repeated = [["starts-with", "$Content-Type", "a" * (number % 3)] for number in range(700)]
    found = parse_policy(with_conditions(*repeated))
    assert len(found.conditions) == 4
    check_policy(found, {"content-type": "aa,aab"}, "bucket", NOW_MS)
    with pytest.raises(errors.AccessDenied):
        check_policy(found, {"content-type": "aa,ab"}, "bucket", NOW_MS)
