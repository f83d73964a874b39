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
from storaged.maintain.rejudging import Rejudging
from storaged.meta.names import Table

PREFIX_BYTES = 18
"""Of a packed register name: table, scope, shard."""

FAILURES_WAITED_FOR = 3
"""A finding whose repair failed this often is tried again, but ``status`` does not count repair as busy with it."""


REASON_CHARS_MAX = 300
TAKES_MAX = 4
"""How many times a look takes findings, when repair tries some of those that it took."""


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
    away_bytes: int = 0
    copy_bytes: int = 0

    def plus(self, finding: Finding) -> _Overflow:
        return _Overflow(
            self.below_target + (not finding.misplaced),
            self.misplaced + finding.misplaced,
            self.outdated + finding.outdated,
            self.away_bytes + finding.away_bytes,
            self.copy_bytes + finding.copy_bytes,
        )


_BELOW, _PARTS_BELOW, _MISPLACED, _OUTDATED, _LOST, _UNREADABLE, _AT_RISK = (
    "below target",
    "parts below target",
    "misplaced",
    "outdated",
    "lost",
    "unreadable",
    "at risk",
)


def _kinds(finding: Finding) -> Iterator[str]:
    """The counts that it belongs to."""
    is_object = finding.name[0] == Table.OBJECT
    if finding.misplaced:
        yield _MISPLACED
    else:
        yield _BELOW if is_object else _PARTS_BELOW
    if finding.outdated:
        yield _OUTDATED
    if is_object and finding.lost:
        yield _LOST
    elif is_object and finding.spare < 0:
        yield _UNREADABLE
    if is_object and finding.spare == 0 and finding.damaged_fragments > 0:
        yield _AT_RISK


class RepairQueue:
    """Packed register name -> Finding, grouped by range."""

    def __init__(self, limits: MaintainLimits) -> None:
        self._limits = limits
        self._ranges: dict[bytes, dict[bytes, Finding]] = {}
        self._overflow: dict[bytes, _Overflow] = {}
        self._back_offs: dict[bytes, _BackOff] = {}
        self._count = self._away_bytes = self._copy_bytes = 0
        self._tally: Counter[str] = Counter()
        self._rejudging = Rejudging()
        self._in_vain: dict[bytes, int] = {}
        """Name of a register that was judged again in vain -> the turn in which it was."""
        self._turn = 0
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
                self._count_one(finding, 1)
            else:
                overflow = overflow.plus(finding)
        if kept:
            self._ranges[prefix] = kept
            for finding in kept.values():
                self._expect(finding)
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
        if before is not None:
            self._count_one(before, -1)
        self._rejudging.remove(name)
        if finding is None or before is None or not finding.is_alike(before):
            self._back_offs.pop(name, None)
            self._in_vain.pop(name, None)
        if finding is not None and self._has_room(finding):
            known[name] = finding
            self._count_one(finding, 1)
            self._ranges[prefix] = known
            self._expect(finding)
        elif finding is not None:
            self._overflow[prefix] = self._overflow.get(prefix, _Overflow()).plus(finding)
        if not known:
            self._ranges.pop(prefix, None)

    def forget(self, prefix: bytes) -> None:
        known = self._ranges.pop(prefix, {})
        self._overflow.pop(prefix, None)
        for name, finding in known.items():
            self._count_one(finding, -1)
            self._rejudging.remove(name)
            self._back_offs.pop(name, None)
            self._in_vain.pop(name, None)

    def _count_one(self, finding: Finding, by: int) -> None:
        self._count += by
        self._away_bytes += by * finding.away_bytes
        self._copy_bytes += by * finding.copy_bytes
        for kind in _kinds(finding):
            self._tally[kind] += by

    def keep_only(self, prefixes: Iterable[bytes]) -> None:
        """Forgets the ranges that this node is not responsible for any more."""
        kept = set(prefixes)
        for prefix in [prefix for prefix in {**self._ranges, **self._overflow} if prefix not in kept]:
            self.forget(prefix)

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def listed(self) -> int:
        """Findings that are not only counted."""
        return self._count

    @property
    def overflowed(self) -> bool:
        return bool(self._overflow)

    @property
    def below_target(self) -> int:
        """Objects. Parts of uploads that are not complete are counted apart."""
        return self._tally[_BELOW] + self._overflowing(objects=True)

    @property
    def parts_below_target(self) -> int:
        """Parts of uploads that may still become an object, and uploads that are being completed."""
        return self._tally[_PARTS_BELOW] + self._overflowing(objects=False)

    @property
    def misplaced(self) -> int:
        """Objects and parts that are whole, and that the layout in force wants elsewhere, or under another profile."""
        return self._tally[_MISPLACED] + sum(some.misplaced for some in self._overflow.values())

    @property
    def outdated(self) -> int:
        """Those of them that it wants under another profile."""
        return self._tally[_OUTDATED] + sum(some.outdated for some in self._overflow.values())

    def _overflowing(self, *, objects: bool) -> int:
        """How many below target are not listed."""
        return sum(
            some.below_target for prefix, some in self._overflow.items() if (prefix[0] == Table.OBJECT) == objects
        )

    @property
    def away_bytes(self) -> int:
        """Of the fragments below target whose disks are away."""
        return self._away_bytes + sum(some.away_bytes for some in self._overflow.values())

    @property
    def copy_bytes(self) -> int:
        """Of the small copies whose disks are away."""
        return self._copy_bytes + sum(some.copy_bytes for some in self._overflow.values())

    @property
    def lost(self) -> int:
        """Objects."""
        return self._tally[_LOST]

    @property
    def unreadable(self) -> int:
        """Objects that can't be read until disks that are away return."""
        return self._tally[_UNREADABLE]

    @property
    def at_risk(self) -> int:
        """Objects with a block that one more lost fragment would make unreadable, although every disk that should hold
        a missing fragment answers.
        """
        return self._tally[_AT_RISK]

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
        self._expect(self._found(name))

    def try_again(self) -> None:
        """What failed is tried at once: there is room for it now."""
        self._back_offs.clear()
        self.fresh = True

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

    def take_changed(self, disks: DisksNow, now: float, limit: int) -> list[bytes]:
        """The names of up to ``limit`` findings that were judged by other disks than those that can be used now, and
        that repair does not try now. What was judged again in vain comes last, the fewest spare fragments first.
        ``judged_again`` follows for each.
        """
        found: list[bytes] = []
        for _ in range(TAKES_MAX):
            some = self._rejudging.take(disks, limit - len(found))
            # What does not rest any more is tried now, and comes back when that has failed.
            found += [name for name in some if self._waits(self._found(name), now)]
            if len(found) == limit or not some:
                break
        return found

    def judged_again(self, looked: Iterable[bytes], left: Iterable[bytes], disks: DisksNow, now: float) -> bool:
        """What became of those that were taken: ``left`` were not judged. Returns whether some were in vain."""
        self._turn += 1
        in_vain = False
        for name in looked:
            finding = self._found(name)
            if self._waits(finding, now) and finding is not None and finding.may_have_changed(disks):
                in_vain = True
                self._in_vain[name] = self._turn
            else:
                self._in_vain.pop(name, None)
            self._expect(finding)
        for name in left:
            self._expect(self._found(name))
        return in_vain

    def _found(self, name: bytes) -> Finding | None:
        return self._ranges.get(name[:PREFIX_BYTES], {}).get(name)

    def _waits(self, finding: Finding | None, now: float) -> bool:
        """Repair does not try it now."""
        return finding is not None and (not finding.repairable or self._rests(finding.name, now))

    def _expect(self, finding: Finding | None) -> None:
        """Has it judged again when the disks change, unless repair tries it."""
        if finding is not None and (not finding.repairable or finding.name in self._back_offs):
            self._rejudging.add(finding, self._in_vain.get(finding.name, 0))

    def unrepaired(self, disks: DisksNow, target: str) -> Counter[str]:
        """As ``Repair.unrepaired``."""
        found = Counter(self._reason(finding, disks, target) for finding in self if not finding.misplaced)
        del found[""]
        return found

    def unmoved(self) -> Counter[str]:
        """Why what is whole, and only has to move, did not when that was tried: reasons, and how many have each."""
        tried = (self._back_offs.get(finding.name) for finding in self if finding.misplaced)
        return Counter(back_off.reason for back_off in tried if back_off is not None and back_off.reason)

    def _reason(self, finding: Finding, disks: DisksNow, target: str) -> str:
        back_off = self._back_offs.get(finding.name)
        if back_off is not None and (finding.repairable or (finding.recodable and back_off.reason)):
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
