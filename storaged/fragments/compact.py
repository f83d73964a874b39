"""Compaction: what is live in a segment that is mostly garbage is appended again, then the segment is removed.

A copy keeps its record's sequence number and its cell sums, whatever the cells are now: damage stays visible as damage.
A note is copied as long as a record that it is about may be in some other segment. The old segment is removed only
after a checkpoint that no longer needs it. A crash at any point leaves copies, which the next replay distinguishes by
their place, or a dead segment, which the next checkpoint removes.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from storaged.errors import StoragedError
from storaged.fragments.engine import Engine
from storaged.fragments.format import (
    FRAGMENT,
    NOTES,
    SEGMENT_HEADER_BYTES,
    Delete,
    FormatError,
    Note,
    Retire,
    Touch,
    Unretire,
    parse_fragment,
    parse_notes,
    segment_seed,
)
from storaged.fragments.scan import Found, Gap, read_tolerant, scan
from storaged.wire import encode


class Compactor:
    """Works in slices, on the engine's thread; its owner decides when there is time for one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._items: Iterator[Found | Gap] = iter(())

    def candidate(self) -> int:
        """The sealed segment with most garbage, if that is a large enough part of it; 0 when there is none."""
        engine = self._engine
        best, best_garbage = 0, 0
        for number, use in engine.index.accounts.segments.items():
            if number == engine.log.active or number in engine.stuck or number not in engine.log.segments:
                continue
            counts = use.live > 0 or bool(use.pins)
            if counts and use.garbage > best_garbage and use.garbage >= engine.limits.compact_garbage_part * use.held:
                best, best_garbage = number, use.garbage
        return best

    def step(self, bytes_max: int) -> bool:
        """Copies about so many bytes. False when there is nothing to do now."""
        engine = self._engine
        if engine.state.failure:
            return False
        if not engine.compacting:
            engine.compacting = self.candidate()
            if not engine.compacting:
                return False
            file = engine.log.segments[engine.compacting]
            seed = segment_seed(engine.index.disk_id, engine.compacting)
            self._items = scan(file, seed, SEGMENT_HEADER_BYTES, file.size())
        done = 0
        while done < bytes_max:
            item = next(self._items, None)
            if item is None:
                self._finish()
                return True
            if isinstance(item, Gap) or item.message is None:
                continue
            error, count = self._copy(item)
            if error is not None:
                # No space, or the disk failed: the segment stays as it is, and may be tried again.
                engine.compacting = 0
                return False
            done += count
        return True

    def _finish(self) -> None:
        """All that can be copied is. A record whose head does not hold keeps the segment until the fragment is replaced
        or deleted.
        """
        engine, number = self._engine, self._engine.compacting
        engine.compacting = 0
        accounts = engine.index.accounts
        accounts.release_pins(number)
        if accounts.segments[number].live > 0:
            engine.stuck.add(number)

    def _copy(self, found: Found) -> tuple[StoragedError | None, int]:
        try:
            if found.head.kind == FRAGMENT:
                return self._copy_fragment(found)
            if found.head.kind == NOTES:
                return self._copy_notes(found)
        except FormatError:
            pass
        return None, 0

    def _copy_fragment(self, found: Found) -> tuple[StoragedError | None, int]:
        engine, number, head = self._engine, self._engine.compacting, found.head
        assert found.message is not None
        assert found.sums is not None
        header = parse_fragment(found.message)
        entry = engine.index.lookup(header.id)
        if entry is None or (entry.segment, entry.offset) != (number, found.offset):
            return None, 0
        payload = read_tolerant(engine.log.segments[number], found.offset + head.payload_start, head.payload_bytes)
        if len(payload) < head.payload_bytes:
            return None, 0
        message = encode(msgspec.structs.replace(header, created_ms=entry.created_ms))
        return engine.move(header.id, entry, message, bytes(found.sums), payload), head.record_bytes

    def _copy_notes(self, found: Found) -> tuple[StoragedError | None, int]:
        assert found.message is not None
        sequence = found.head.sequence
        notes = [kept for note in parse_notes(found.message) if (kept := self._needed(note, sequence)) is not None]
        return (self._engine.note(notes, sequence) if notes else None), found.head.record_bytes

    def _needed(self, note: Note, sequence: int) -> Note | None:
        """The note as it must be copied; None when nothing depends on it any more."""
        index, number = self._engine.index, self._engine.compacting
        if isinstance(note, Touch):
            entry = index.lookup(note.id)
            counts = entry is not None and entry.created_ms == note.created_ms and entry.sequence <= sequence
            return note if counts else None
        if isinstance(note, Retire):
            row = index.retired(note.data_id)
            return note if row is not None and (row.segment, row.sequence) == (number, sequence) else None
        targets = tuple(target for target in index.accounts.existing(note.targets) if target != number)
        if not targets:
            return None
        if isinstance(note, Delete):
            return Delete(note.id, targets)
        return Unretire(note.data_id, targets)
