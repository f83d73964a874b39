"""What a node knows to be below target, by range, and what repair has tried in vain. Bounded: beyond the bound things
are counted, not listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import Finding
from storaged.meta.names import Table

PREFIX_BYTES = 18
"""Of a packed register name: table, scope, shard."""

HOPELESS = 3
"""After so many failures what is tried again is not waited for."""


class _Rest(NamedTuple):
    until: float
    failures: int


class Findings:
    """Packed register name -> Finding, grouped by range."""

    def __init__(self, limits: MaintainLimits) -> None:
        self._limits = limits
        self._ranges: dict[bytes, dict[bytes, Finding]] = {}
        self._overflow: dict[bytes, int] = {}
        self._rests: dict[bytes, _Rest] = {}
        self._count = 0

    def __iter__(self) -> Iterator[Finding]:
        return (finding for found in self._ranges.values() for finding in found.values())

    def has(self, name: bytes) -> bool:
        return name in self._ranges.get(name[:PREFIX_BYTES], ())

    def replace(self, prefix: bytes, found: Iterable[Finding]) -> None:
        """All there is to know of a range, as a walk found it. What rested is tried again."""
        self.forget(prefix)
        kept: dict[bytes, Finding] = {}
        overflow = 0
        for finding in found:
            if self._count + len(kept) < self._limits.findings_max:
                kept[finding.name] = finding
            else:
                overflow += 1
        if kept:
            self._ranges[prefix] = kept
            self._count += len(kept)
        if overflow:
            self._overflow[prefix] = overflow

    def file(self, name: bytes, finding: Finding | None) -> None:
        """What is known of one register now; None: it is well."""
        prefix = name[:PREFIX_BYTES]
        known = self._ranges.get(prefix, {})
        self._count -= known.pop(name, None) is not None
        if finding is None:
            self._rests.pop(name, None)
        elif self._count < self._limits.findings_max:
            known[name] = finding
            self._count += 1
            self._ranges[prefix] = known
        else:
            self._overflow[prefix] = self._overflow.get(prefix, 0) + 1
        if not known:
            self._ranges.pop(prefix, None)

    def forget(self, prefix: bytes) -> None:
        known = self._ranges.pop(prefix, {})
        self._count -= len(known)
        self._overflow.pop(prefix, None)
        for name in known:
            self._rests.pop(name, None)

    def keep_only(self, prefixes: Iterable[bytes]) -> None:
        """Ranges that this node does not look after any more are another's."""
        kept = set(prefixes)
        for prefix in [prefix for prefix in {**self._ranges, **self._overflow} if prefix not in kept]:
            self.forget(prefix)

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def overflowed(self) -> bool:
        return bool(self._overflow)

    @property
    def below_target(self) -> int:
        """Objects. What belongs to uploads that are not complete is counted apart."""
        return self._count_of(objects=True)

    @property
    def parts_below_target(self) -> int:
        """Parts of uploads that may still become an object, and uploads that are being completed."""
        return self._count_of(objects=False)

    def _count_of(self, *, objects: bool) -> int:
        listed = sum(len(found) for prefix, found in self._ranges.items() if (prefix[0] == Table.OBJECT) == objects)
        return listed + sum(count for prefix, count in self._overflow.items() if (prefix[0] == Table.OBJECT) == objects)

    @property
    def lost(self) -> int:
        """Objects."""
        return sum(finding.lost for finding in self._of_objects())

    @property
    def unreadable(self) -> int:
        """Objects that cannot be read until disks that are away return."""
        return sum(finding.spare < 0 and not finding.lost for finding in self._of_objects())

    @property
    def at_risk(self) -> int:
        """Objects of which one more lost fragment would make a block unreadable, although every disk that should hold
        it answers.
        """
        return sum(finding.spare == 0 and finding.damaged_fragments > 0 for finding in self._of_objects())

    def _of_objects(self) -> Iterator[Finding]:
        return (
            finding for prefix, found in self._ranges.items() if prefix[0] == Table.OBJECT for finding in found.values()
        )

    def of_table(self, table: int) -> list[list[bytes]]:
        """The names found in each range of a table."""
        return [list(found) for prefix, found in self._ranges.items() if prefix[0] == table]

    # --- work -------------------------------------------------------------------------------------------------------

    def workable(self, now: float, overdue: bool) -> Iterator[Finding]:
        """What may be tried now. ``overdue``: some disk has been away for so long that it is not
        waited for any more.
        """
        for finding in self:
            if finding.mendable or (overdue and finding.movable):
                rest = self._rests.get(finding.name)
                if rest is None or rest.until <= now:
                    yield finding

    def rest(self, name: bytes, now: float) -> None:
        """It was tried, and is not well."""
        failures = self._rests[name].failures + 1 if name in self._rests else 1
        pause_s = min(self._limits.retry_s * 2 ** min(failures - 1, 20), self._limits.retry_max_s)
        self._rests[name] = _Rest(now + pause_s, failures)

    def hopeful(self) -> bool:
        """Something can be mended that did not fail again and again."""
        return any(finding.mendable and self._failures(finding.name) < HOPELESS for finding in self)

    def movable_later(self) -> bool:
        """Something waits only for disks to have been away long enough."""
        return any(finding.movable and not finding.mendable for finding in self)

    def _failures(self, name: bytes) -> int:
        rest = self._rests.get(name)
        return rest.failures if rest is not None else 0
