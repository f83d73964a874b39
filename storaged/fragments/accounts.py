"""How many bytes of each segment count: for the disk's usage, and for compaction. In memory.

A segment holds live records, notes that are needed as long as some other segment exists (*pins*), and garbage. One with
neither live records nor pins is *idle*: its file can go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from storaged.fragments.index_rows import SegmentRow
from storaged.wire import encode


@dataclass(slots=True)
class SegmentUse:
    """As SegmentRow. ``pins``: segment -> bytes of notes here."""

    end: int = 0
    live: int = 0
    punched: int = 0
    pins: dict[int, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        return self.end - self.punched

    @property
    def garbage(self) -> int:
        return max(0, self.held - self.live - sum(self.pins.values()))


class SegmentAccounts:
    """The use of every segment, and the sums. Changed by the thread that owns the engine."""

    def __init__(self) -> None:
        self.segments: dict[int, SegmentUse] = {}
        self.idle: set[int] = set()
        self.held_bytes = self.live_bytes = self.pinned_bytes = 0
        self._dirty: set[int] = set()

    @property
    def garbage_bytes(self) -> int:
        return max(0, self.held_bytes - self.live_bytes - self.pinned_bytes)

    def load(self, segment: int, row: SegmentRow) -> None:
        """Takes over what the last checkpoint says of a segment."""
        use = self.segments[segment] = SegmentUse(row.end, row.live, row.punched, dict(row.pins))
        self._count(use, 1)
        self._note_idle(segment, use)

    def grow(self, segment: int, end: int) -> None:
        """The segment's log reaches to ``end``; the segment is known from now on."""
        use = self._changed(segment)
        self.held_bytes += end - use.end
        use.end = end

    def punch(self, segment: int, count: int) -> None:
        """So many bytes went back to the file system."""
        self._changed(segment).punched += count
        self.held_bytes -= count

    def add_live(self, segment: int, count: int) -> None:
        """``count`` is negative for a record that became garbage. No-op for a segment that is gone."""
        if segment in self.segments:
            use = self._changed(segment)
            use.live += count
            self.live_bytes += count
            if count < 0:
                self._note_idle(segment, use)

    def pin(self, segment: int, targets: Iterable[int], count: int) -> None:
        """``count`` bytes of notes in ``segment`` are needed as long as the target segments exist."""
        pins = self._changed(segment).pins
        for target in targets:
            if target != segment:
                pins[target] = pins.get(target, 0) + count
                self.pinned_bytes += count

    def release_pins(self, segment: int) -> None:
        """The segment's notes have been copied elsewhere."""
        use = self._changed(segment)
        self.pinned_bytes -= sum(use.pins.values())
        use.pins.clear()
        self._note_idle(segment, use)

    def remove(self, segment: int) -> None:
        """The segment's file is gone: it pins notes in other segments no longer."""
        self._dirty.add(segment)
        self.idle.discard(segment)
        gone = self.segments.pop(segment, None)
        if gone is not None:
            self._count(gone, -1)
        for number, use in self.segments.items():
            released = use.pins.pop(segment, 0)
            if released:
                self.pinned_bytes -= released
                self._dirty.add(number)
                self._note_idle(number, use)

    def existing(self, segments: Iterable[int]) -> tuple[int, ...]:
        """Those that exist, each once, in order."""
        return tuple(sorted({segment for segment in segments if segment in self.segments}))

    def take_changes(self) -> dict[int, bytes]:
        """What changed since the last call, for a checkpoint: number -> encoded SegmentRow, empty for one that is
        gone.
        """
        rows: dict[int, bytes] = {}
        for number in self._dirty:
            use = self.segments.get(number)
            rows[number] = (
                b"" if use is None else encode(SegmentRow(use.end, use.live, use.punched, tuple(use.pins.items())))
            )
        self._dirty = set()
        return rows

    def _changed(self, segment: int) -> SegmentUse:
        self._dirty.add(segment)
        found = self.segments.get(segment)
        if found is None:
            found = self.segments[segment] = SegmentUse()
        return found

    def _note_idle(self, segment: int, use: SegmentUse) -> None:
        if use.live <= 0 and not use.pins:
            self.idle.add(segment)

    def _count(self, use: SegmentUse, sign: int) -> None:
        self.held_bytes += sign * use.held
        self.live_bytes += sign * use.live
        self.pinned_bytes += sign * sum(use.pins.values())
