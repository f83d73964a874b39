"""Values that strangers send, and that once had the wrong answer. Each was found by fuzzing (``tests.fuzz``)."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
import xxhash

from storaged import errors
from storaged.errors import MalformedPolicy, MalformedXML, S3Error
from storaged.meta.messages import ReadsReply
from storaged.meta.names import RegisterName, Table
from storaged.meta.storage import rowvalue
from storaged.meta.store_ports import RowDamaged
from storaged.meta.transport.read_batching import ReadBatcher
from storaged.objects.code.geometry import problem_of
from storaged.objects.records import PartEntry, Run
from storaged.s3 import conditions, locks, xml
from storaged.s3.auth import policy, sigv4
from storaged.s3.ops import lifecycle, lock


@pytest.mark.parametrize("kind", ["list", "object"])
def test_a_policy_that_is_nested_too_deep_is_malformed_at_any_depth(kind: str) -> None:
    """At one depth the parser takes it, and the check that it can be encoded has no room left."""
    for depth in range(850, 1010):
        inner = b"[" * depth + b"]" * depth if kind == "list" else b'{"a":' * depth + b"1" + b"}" * depth
        with pytest.raises(MalformedPolicy):
            policy.parse(b'{"Version":' + inner + b"}")


LATE = ("9999-12-31T23:59:59-00:01", "Fri, 31 Dec 9999 23:59:59 -0001", "9999-12-31T12:00:00-12:00")


@pytest.mark.parametrize("text", [*LATE, "0001-01-01T00:00:00+00:01"])
def test_a_date_that_cannot_be_printed_is_none(text: str) -> None:
    assert conditions.parse_time(text) is None


@pytest.mark.parametrize("text", LATE)
def test_no_version_is_kept_until_a_date_that_no_read_could_show(text: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        locks.asked_lock({"x-amz-object-lock-mode": "COMPLIANCE", "x-amz-object-lock-retain-until-date": text})
    with pytest.raises(MalformedXML):
        lock._retention(
            f"<Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>{text}</RetainUntilDate></Retention>".encode()
        )
    with pytest.raises(S3Error):
        lifecycle.parse(
            f"<LifecycleConfiguration><Rule><Status>Enabled</Status><Prefix/><Expiration>"
            f"<Date>{text}</Date></Expiration>"
            "</Rule></LifecycleConfiguration>".encode()
        )


def test_a_date_that_an_earlier_release_took_can_be_shown() -> None:
    assert xml.iso_time(253_402_387_139_000) == "9999-12-31T23:59:59.999Z"


def test_a_date_that_is_printed_and_read_again_is_the_same_to_the_millisecond() -> None:
    """A client that reads a retention and writes it back must not shorten it."""
    base = int(datetime(2030, 1, 1, tzinfo=UTC).timestamp()) * 1000
    for ms in (*range(base, base + 1000), -62_135_596_800_000, 253_402_300_799_999):
        assert conditions.parse_time(xml.iso_time(ms)) == ms


def test_years_have_four_digits() -> None:
    assert xml.iso_time(-62_135_596_800_000) == "0001-01-01T00:00:00.000Z" == xml.iso_times([-62_135_596_800_000])[0]


def test_a_date_without_a_zone_is_signed_in_utc_wherever_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """-0000 says that the zone is not known; the standard library then reads the date in the server's own."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert sigv4._timestamp_from_headers({"date": "24 May 2013 00:00:00 -0000"}) == "20130524T000000Z"
    finally:
        monkeypatch.undo()
        time.tzset()


_RULE = "<Rule><DefaultRetention><Mode>GOVERNANCE</Mode><Days>{}</Days></DefaultRetention></Rule>"
_LOCK = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled>{}</ObjectLockConfiguration>"


@pytest.mark.parametrize("days", ["1_0", "\u0663", "+5", "5 5", "", "--5"])
def test_days_of_a_retention_are_digits(days: str) -> None:
    with pytest.raises(MalformedXML):
        lock._configuration(_LOCK.format(_RULE.format(days)).encode())


def test_a_lock_has_one_rule() -> None:
    with pytest.raises(MalformedXML):
        lock._configuration(_LOCK.format(_RULE.format(1) + _RULE.format(2)).encode())
    assert lock._configuration(_LOCK.format(_RULE.format(7)).encode()).days == 7


def _part(header: bytes) -> PartEntry:
    return PartEntry(1, b"d" * 16, 70_000, header, 8, "2+1", (Run(0, 1, 2, 1, 1),))


@pytest.mark.parametrize(
    "head",
    [b"SOV1\x02\x10\0\0", b"SOV1\x01\x10\x01\0", b"SOV1\x01\x10\0\x01", b"SOV1\x01\x11\0\0", b"SOV2\x01\x10\0\0"],
)
def test_a_part_whose_header_is_none_is_named_and_stops_no_walk(head: bytes) -> None:
    assert problem_of(_part(head + bytes(56))) == "its header is not one of SOV1"
    assert problem_of(_part(b"SOV1\x01\x10\0\0" + bytes(56))) == ""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x02" + b"\0" * 17,
        b"\x02" + b"\0" * 16 + b"\x01\0\xff\x95\x01\xc4\0\x02\xc4\0\xc4\0",
        b"\x02" + b"\0" * 18 + b"\x95\x01\xc4\0\xf0\xc4\0\xc4\0",  # a visibility of -16, and one of 256
        b"\x02" + b"\0" * 18 + b"\x95\x01\xc4\0\xcd\x01\0\xc4\0\xc4\0",
    ],
)
def test_a_row_that_is_none_under_a_right_check_is_damaged(body: bytes) -> None:
    name = RegisterName(Table.OBJECT, b"S" * 16, 3, b"key")
    row = b"\x01" + xxhash.xxh3_64_digest(body + name.key, rowvalue.seed_of(name.prefix)) + body
    assert rowvalue.intact(name.prefix, name.key, row)
    with pytest.raises(RowDamaged):
        rowvalue.unpack_row(name, row)


@pytest.mark.parametrize(
    ("found", "copies"), [([], []), ([[b"r"]], []), ([[], [b"r", b"r", b"r"]], [5]), ([[b"r"] * 9] * 9, [-7, 99])]
)
def test_each_read_hears_once_whatever_a_node_answers(found: list[list[bytes | None]], copies: list[int]) -> None:
    heard: list[str] = []
    ask = b"\x02" + RegisterName(Table.OBJECT, b"S" * 16, 3, b"key").pack()
    gathered = {
        disk: ([ask, ask], [lambda _found, _copy, name=f"{disk}{at}": heard.append(name) for at in range(2)])
        for disk in ("a", "b")
    }
    batcher = ReadBatcher(None, "n1")  # type: ignore[arg-type]
    batcher._on_reply(1, 1.0, gathered, ReadsReply(found, copies), memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert sorted(heard) == ["a0", "a1", "b0", "b1"]
