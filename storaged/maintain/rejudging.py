"""Which findings repair may solve with the disks that can be used now, the most urgent first. Pure.

Theory of operation. There may be a hundred thousand findings, and they are asked for each second. So they are kept by
cause (``Finding.causes``). Each cause has a heap, and a look takes only as many as it wants from the heaps whose cause
is met. The taker adds a finding again after it was judged. A finding that was removed leaves its entries in the heaps.
They do not count, and a heap drops them when they are the larger part.
"""

from __future__ import annotations

import heapq
from collections import Counter

from storaged.maintain.health import Cause, DisksNow, Finding, is_met

Order = tuple[int, bool, int, bytes]

STALE_MIN = 64
"""A heap with fewer stale entries than this keeps them."""


def urgency(finding: Finding) -> tuple[bool, int, bytes]:
    """The lowest is repaired first: the one with the fewest spare fragments. Those that only have to move come last."""
    return finding.misplaced, finding.spare, finding.name


class Rejudging:
    """Names of findings."""

    def __init__(self) -> None:
        self._heaps: dict[Cause, list[Order]] = {}
        self._counts: Counter[Cause] = Counter()
        """How many entries of each heap count."""
        self._known: dict[bytes, tuple[Order, tuple[Cause, ...]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, finding: Finding, turn: int) -> None:
        """A lower ``turn`` comes first, whatever its urgency. No-op for a finding that no disk changes."""
        self.remove(finding.name)
        causes = finding.causes()
        if not causes:
            return
        order = (turn, *urgency(finding))
        self._known[finding.name] = order, causes
        for cause in causes:
            heapq.heappush(self._heaps.setdefault(cause, []), order)
            self._counts[cause] += 1

    def remove(self, name: bytes) -> None:
        """No-op for one that is not known."""
        _, causes = self._known.pop(name, (None, ()))
        for cause in causes:
            self._discount(cause)

    def take(self, disks: DisksNow, limit: int) -> list[bytes]:
        """Takes out up to ``limit`` of those that ``disks`` may change."""
        heaps = [heap for cause, heap in self._heaps.items() if is_met(cause, disks)]
        tops = [(heap[0], number) for number, heap in enumerate(heaps)]
        heapq.heapify(tops)
        found: dict[bytes, tuple[Cause, ...]] = {}
        while tops and len(found) < limit:
            order, number = tops[0]
            heapq.heappop(heaps[number])
            if heaps[number]:
                heapq.heapreplace(tops, (heaps[number][0], number))
            else:
                heapq.heappop(tops)
            name = order[-1]
            if self._counts_for(order):
                _, found[name] = self._known.pop(name)
        for causes in found.values():
            for cause in causes:
                self._discount(cause)
        return list(found)

    def _counts_for(self, order: Order) -> bool:
        known = self._known.get(order[-1])
        return known is not None and known[0] is order

    def _discount(self, cause: Cause) -> None:
        self._counts[cause] -= 1
        count, heap = self._counts[cause], self._heaps[cause]
        if not count:
            del self._counts[cause], self._heaps[cause]
        elif len(heap) > 2 * count + STALE_MIN:
            heap[:] = filter(self._counts_for, heap)
            heapq.heapify(heap)
