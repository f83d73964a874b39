"""The findings of a node that wait for repair, by range, and what repair has tried in vain. Bounded: findings beyond
the bound are counted, not listed. After a new layout a large part of all objects may have to move; they get half of the
room at most, so that what is endangered is listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import DisksNow, Finding
from storaged.meta.names import Table

PREFIX_BYTES = 18
"""Of a packed register name: table, scope, shard."""

FAILURES_WAITED_FOR = 3
"""A finding whose repair failed so often is tried again, but ``status`` does not count repair as busy with it."""


REASON_CHARS_MAX = 300


def urgency(finding: Finding) -> tuple[bool, int, bytes]:
    """The lowest is repaired first: the one with the fewest spare fragments. Those that only have to move come last."""
    return finding.misplaced, finding.spare, finding.name


class _BackOff(NamedTuple):
    """``reason``: why the last attempt failed; empty when nothing failed, but the register is still below target."""

    until: float
    failures: int
    reason: str


class _Overflow(NamedTuple):
    """How many findings of a range are not listed."""

    below_target: int = 0
    misplaced: int = 0
    outdated: int = 0

    def plus(self, finding: Finding) -> _Overflow:
        return _Overflow(
            self.below_target + (not finding.misplaced),
            self.misplaced + finding.misplaced,
            self.outdated + finding.outdated,
        )


class RepairQueue:
    """Packed register name -> Finding, grouped by range."""

    def __init__(self, limits: MaintainLimits) -> None:
        self._limits = limits
        self._ranges: dict[bytes, dict[bytes, Finding]] = {}
        self._overflow: dict[bytes, _Overflow] = {}
        self._back_offs: dict[bytes, _BackOff] = {}
        self._count = 0
        self.fresh = True
        """There may be something new since repair looked last."""
        self.repaired = False
        """Something was repaired since the last walk began."""

    def __iter__(self) -> Iterator[Finding]:
        return (finding for found in self._ranges.values() for finding in found.values())

    def has(self, name: bytes) -> bool:
        return name in self._ranges.get(name[:PREFIX_BYTES], ())

    # --- filling ----------------------------------------------------------------------------------------------------

    def begin_walk(self) -> None:
        self.fresh, self.repaired = True, False

    def replace(self, prefix: bytes, found: Iterable[Finding]) -> None:
        """Takes over everything that a walk found in a range. What backed off is tried again."""
        self.forget(prefix)
        kept: dict[bytes, Finding] = {}
        overflow = _Overflow()
        for finding in found:
            if self._has_room(finding):
                kept[finding.name] = finding
                self._count += 1
            else:
                overflow = overflow.plus(finding)
        if kept:
            self._ranges[prefix] = kept
        if any(overflow):
            self._overflow[prefix] = overflow

    def _has_room(self, finding: Finding) -> bool:
        room = self._limits.findings_max
        return self._count < (-(-room // 2) if finding.misplaced else room)

    def set(self, name: bytes, finding: Finding | None) -> None:
        """Replaces the finding of one register; None: it is on target. Attempts for an earlier finding do not count any
        more.
        """
        prefix = name[:PREFIX_BYTES]
        known = self._ranges.get(prefix, {})
        before = known.pop(name, None)
        self._count -= before is not None
        if finding is None or before is None or not finding.is_alike(before):
            self._back_offs.pop(name, None)
        if finding is not None and self._has_room(finding):
            known[name] = finding
            self._count += 1
            self._ranges[prefix] = known
        elif finding is not None:
            self._overflow[prefix] = self._overflow.get(prefix, _Overflow()).plus(finding)
        if not known:
            self._ranges.pop(prefix, None)

    def forget(self, prefix: bytes) -> None:
        known = self._ranges.pop(prefix, {})
        self._count -= len(known)
        self._overflow.pop(prefix, None)
        for name in known:
            self._back_offs.pop(name, None)

    def keep_only(self, prefixes: Iterable[bytes]) -> None:
        """Forgets the ranges that this node is not responsible for any more."""
        kept = set(prefixes)
        for prefix in [prefix for prefix in {**self._ranges, **self._overflow} if prefix not in kept]:
            self.forget(prefix)

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def overflowed(self) -> bool:
        return bool(self._overflow)

    @property
    def below_target(self) -> int:
        """Objects. Parts of uploads that are not complete are counted apart."""
        return self._count_of(objects=True)

    @property
    def parts_below_target(self) -> int:
        """Parts of uploads that may still become an object, and uploads that are being completed."""
        return self._count_of(objects=False)

    @property
    def misplaced(self) -> int:
        """Objects and parts that are whole, and that the layout in force wants elsewhere, or under another profile."""
        return sum(finding.misplaced for finding in self) + sum(some.misplaced for some in self._overflow.values())

    @property
    def outdated(self) -> int:
        """Those of them that it wants under another profile."""
        return sum(finding.outdated for finding in self) + sum(some.outdated for some in self._overflow.values())

    def _count_of(self, *, objects: bool) -> int:
        listed = sum(
            sum(not finding.misplaced for finding in found.values())
            for prefix, found in self._ranges.items()
            if (prefix[0] == Table.OBJECT) == objects
        )
        return listed + sum(
            some.below_target for prefix, some in self._overflow.items() if (prefix[0] == Table.OBJECT) == objects
        )

    @property
    def lost(self) -> int:
        """Objects."""
        return sum(finding.lost for finding in self._of_objects())

    @property
    def unreadable(self) -> int:
        """Objects that can't be read until disks that are away return."""
        return sum(finding.spare < 0 and not finding.lost for finding in self._of_objects())

    @property
    def at_risk(self) -> int:
        """Objects with a block that one more lost fragment would make unreadable, although every disk that should hold
        a missing fragment answers.
        """
        return sum(finding.spare == 0 and finding.damaged_fragments > 0 for finding in self._of_objects())

    def _of_objects(self) -> Iterator[Finding]:
        return (
            finding for prefix, found in self._ranges.items() if prefix[0] == Table.OBJECT for finding in found.values()
        )

    def of_table(self, table: int) -> list[list[bytes]]:
        """The names of the findings in each range of a table."""
        return [list(found) for prefix, found in self._ranges.items() if prefix[0] == table]

    # --- work -------------------------------------------------------------------------------------------------------

    def due(
        self, now: float, *, recode: bool, moves: bool, misplaced: bool = True, bare_only: bool = False
    ) -> Iterator[Finding]:
        """What may be tried now. ``recode``: some disk has been away for so long that repair does not wait for it any
        more; ``bare_only``: this is for what has no spare left. ``moves``: gateways change records; otherwise only what
        can be rebuilt in place is due. ``misplaced``: with what is whole, and only has to move.
        """
        for finding in self:
            if finding.damaged_fragments == 0 and not moves:
                continue
            if finding.misplaced and not misplaced:
                continue
            wanted = finding.repairable or (recode and _is_recodable(finding, bare_only=bare_only))
            if wanted and not self._rests(finding.name, now):
                yield finding

    def back_off(self, name: bytes, now: float, reason: str = "") -> None:
        """Its repair was tried, and it is still below target. ``reason``: what failed."""
        failures = self._failures(name) + 1
        pause_s = min(self._limits.retry_s * 2 ** min(failures - 1, 20), self._limits.retry_max_s)
        self._back_offs[name] = _BackOff(now + pause_s, failures, reason[:REASON_CHARS_MAX])

    def expects_progress(self, *, moves: bool, misplaced: bool = True) -> bool:
        """Something can be repaired that did not fail again and again. ``moves``, ``misplaced``: as for ``due``."""
        return any(
            finding.repairable
            and (misplaced or not finding.misplaced)
            and (moves or finding.damaged_fragments > 0)
            and self._failures(finding.name) < FAILURES_WAITED_FOR
            for finding in self
        )

    def wants_moves(self, *, misplaced: bool = True) -> bool:
        """Something can't be rebuilt in place, and has to move. ``misplaced``: as for ``due``."""
        return any(
            finding.damaged_fragments == 0
            and (misplaced or not finding.misplaced)
            and (finding.repairable or finding.recodable)
            for finding in self
        )

    def judged_before(self, disks: DisksNow, now: float) -> list[bytes]:
        """Names of findings that repair does not try now, and that were judged while other disks could be used. The
        fewest spare fragments come first.
        """
        found = [
            finding
            for finding in self
            if finding.may_have_changed(disks) and (not finding.repairable or self._rests(finding.name, now))
        ]
        return [finding.name for finding in sorted(found, key=urgency)]

    def unrepaired(self, disks: DisksNow, target: str) -> Counter[str]:
        """As ``Repair.unrepaired``."""
        found = Counter(self._reason(finding, disks, target) for finding in self if not finding.misplaced)
        del found[""]
        return found

    def _reason(self, finding: Finding, disks: DisksNow, target: str) -> str:
        back_off = self._back_offs.get(finding.name)
        if back_off is not None and finding.repairable:
            return back_off.reason or "repair was tried, and it is still below its target"
        away = not disks.readable.issuperset(finding.unheard) or not disks.writable.issuperset(finding.unwritable)
        if finding.repairable or finding.spare < 0 or away:
            return ""  # its turn comes, or other counts say it
        if finding.unheard:
            return f"disk {', '.join(finding.unheard)} did not answer when it was looked at"
        if finding.no_room is not None:
            return f"the disks that new fragments go to, without slow ones, can't hold {target}"
        return "it is looked at again soon" if finding.may_have_changed(disks) else ""

    def waits_for_delay(self, *, bare_only: bool = False) -> bool:
        """Something waits only until disks have been away for long enough. ``bare_only``: as for ``due``."""
        return any(_is_recodable(finding, bare_only=bare_only) and not finding.repairable for finding in self)

    def _rests(self, name: bytes, now: float) -> bool:
        back_off = self._back_offs.get(name)
        return back_off is not None and back_off.until > now

    def _failures(self, name: bytes) -> int:
        back_off = self._back_offs.get(name)
        return back_off.failures if back_off is not None else 0


def _is_recodable(finding: Finding, *, bare_only: bool) -> bool:
    return finding.recodable and (finding.spare <= 0 or not bare_only)
