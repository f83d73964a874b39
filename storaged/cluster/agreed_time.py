"""The time that a majority of the storage nodes has reached: for what only time allows to delete.

A gateway whose clock jumps ahead must not delete what is not due. So this is never later than its own clock, nor than
the clocks of a majority of the storage nodes of the layout in force, which heartbeats compare (``membership``). A node
that does not answer, or whose clock was not compared yet, has reached no time. While there is no majority no time is
agreed. When this node is the only storage node, its own clock counts.

Comparisons are up to SAMPLES_S old. When the own wall clock has moved against the monotonic one, they are of before
that, and no time is agreed until they are all new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from storaged.clock import Clock
from storaged.cluster.layout import Layout
from storaged.cluster.membership import NodeStatus

SAMPLES_S = 10.0
"""Longer than ``membership`` keeps comparisons."""
STEP_MS = 1_000
"""A move of the wall clock against the monotonic one that is a jump. What is below is slewing, and small."""


def reached(own_ms: int, ahead_ms: Sequence[float | None]) -> int | None:
    """The latest time, up to ``own_ms``, that a majority of clocks has reached. ``ahead_ms``: how far each storage
    node's clock is ahead of the own one; None: not known. Pure.
    """
    need = len(ahead_ms) // 2 + 1
    known = sorted((ahead for ahead in ahead_ms if ahead is not None), reverse=True)
    if not ahead_ms or len(known) < need:
        return None
    return own_ms + min(0, int(known[need - 1]))


def storage_clocks(layout: Layout, status: Callable[[str], NodeStatus]) -> list[float | None]:
    """How far the clock of each storage node is ahead, as ``reached`` wants it. ``status``: that of ``Membership``."""
    known = [status(entry.name) for entry in layout.nodes if "storage" in entry.roles]
    return [node.clock_skew_ms if node.state == "up" else None for node in known]


class AgreedTime:
    """``ahead_ms()``: see ``reached``."""

    def __init__(self, clock: Clock, ahead_ms: Callable[[], Sequence[float | None]]) -> None:
        self._clock = clock
        self._ahead_ms = ahead_ms
        self._offset_ms: float | None = None
        """The wall clock minus the monotonic one, when that was looked at last."""
        self._from_s = 0.0

    def now_ms(self) -> int | None:
        """None: no time is agreed now."""
        wall_ms, mono_s = self._clock.wall_ms(), self._clock.monotonic()
        offset_ms = wall_ms - mono_s * 1000
        if self._offset_ms is None or abs(offset_ms - self._offset_ms) > STEP_MS:
            self._from_s = mono_s + SAMPLES_S
        self._offset_ms = offset_ms
        return reached(wall_ms, self._ahead_ms()) if mono_s >= self._from_s else None
