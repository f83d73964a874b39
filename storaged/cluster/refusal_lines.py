"""Log lines about refused peers and calls, limited: a peer that is refused again and again can't fill the log.

The first refusal of a kind is logged at once. Those of the following minute are counted; the first one after it is
logged with their number. The audit log has its own limit (``audit.refusals``).
"""

from __future__ import annotations

from collections.abc import Callable

MINUTE_S = 60.0

Line = Callable[..., object]
"""``line(event, *, peer, code, reason, more)``: a logger's ``warning``."""


class RefusalLines:
    """Bounded by the number of kinds (event and code), which peers do not choose."""

    def __init__(self, line: Line, monotonic: Callable[[], float]) -> None:
        self._line = line
        self._monotonic = monotonic
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}
        """When the last line of a kind was logged, and how many refusals it was not for."""

    def note(self, event: str, peer: str, code: str, reason: str) -> None:
        now = self._monotonic()
        logged, more = self._kinds.get((event, code), (now - MINUTE_S, 0))
        if now - logged < MINUTE_S:
            self._kinds[event, code] = logged, more + 1
            return
        self._kinds[event, code] = now, 0
        counted = {"more_since_last_line": more} if more else {}
        self._line(event, peer=peer, code=code, reason=reason, **counted)
