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
