"""Where every fragment of a disk is: an LMDB environment, and in memory what is newer than its last checkpoint.

Theory of operation. The segments are the truth, this is derived from them. A change goes to the overlay (a dict); a
checkpoint writes the
overlay to LMDB in one synced transaction, along with the position up to which the log is covered. After a crash the log
is replayed from that
position, so that an acknowledged write costs one fdatasync, the log's. At most two overlays exist: the one that is
filled, and the
frozen one that a checkpoint is writing. A lookup asks them in that order, then LMDB.

Which record of a fragment counts is decided by its sequence number: the highest wins, be it a fragment or a note that
deletes it. A copy that
compaction made has its original's number, and the later place wins. For every fragment the index knows its ``shadows``:
other segments
in which older records of it lie, so that the note that deletes it one day says how long it must be kept.

A reader takes the overlay first and the frozen one after it: a freeze fills the second before it empties the first.
Changes are made by the owner (who has the engine in hand, or recovery); ``lookup``, ``scan``, ``due``, ``find_copy``
and the damage list may be
used from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import msgspec

from storaged.errors import DiskForeign, IndexDamaged
from storaged.fragments.entry import BROKEN, Entry, pack_entry, unpack_entry
from storaged.fragments.format import KEY_BYTES, Delete, Note, Retire, Touch
from storaged.mapped import reach_end
from storaged.units import GIB
from storaged.wire import Message, decode, encode

INDEX_VERSION = 2
"""1 knew but one form of an entry. An index of it is read, and says 2 from its next checkpoint on, so that a program
that knows no other form refuses it.
"""

WHOLE_COPY = b"\0\0\0\0\x01"
"""In a key, behind the data id: block 0, k = 1."""

HEAD_CELL = -1
"""In the damage list: the record's head does not hold, so none of its cells can be read."""

DAMAGED_FRAGMENTS_MAX = 100_000
"""Beyond that the disk is beyond repair, and every damaged fragment is found again when it is read."""


class Position(NamedTuple):
    """A place in the log: all bytes of earlier segments, and of this one those before ``offset``, come before it."""

    segment: int
    offset: int


class RetireRow(Message, frozen=True):
    """An entry of the garbage list, and the record in the log that says so."""

    owner: bytes
    due_ms: int
    segment: int
    record_bytes: int
    sequence: int
    shadows: tuple[int, ...] = ()


class SegmentRow(Message, frozen=True):
    """``end``: bytes of log. ``live``: of records that count. ``punched``: given back as holes. ``pins``: (segment,
    bytes of notes here needed while it exists).
    """

    end: int
    live: int
    punched: int
    pins: tuple[tuple[int, int], ...] = ()


class CheckpointRow(Message, frozen=True):
    version: int
    disk_id: str
    segment: int
    offset: int
    sequence: int
    fragments: int


@dataclass(slots=True)
class SegmentUse:
    """As SegmentRow, in memory."""

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


class Overlay:
    """Changes since the last checkpoint; None means deleted."""

    __slots__ = ("copies", "fragments", "retired")

    def __init__(self) -> None:
        self.fragments: dict[bytes, Entry | None] = {}
        self.retired: dict[bytes, RetireRow | None] = {}
        self.copies: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self.fragments) + len(self.retired)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that one commit writes. ``segments``: number -> encoded SegmentRow, empty when it is gone. ``dead``:
    segments that nothing refers
    to once it is durable."""

    overlay: Overlay
    row: CheckpointRow
    segments: dict[int, bytes]
    damaged: dict[bytes, frozenset[int]]
    dead: tuple[int, ...]


class Index:
    """One disk's index. Raises IndexDamaged when LMDB refuses the environment, DiskForeign when it
    is another disk's.
    """

    def __init__(self, directory: Path, disk_id: str, *, map_bytes_max: int = 64 * GIB, durable: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.disk_id = disk_id
        self.overlay = Overlay()
        self.frozen: Overlay | None = None
        self.segments: dict[int, SegmentUse] = {}
        self._segments_dirty: set[int] = set()
        self.idle: set[int] = set()
        self.held_bytes = self.live_bytes = self.pinned_bytes = 0
        self._damage_lock = threading.Lock()
        self._damage_dirty: set[bytes] = set()
        try:
            self._env = lmdb.open(str(directory), map_size=map_bytes_max, max_dbs=6, sync=durable, max_readers=512)
            reach_end(self._env, directory)
            with self._env.begin(write=True) as txn:
                self._db = {
                    name: self._env.open_db(name.encode(), txn=txn)
                    for name in ("fragments", "segments", "retired", "due", "damaged", "meta")
                }
            self._load()
        except (lmdb.Error, msgspec.MsgspecError) as error:
            raise IndexDamaged(f"the fragment index in {directory} cannot be read: {error}") from error

    def _load(self) -> None:
        with self._env.begin() as txn:
            raw = txn.get(b"checkpoint", db=self._db["meta"])
            row = (
                decode(raw, CheckpointRow)
                if raw is not None
                else CheckpointRow(INDEX_VERSION, self.disk_id, 0, 0, 0, 0)
            )
            for key, value in txn.cursor(db=self._db["segments"]):
                found = decode(value, SegmentRow)
                self.segments[int.from_bytes(key, "big")] = SegmentUse(
                    found.end, found.live, found.punched, dict(found.pins)
                )
            self.damaged = {
                bytes(key): frozenset(decode(value, tuple[int, ...]))
                for key, value in txn.cursor(db=self._db["damaged"])
            }
        if row.disk_id != self.disk_id:
            raise DiskForeign(f"the fragment index belongs to disk {row.disk_id}, not to {self.disk_id}")
        if not 1 <= row.version <= INDEX_VERSION:
            raise IndexDamaged(f"the fragment index has version {row.version}, this program knows {INDEX_VERSION}")
        for number, use in self.segments.items():
            self._count(use, 1)
            self._idle(number, use)
        self.checkpoint = Position(row.segment, row.offset)
        self.sequence = row.sequence
        self.fragments = row.fragments

    # --- lookups, from any thread
    # -----------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> Entry | None:
        entry = self.overlay.fragments.get(key, BROKEN)
        if entry is not BROKEN:
            return entry
        frozen = self.frozen
        if frozen is not None:
            entry = frozen.fragments.get(key, BROKEN)
            if entry is not BROKEN:
                return entry
        try:
            with self._env.begin(buffers=True) as txn:
                value = txn.get(key, db=self._db["fragments"])
                return None if value is None else unpack_entry(key, value)
        except (lmdb.CorruptedError, lmdb.PageNotFoundError):
            return BROKEN

    def lookup_all(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """As ``lookup`` of each, in one snapshot: every call into LMDB gives the interpreter away, and a busy one takes
        its time to give it back.
        """
        overlay, frozen = self.overlay.fragments, self.frozen.fragments if self.frozen is not None else {}
        found = [overlay.get(key, BROKEN) for key in keys]
        found = [frozen.get(key, BROKEN) if entry is BROKEN else entry for key, entry in zip(keys, found, strict=True)]
        if BROKEN not in found:
            return found
        fragments = self._db["fragments"]
        try:
            with self._env.begin(buffers=True) as txn:
                for index, key in enumerate(keys):
                    if found[index] is BROKEN:
                        value = txn.get(key, db=fragments)
                        found[index] = None if value is None else unpack_entry(key, value)
        except (lmdb.CorruptedError, lmdb.PageNotFoundError):
            return [self.lookup(key) for key in keys]
        return found

    def find_copy(self, data_id: bytes) -> bytes | None:
        """The key of block 0's whole copy (k = 1) of a data id, whatever its m and position."""
        for overlay in (self.overlay, self.frozen):
            key = overlay.copies.get(data_id) if overlay is not None else None
            if key is not None and self.lookup(key) is not None:
                return key
        found = self._stored(data_id + WHOLE_COPY)
        return next((key for key in found if self.lookup(key) is not None), None)

    def copy_entry(self, data_id: bytes) -> tuple[bytes, Entry] | None:
        """As ``find_copy``, with the entry, in one look-up."""
        key = self.overlay.copies.get(data_id)
        entry = self.overlay.fragments.get(key) if key is not None else None
        if key is not None and entry is not None:
            return key, entry
        if self.frozen is not None or key is not None:
            key = self.find_copy(data_id)
            entry = self.lookup(key) if key is not None else None
            return None if key is None or entry is None else (key, entry)
        prefix = data_id + WHOLE_COPY
        try:
            with self._env.begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
                more = cursor.set_range(prefix)
                while more:
                    key, value = cursor.item()
                    if not key.startswith(prefix):
                        break
                    entry = self.overlay.fragments.get(key, BROKEN)
                    if entry is BROKEN:
                        entry = unpack_entry(key, value)
                    if entry is not None:
                        return key, entry
                    more = cursor.next()
        except (lmdb.CorruptedError, lmdb.PageNotFoundError):
            pass  # the slow way says what is wrong
        return None

    def of(self, data_ids: Collection[bytes]) -> set[bytes]:
        """The keys of all fragments of these data ids."""
        overlay, frozen = self.overlay, self.frozen
        keys = {key for data_id in data_ids for key in self._stored(data_id)}
        for newer in (frozen, overlay):
            if newer is not None:
                keys.update(key for key in newer.fragments.copy() if key[:16] in data_ids)
        return {key for key in keys if self.lookup(key) is not None}

    def _stored(self, prefix: bytes) -> list[bytes]:
        """Keys in LMDB that begin like this, whatever the overlays say of them."""
        found: list[bytes] = []
        with self._env.begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
            more = cursor.set_range(prefix)
            while more and cursor.key().startswith(prefix):
                found.append(cursor.key())
                more = cursor.next()
        return found

    def keys(self, after: bytes, limit: int) -> list[bytes]:
        """The next ``limit`` keys behind ``after`` in order, one short snapshot."""
        overlay, frozen = self.overlay, self.frozen
        newer = dict(frozen.fragments) if frozen is not None else {}
        newer.update(overlay.fragments.copy())
        found: list[bytes] = []
        with self._env.begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
            more = cursor.set_range(after)
            while more and len(found) < limit:
                key = cursor.key()
                if key > after and key not in newer:
                    found.append(key)
                more = cursor.next()
        end = found[-1] if len(found) == limit else b"\xff" * (KEY_BYTES + 1)
        found.extend(key for key, entry in newer.items() if entry is not None and after < key <= end)
        return sorted(found)[:limit]

    def retired(self, data_id: bytes) -> RetireRow | None:
        for overlay in (self.overlay, self.frozen):
            if overlay is not None and data_id in overlay.retired:
                return overlay.retired[data_id]
        with self._env.begin() as txn:
            value = txn.get(data_id, db=self._db["retired"])
            return None if value is None else decode(value, RetireRow)

    def due(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        """(data id, owner) of what is on the garbage list and due, the longest due first."""
        overlay, frozen = self.overlay, self.frozen
        newer = dict(frozen.retired) if frozen is not None else {}
        newer.update(overlay.retired.copy())
        found = [
            (row.due_ms, data_id, row.owner)
            for data_id, row in newer.items()
            if row is not None and row.due_ms <= now_ms
        ]
        count = 0
        with self._env.begin() as txn:
            for key in txn.cursor(db=self._db["due"]).iternext(values=False):
                due_ms, data_id = int.from_bytes(key[:8], "big"), key[8:]
                if due_ms > now_ms or count == limit:
                    break
                value = txn.get(data_id, db=self._db["retired"])
                if data_id not in newer and value is not None:
                    found.append((due_ms, data_id, decode(value, RetireRow).owner))
                    count += 1
        return [(data_id, owner) for _, data_id, owner in sorted(found)[:limit]]

    def mark_damaged(self, key: bytes, cell: int) -> bool:
        """Whether this was news."""
        with self._damage_lock:
            known = self.damaged.get(key, frozenset())
            if cell in known or len(self.damaged) >= DAMAGED_FRAGMENTS_MAX:
                return False
            self.damaged[key] = known | {cell}
            self._damage_dirty.add(key)
            return True

    # --- changes, by the owner
    # -----------------------------------------------------------------------------------------------

    def grow(self, segment: int, end: int) -> None:
        """The segment's log reaches to ``end`` (and the segment is known from now on)."""
        use = self._changed(segment)
        self.held_bytes += end - use.end
        use.end = end

    def punch(self, segment: int, count: int) -> None:
        self._changed(segment).punched += count
        self.held_bytes -= count

    @property
    def garbage_bytes(self) -> int:
        return max(0, self.held_bytes - self.live_bytes - self.pinned_bytes)

    def release_pins(self, segment: int) -> None:
        """Its notes have been copied elsewhere."""
        use = self._changed(segment)
        self.pinned_bytes -= sum(use.pins.values())
        use.pins.clear()
        self._idle(segment, use)

    def _changed(self, segment: int) -> SegmentUse:
        self._segments_dirty.add(segment)
        found = self.segments.get(segment)
        if found is None:
            found = self.segments[segment] = SegmentUse()
        return found

    def _idle(self, segment: int, use: SegmentUse) -> None:
        if use.live <= 0 and not use.pins:
            self.idle.add(segment)

    def put(self, key: bytes, entry: Entry) -> Entry | None:
        """A record of this fragment is in the log. Returns the entry that it replaced. An older record than the known
        one only casts a shadow.
        """
        return self.replace(key, self.lookup(key), entry)

    def replace(self, key: bytes, old: Entry | None, entry: Entry) -> Entry | None:
        """``put`` for who has looked up what is known."""
        if old is not None and old.segment:
            if old.sequence > entry.sequence:
                self._set(key, old._replace(shadows=self._shadows(old.shadows, entry.segment)))
                return None
            self._live(old.segment, -old.record_bytes)
            entry = entry._replace(shadows=self._shadows((*old.shadows, *entry.shadows), old.segment))
        if old is None:
            self.fragments += 1
        self._set(key, entry)
        self._live(entry.segment, entry.record_bytes)
        if old is not None and old.sequence != entry.sequence:
            self._heal(key)
        return old

    def drop(self, key: bytes, sequence: int) -> Entry | None:
        """A note says that records of this fragment up to ``sequence`` are gone. Returns the entry,
        when there was one.
        """
        old = self.lookup(key)
        if old is None or old.sequence > sequence:
            return None
        self.fragments -= 1
        self.overlay.fragments[key] = None
        self._live(old.segment, -old.record_bytes)
        self._heal(key)
        return old

    def forget(self, key: bytes) -> None:
        """The segment that the entry names is lost."""
        if self.lookup(key) is not None:
            self.fragments -= 1
            self.overlay.fragments[key] = None

    def touch(self, key: bytes, created_ms: int, sequence: int) -> Entry | None:
        entry = self.lookup(key)
        if entry is None or not entry.segment or entry.sequence > sequence:
            return None
        self._set(key, entry._replace(created_ms=max(created_ms, entry.created_ms)))
        return entry

    def retire(self, data_id: bytes, row: RetireRow) -> None:
        old = self.retired(data_id)
        if old is not None:
            if old.sequence > row.sequence:
                return
            self._live(old.segment, -old.record_bytes)
            row = msgspec.structs.replace(row, shadows=self._shadows(old.shadows, old.segment))
        self.overlay.retired[data_id] = row
        self._live(row.segment, row.record_bytes)

    def unretire(self, data_id: bytes, sequence: int) -> None:
        old = self.retired(data_id)
        if old is not None and old.sequence <= sequence:
            self.overlay.retired[data_id] = None
            self._live(old.segment, -old.record_bytes)

    def apply(self, segment: int, record_bytes: int, sequence: int, notes: Sequence[Note]) -> list[Entry]:
        """A record of notes is in the log. Returns the entries that it made garbage."""
        dropped: list[Entry] = []
        share = record_bytes // max(len(notes), 1)
        for note in notes:
            if isinstance(note, Delete):
                old = self.drop(note.id, sequence)
                if old is not None:
                    dropped.append(old)
                self.pin(segment, self.existing(note.targets), share)
            elif isinstance(note, Touch):
                touched = self.touch(note.id, note.created_ms, sequence)
                if touched is not None:
                    self.pin(segment, (touched.segment,), share)
            elif isinstance(note, Retire):
                self.retire(note.data_id, RetireRow(note.owner, note.due_ms, segment, share, sequence))
            else:
                self.unretire(note.data_id, sequence)
                self.pin(segment, self.existing(note.targets), share)
        return dropped

    def pin(self, segment: int, targets: tuple[int, ...], count: int) -> None:
        """``count`` bytes of notes in ``segment`` are needed as long as the target segments exist."""
        pins = self._changed(segment).pins
        for target in targets:
            if target != segment:
                pins[target] = pins.get(target, 0) + count
                self.pinned_bytes += count

    def remove_segment(self, segment: int) -> None:
        """Its file is gone: what pinned notes elsewhere pins them no longer."""
        self._segments_dirty.add(segment)
        self.idle.discard(segment)
        gone = self.segments.pop(segment, None)
        if gone is not None:
            self._count(gone, -1)
        for number, use in self.segments.items():
            released = use.pins.pop(segment, 0)
            if released:
                self.pinned_bytes -= released
                self._segments_dirty.add(number)
                self._idle(number, use)

    def _count(self, use: SegmentUse, sign: int) -> None:
        self.held_bytes += sign * use.held
        self.live_bytes += sign * use.live
        self.pinned_bytes += sign * sum(use.pins.values())

    def existing(self, targets: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({target for target in targets if target in self.segments}))

    def _set(self, key: bytes, entry: Entry) -> None:
        overlay = self.overlay
        overlay.fragments[key] = entry
        if key[20] == 1 and key[16:20] == b"\0\0\0\0":
            overlay.copies[key[:16]] = key

    def _live(self, segment: int, count: int) -> None:
        if segment in self.segments:
            use = self._changed(segment)
            use.live += count
            self.live_bytes += count
            if count < 0:
                self._idle(segment, use)

    def _shadows(self, known: tuple[int, ...], segment: int) -> tuple[int, ...]:
        return self.existing((*known, segment))

    def _heal(self, key: bytes) -> None:
        if key in self.damaged:
            with self._damage_lock:
                self.damaged.pop(key, None)
                self._damage_dirty.add(key)

    # --- checkpoints
    # ----------------------------------------------------------------------------------------------------------

    def freeze(self, position: Position, dead: tuple[int, ...]) -> Checkpoint:
        """Begins a checkpoint: everything so far is in the log before ``position``, and durable there. By the owner;
        one at a time.
        """
        assert self.frozen is None
        overlay = self.frozen = self.overlay
        self.overlay = Overlay()
        with self._damage_lock:
            damaged = {key: self.damaged.get(key, frozenset()) for key in self._damage_dirty}
            self._damage_dirty = set()
        rows: dict[int, bytes] = {}
        for number in self._segments_dirty:
            use = self.segments.get(number)
            rows[number] = (
                b"" if use is None else encode(SegmentRow(use.end, use.live, use.punched, tuple(use.pins.items())))
            )
        self._segments_dirty = set()
        row = CheckpointRow(
            INDEX_VERSION, self.disk_id, position.segment, position.offset, self.sequence, self.fragments
        )
        return Checkpoint(overlay, row, rows, damaged, dead)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Writes it, synced. From any one thread. Raises lmdb.Error."""
        with self._env.begin(write=True) as txn:
            _write_fragments(txn, self._db["fragments"], checkpoint.overlay.fragments)
            self._write_retired(txn, checkpoint.overlay.retired)
            for number, raw in checkpoint.segments.items():
                if raw:
                    txn.put(number.to_bytes(8, "big"), raw, db=self._db["segments"])
                else:
                    txn.delete(number.to_bytes(8, "big"), db=self._db["segments"])
            for key, cells in checkpoint.damaged.items():
                if cells:
                    txn.put(key, encode(tuple(cells)), db=self._db["damaged"])
                else:
                    txn.delete(key, db=self._db["damaged"])
            txn.put(b"checkpoint", encode(checkpoint.row), db=self._db["meta"])

    def thaw(self, checkpoint: Checkpoint) -> None:
        """The commit is durable. By the owner."""
        self.checkpoint = Position(checkpoint.row.segment, checkpoint.row.offset)
        self.frozen = None

    def _write_retired(self, txn: Any, rows: dict[bytes, RetireRow | None]) -> None:
        for data_id, row in rows.items():
            old = txn.get(data_id, db=self._db["retired"])
            if old is not None:
                txn.delete(decode(old, RetireRow).due_ms.to_bytes(8, "big") + data_id, db=self._db["due"])
                txn.delete(data_id, db=self._db["retired"])
            if row is not None:
                txn.put(data_id, encode(row), db=self._db["retired"])
                txn.put(row.due_ms.to_bytes(8, "big") + data_id, b"", db=self._db["due"])

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        """All fragments in key order, in slices of one short snapshot each."""
        after = b""
        while keys := self.keys(after, 1000):
            for key in keys:
                entry = self.lookup(key)
                if entry is not None:
                    yield key, entry
            after = keys[-1]

    def close(self) -> None:
        self._env.close()


def _write_fragments(txn: Any, db: Any, entries: dict[bytes, Entry | None]) -> None:
    put: list[tuple[bytes, bytes]] = []
    for key in sorted(entries):
        entry = entries[key]
        if entry is None:
            txn.delete(key, db=db)
        else:
            put.append((key, pack_entry(key, entry)))
    with txn.cursor(db=db) as cursor:
        cursor.putmulti(put)
