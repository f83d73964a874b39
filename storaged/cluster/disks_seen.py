"""What this process has itself seen of the disks: which of them answer late, or not. Hints; no I/O.

Theory of operation
    A disk's node says in its heartbeats how the disk does, but only every half second, and a node may be wrong about
    what its clients feel. So callers that wait for disks report here when one is late: a call that was given up while
    the others had answered, or a read that others overtook. One call that is ``LATE_S`` late, or ``STRIKES`` shorter
    ones in a row, make a disk *doubted*: it is left out of writes and asked last, for ``DOUBT_S``, and for twice as
    long each time that this happens again soon. An answer ends a row of strikes. After the time it is simply tried
    again: if its node does not call it slow or hung meanwhile, it was the network, or a moment.

    The ring has a weaker opinion of its own, ``asked last``: a replica that did not answer once is asked after the
    others for a while. That costs nothing, so it needs no proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from storaged.clock import Clock
from storaged.errors import DiskUnusable, PeerUnreachable, StoragedError

UNRESPONSIVE_S = 5.0
"""For how long a replica that did not answer, or whose disk is out of use, is asked last."""

LATE_S = 0.5
STRIKES = 3
STRIKES_S = 5.0
"""Strikes that are older do not count."""

DOUBT_S = 2.0
DOUBT_MAX_S = 60.0


class DisksSeen:
    """One for each process. All times are the clock's monotonic seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.doubted: dict[str, float] = {}
        """Disk -> until when."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a disk has come to ``doubted``."""
        self._last: dict[str, float] = {}
        """Disk -> until when it is asked last."""
        self._left_out: frozenset[str] = frozenset()
        self._strikes: dict[str, tuple[int, float]] = {}
        """Disk -> how often it was late in a row, and when the last time."""
        self._doubts: dict[str, tuple[float, float]] = {}
        """Disk -> for how long it was doubted, and until when that counts."""

    # --- what callers see

    def late(self, disk: str, for_s: float) -> None:
        """A call was given up, or overtaken by others, after ``for_s``."""
        now = self.clock.monotonic()
        count, at = self._strikes.get(disk, (0, now))
        count = count + 1 if now - at < STRIKES_S else 1
        if for_s < LATE_S and count < STRIKES:
            self._strikes[disk] = count, now
            return
        self._strikes.pop(disk, None)
        if self.doubted.get(disk, 0.0) > now:
            return  # calls that began before
        before_s, counts_until = self._doubts.get(disk, (0.0, 0.0))
        doubt_s = min(2 * before_s, DOUBT_MAX_S) if now < counts_until else DOUBT_S
        self._doubts[disk] = doubt_s, now + 2 * doubt_s + DOUBT_S
        self.doubted[disk] = now + doubt_s
        self.on_change()

    def answered(self, disk: str) -> None:
        """A call was answered in time."""
        if self._strikes:
            self._strikes.pop(disk, None)

    def expire(self) -> bool:
        """Ends doubts whose time is over. Returns whether there were some."""
        now = self.clock.monotonic()
        over = [disk for disk, until in self.doubted.items() if until <= now]
        for disk in over:
            del self.doubted[disk]
        return bool(over)

    # --- the order in which replicas are asked

    def add(self, disk: str) -> None:
        self._last[disk] = self.clock.monotonic() + UNRESPONSIVE_S

    def saw(self, disk: str, error: StoragedError) -> None:
        """Adds a disk that did not answer, or that its node says is out of use. Other errors concern one request."""
        if isinstance(error, PeerUnreachable | DiskUnusable):
            self.add(disk)

    def ask_last(self, disks: frozenset[str]) -> None:
        """These and no others are asked last, until the next call: by what their nodes report."""
        self._left_out = disks

    def last(self, disks: Sequence[str]) -> list[str]:
        """The disks in their order, unresponsive ones after the others. Among these the latest comes last: the others
        may be back.
        """
        left_out = self._left_out
        if not left_out and self._last.keys().isdisjoint(disks):
            return list(disks)
        now = self.clock.monotonic()
        still = self._last = {disk: until for disk, until in self._last.items() if until > now}
        return sorted(disks, key=lambda disk: (disk in left_out, still.get(disk, 0.0)))
