"""Clocks that a test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass
class LoopClock:
    """Monotonic time is the event loop's, plus what a test adds. The wall clock ticks a millisecond at each reading."""

    ahead_s: float = 0.0
    wall: int = 1_760_000_000_000

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s

    def wall_ms(self) -> int:
        self.wall += 1
        return self.wall


@dataclass
class ManualClock:
    """Moves only when a test says so."""

    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return 1_760_000_000_000 + int(1000 * self.now_s)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
