"""How fast each node may spend what it asks of a gateway. Pure."""

from __future__ import annotations

from math import inf


class Pace:
    """Each node may spend ``burst`` at once, and ``per_s`` a second after that. Bounded by the number of nodes."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst_s = burst / per_s
        self._free_at: dict[str, float] = {}

    def spend(self, node: str, cost: float, now: float) -> float:
        """Returns how many seconds this cost has to wait. ``now``: of a monotonic clock, in seconds."""
        self._free_at[node] = max(self._free_at.get(node, -inf), now - self._burst_s) + cost / self._per_s
        return self.wait_s(node, now)

    def wait_s(self, node: str, now: float) -> float:
        """How many seconds the node has to wait for what it has spent."""
        return max(0.0, self._free_at.get(node, -inf) - now)
