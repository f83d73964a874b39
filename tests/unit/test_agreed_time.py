"""The time on which a majority of the storage nodes agrees."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from storaged.cluster.agreed_time import SAMPLES_S, AgreedTime, reached
from tests.doubles.clock import ManualClock

DAY_MS = 86_400_000.0


@pytest.mark.parametrize(
    ("ahead", "found"),
    [
        ([0.0], 0),
        ([], None),
        ([None], None),
        ([0.0, 1.0, 2.0], 0),
        ([-5.0, -6.0, -7.0], -6),
        ([-DAY_MS, 0.0, 0.0], 0),
        ([-DAY_MS, -DAY_MS, 0.0], -86_400_000),
        ([DAY_MS, DAY_MS, DAY_MS], 0),  # the own clock is late: that is late
        ([0.0, None, None], None),
        ([-3.0, 0.0, None], -3),
        ([0.0, 0.0], 0),
        ([0.0, None], None),
    ],
)
def test_what_a_majority_has_reached(ahead: Sequence[float | None], found: int | None) -> None:
    own = 1_760_000_000_000
    assert reached(own, ahead) == (None if found is None else own + found)


class Jumping(ManualClock):
    jumped_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.jumped_ms


def test_a_jump_is_not_believed_until_comparisons_are_new() -> None:
    clock = Jumping()
    ahead = [0.0, 0.0, 0.0]
    time = AgreedTime(clock, lambda: ahead)
    assert time.now_ms() is None, "a process that has just started knows nothing"
    clock.advance(SAMPLES_S)
    before = time.now_ms()
    assert before == clock.wall_ms()
    clock.jumped_ms = 30 * 86_400_000  # old comparisons still say that all clocks agree
    assert time.now_ms() is None
    clock.advance(SAMPLES_S - 1)
    assert time.now_ms() is None
    ahead[:] = [-30 * DAY_MS] * 3
    clock.advance(1)
    assert time.now_ms() == before + SAMPLES_S * 1000
