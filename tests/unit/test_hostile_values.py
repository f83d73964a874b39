"""Values that strangers send, and that once had the wrong answer. Each was found by fuzzing (``tests.fuzz``)."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from storaged import errors
from storaged.errors import MalformedPolicy, MalformedXML, S3Error
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
            f"<LifecycleConfiguration><Rule><Status>Enabled</Status><Prefix/><Expiration><Date>{text}</Date></Expiration>"
            "</Rule></LifecycleConfiguration>".encode()
        )


def test_a_date_that_an_earlier_release_took_can_be_shown() -> None:
    assert xml.iso_time(253_402_387_139_000) == "9999-12-31T23:59:59.999Z"


def test_a_date_that_is_printed_and_read_again_is_the_same_to_the_millisecond() -> None:
    """Who reads a retention and writes it back must not shorten it."""
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
