"""Which disks are nearly full, and when they will be full at the pace of the last hour. Pure.

The pace is measured by this process, between the states of disks that it has heard. It is not known in the first
minutes, and not while a disk gets emptier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from storaged.cluster.ports import DiskStatus
from storaged.disk_states import NO, of
from storaged.units import format_duration, format_size

WARNING_PART = 10
"""A disk of which less than this part is free for clients' data is nearly full."""

WINDOW_S = 3600.0
STEP_S = 60.0
"""The free space of a disk is remembered this often."""

MEASURED_S = 300.0
"""The pace is believed when it was measured for this time."""


class Filling:
    """Remembers the free space of disks."""

    def __init__(self) -> None:
        self._free: dict[str, deque[tuple[float, int]]] = {}

    def warnings(self, disks: Iterable[DiskStatus], now_s: float) -> dict[str, str]:
        """Disk id -> what to tell of a disk that is nearly full, for all disks that can be written. ``now_s``: any
        clock that only goes on.
        """
        found = {}
        known = [disk for disk in disks if of(disk.state).rights.writes is not NO]
        self._free = {disk.id: self._free.get(disk.id, deque()) for disk in known}
        for disk in known:
            pace = self._note(self._free[disk.id], now_s, disk.bytes_free)
            size = disk.bytes_used + disk.bytes_free
            if disk.bytes_free * WARNING_PART < size:
                part = 100 * disk.bytes_free // size
                found[disk.id] = f"{format_size(disk.bytes_free)} are free for data, {part}%{_forecast(disk, pace)}"
        return found

    def _note(self, known: deque[tuple[float, int]], now_s: float, free: int) -> float | None:
        """Bytes a second that are taken; None while that is not known."""
        if not known or now_s - known[-1][0] >= STEP_S:
            known.append((now_s, free))
        while known[0][0] < now_s - WINDOW_S:
            known.popleft()
        since_s, before = known[0]
        return (before - free) / (now_s - since_s) if now_s - since_s >= MEASURED_S else None


def _forecast(disk: DiskStatus, pace: float | None) -> str:
    if pace is None:
        return ""
    if pace <= 0:
        return "; it does not get fuller now"
    return f"; at the pace of the last hour it is full in {format_duration(disk.bytes_free / pace)}"
