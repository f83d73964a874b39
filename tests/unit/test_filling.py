"""When disks that are nearly full will be full."""

from __future__ import annotations

from storaged.cluster.ports import DiskStatus
from storaged.node.filling import MEASURED_S, STEP_S, WINDOW_S, Filling
from storaged.units import GIB

SIZE = 100 * GIB


def disk(free: int, state: str = "ok") -> DiskStatus:
    return DiskStatus("d", "/d", state, SIZE - free, free)


def test_a_tenth_is_enough_and_less_is_not() -> None:
    filling = Filling()
    assert filling.warnings([disk(10 * GIB)], 0.0) == {}
    assert filling.warnings([disk(10 * GIB - 1)], 1.0) == {"d": "10.0 GiB are free for data, 9%"}


def test_the_forecast_comes_from_the_last_hour() -> None:
    filling = Filling()
    free = 9 * GIB
    for second in range(0, int(MEASURED_S), int(STEP_S)):
        assert "full in" not in filling.warnings([disk(free)], float(second))["d"]
        free -= GIB // 60
    said = filling.warnings([disk(free)], MEASURED_S)["d"]
    assert said.endswith("at the pace of the last hour it is full in 9 h")
    for second in range(int(MEASURED_S), int(MEASURED_S + WINDOW_S + 2 * STEP_S), int(STEP_S)):
        said = filling.warnings([disk(free)], float(second))["d"]
    assert said.endswith("it does not get fuller now")


def test_a_full_disk_and_one_that_is_away_are_no_warning() -> None:
    filling = Filling()
    assert filling.warnings([disk(0, "full")], 0.0) == {}
    assert filling.warnings([], 1.0) == {}


def test_a_disk_that_is_slow_for_a_while_fills_up_all_the_same() -> None:
    filling = Filling()
    filling.warnings([disk(9 * GIB)], 0.0)
    assert "9%" in filling.warnings([disk(9 * GIB, "slow")], MEASURED_S / 2)["d"]
    assert "it does not get fuller now" in filling.warnings([disk(9 * GIB)], MEASURED_S)["d"], "the pace is still known"


def test_an_empty_file_system_has_no_part() -> None:
    assert Filling().warnings([DiskStatus("d", "/d", "ok", 0, 0)], 0.0) == {}
