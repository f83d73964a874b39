"""Holds of downloads: how long they last at most, and how much data they keep."""

from __future__ import annotations

import pytest

from storaged.maintain import holds as module
from storaged.maintain.holds import LEASE_S, RENEW_S, Holds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return 0


def test_a_name_is_kept_while_it_is_renewed_and_not_longer() -> None:
    holds = Holds(clock := Clock(), hold_s=3600)
    assert not holds.keeps(b"data")
    for _ in range(10):
        holds.hold([b"data"])
        clock.now += LEASE_S - 1
        assert holds.keeps(b"other", b"data")
    clock.now += 2
    assert not holds.keeps(b"data")
    assert len(holds) == 0
    assert LEASE_S >= 3 * RENEW_S, "a message that is lost ends nothing"


def test_what_is_due_is_kept_for_a_time_however_long_it_is_read() -> None:
    holds = Holds(clock := Clock(), hold_s=100)
    for _ in range(100):  # it is not due yet: that costs nothing of the time
        holds.hold([b"data"])
        clock.now += RENEW_S
    kept = 0
    for _ in range(100):
        holds.hold([b"data"])
        kept += holds.keeps(b"data")
        clock.now += RENEW_S
    assert kept == 100 / RENEW_S
    assert not Holds(clock, hold_s=0).keeps(b"data")


def test_no_more_is_held_than_fits_and_what_nobody_renews_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_MAX", 3)
    holds = Holds(clock := Clock(), hold_s=100)
    holds.hold([b"a", b"b", b"c", b"d"])
    assert [key for key in (b"a", b"b", b"c", b"d") if holds.keeps(key)] == [b"a", b"b", b"c"]
    clock.now += LEASE_S - 1
    holds.hold([b"c", b"d"])
    assert not holds.keeps(b"d")
    clock.now += 2
    holds.hold([b"d"])
    assert [key for key in (b"a", b"b", b"c", b"d") if holds.keeps(key)] == [b"c", b"d"]
    assert len(holds) == 2
