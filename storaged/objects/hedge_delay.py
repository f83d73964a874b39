"""The delay after which a read is hedged: learned from recent reads. Pure."""

from __future__ import annotations


class HedgeDelay:
    """How long a read may take before other fragments are read: about the 95th percentile of recent reads, never below
    ``floor_s``.

    It moves up by 19 steps for a read that took longer, and down by one for each other read. So it settles where one
    read in twenty takes longer (stochastic quantile estimation, Robbins and Monro 1951).
    """

    STEP = 0.01

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self.seconds = floor_s

    def saw(self, seconds: float) -> None:
        scale = self.seconds * self.STEP
        self.seconds = max(self._floor_s, self.seconds + (19 * scale if seconds > self.seconds else -scale))
