"""Time as a port, so that a cluster test replays from a seed.

``monotonic`` measures intervals, ``wall_ms`` stamps records and checks signatures. Safety never depends on ``wall_ms``.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary moment, never going back."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)  # not wrapped in a method: a request calls it ten times

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000
