"""Where every fragment of a disk is: an LMDB environment, and in memory what is newer than its last checkpoint.

Theory of operation. The segments are the truth, the index is derived from them. A change goes to the overlay (a dict).
A checkpoint writes the overlay to LMDB in one synced transaction, along with the position up to which the log is
covered. After a crash the log is replayed from that position, so an acknowledged write costs one fdatasync, the log's.
At most two overlays exist: the one that is filled, and the frozen one that a checkpoint is writing. A lookup asks them
in that order, then LMDB.

The sequence number decides which record of a fragment counts: the highest wins, be it a fragment or a note that deletes
it. A copy that compaction made has its original's number; the later place wins. For every fragment the index knows its
``shadows``: the other segments in which older records of it lie. The note that deletes the fragment one day names them,
for it must be kept as long as they exist.

A reader takes the overlay first and the frozen one after it, because a freeze fills the second before it empties the
first. Only the owner changes the index (the thread that holds the engine, or recovery). ``lookup``, ``keys``, ``due``,
``find_copy`` and the damage list may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from storaged.durable import make_directory
from storaged.errors import DiskForeign, DiskUnusable, IndexDamaged
from storaged.fragments.accounts import SegmentAccounts
from storaged.fragments.damage import DamageList
from storaged.fragments.entry import BROKEN, Entry, pack_entry, unpack_entry
from storaged.fragments.format import KEY_BYTES, Delete, Note, Retire, Touch
from storaged.fragments.index_rows import Checkpoint, CheckpointRow, Overlay, Position, RetireRow, SegmentRow
from storaged.fragments.ports import Retirement
from storaged.lmdb_file import LMDB_DAMAGED, MEDIA_ERRORS, Residency, lacks_space, open_environment
from storaged.units import GIB
from storaged.wire import decode, encode

INDEX_VERSION = 2
"""Version 1 knew one form of an entry only. An index of version 1 is read; its next checkpoint makes it version 2, so
that a program that knows no other form refuses it.
"""

WHOLE_COPY = b"\0\0\0\0\x01"
"""What follows the data id in the key of a whole copy: block 0, k = 1."""


class Index:
    """One disk's index. Raises IndexDamaged when LMDB finds damage, DiskForeign when it is another disk's, DiskUnusable
    when it can't be opened for want of room, or for another reason that says nothing of its bytes.

    ``disk_id``: empty for that of the index itself; it has none before its first checkpoint.
    ``checkpoint``: the log is covered up to there. ``sequence``: the highest number in use. ``fragments``: how many.
    """

    def __init__(self, directory: Path, disk_id: str, *, map_bytes_max: int = 64 * GIB, durable: bool = True) -> None:
        if durable:
            make_directory(directory)
        else:
            directory.mkdir(parents=True, exist_ok=True)
        self.disk_id = disk_id
        self.directory = directory
        self.in_memory = True
        """Whether lookups need no disk, as far as ``look`` knows."""
        self.overlay = Overlay()
        self.frozen: Overlay | None = None
        self.accounts = SegmentAccounts()
        try:
            self._env = open_environment(directory, map_size=map_bytes_max, max_dbs=6, sync=durable, max_readers=512)
            with self._env.begin(write=True) as txn:
                self._db = {
                    name: self._env.open_db(name.encode(), txn=txn)
                    for name in ("fragments", "segments", "retired", "due", "damaged", "meta")
                }
            self._load()
            self._residency = Residency(self._env, directory)
        except lmdb.Error as error:
            raise refused(directory, error) from error
        except msgspec.MsgspecError as error:
            raise IndexDamaged(f"the fragment index in {directory} cannot be read: {error}") from error

    def _load(self) -> None:
        with self._env.begin() as txn:
            raw = txn.get(b"checkpoint", db=self._db["meta"])
            row = CheckpointRow(INDEX_VERSION, self.disk_id, 0, 0, 0, 0)
            if raw is not None:
                row = decode(raw, CheckpointRow)
            segments = {
                int.from_bytes(key, "big"): decode(value, SegmentRow)
                for key, value in txn.cursor(db=self._db["segments"])
            }
            self.damage = DamageList(
                {
                    bytes(key): frozenset(decode(value, tuple[int, ...]))
                    for key, value in txn.cursor(db=self._db["damaged"])
                }
            )
        self.disk_id = self.disk_id or row.disk_id
        if row.disk_id != self.disk_id:
            raise DiskForeign(f"the fragment index belongs to disk {row.disk_id}, not to {self.disk_id}")
        if not 1 <= row.version <= INDEX_VERSION:
            raise IndexDamaged(f"the fragment index has version {row.version}, this program knows {INDEX_VERSION}")
        for number, found in segments.items():
            self.accounts.load(number, found)
        self.checkpoint = Position(row.segment, row.offset)
        self.sequence = row.sequence
        self.fragments = row.fragments

    def look(self) -> None:
        """Finds out whether LMDB's pages are in memory. In a thread, again and again: it may read them from the
        disk.
        """
        self._residency.look()
        self.in_memory = self._residency.resident

    # --- lookups, from any thread; each may raise DiskUnusable ------------------------------------------------------

    def lookup(self, key: bytes) -> Entry | None:
        """The fragment's entry; None when the disk does not have it, BROKEN when the entry itself is damaged."""
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
        except LMDB_DAMAGED:
            return BROKEN
        except lmdb.PanicError as error:
            raise self._unusable(error) from error

    def lookup_all(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """As ``lookup`` of each, in one snapshot. Every call into LMDB gives the interpreter away, and a busy one takes
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
        except (*LMDB_DAMAGED, lmdb.PanicError):
            return [self.lookup(key) for key in keys]
        return found

    def find_copy(self, data_id: bytes) -> bytes | None:
        """The key of a data id's whole copy (block 0, k = 1), whatever its m and position."""
        try:
            found = self._copy(data_id)
        except lmdb.PanicError as error:
            raise self._unusable(error) from error
        return found[0] if found is not None else None

    def copy_entry(self, data_id: bytes) -> tuple[bytes, Entry] | None:
        """As ``find_copy``, with the entry; None when LMDB can't be read, which the read that follows reports."""
        overlay = self.overlay
        key = overlay.copies.get(data_id)
        if key is not None and (entry := overlay.fragments.get(key)) is not None:
            return key, entry
        try:
            return self._copy(data_id)
        except (*LMDB_DAMAGED, lmdb.PanicError, DiskUnusable):
            return None

    def _copy(self, data_id: bytes) -> tuple[bytes, Entry] | None:
        overlay, frozen = self.overlay, self.frozen
        for newer in (overlay, frozen):
            known = newer.copies.get(data_id) if newer is not None else None
            if known is not None and (entry := self.lookup(known)) is not None:
                return known, entry
        prefix = data_id + WHOLE_COPY
        with self._env.begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
            more = cursor.set_range(prefix)
            while more:
                key, value = cursor.item()
                if not key.startswith(prefix):
                    break
                entry = overlay.fragments.get(key, BROKEN)
                if entry is BROKEN and frozen is not None:
                    entry = frozen.fragments.get(key, BROKEN)
                if entry is BROKEN:
                    entry = unpack_entry(key, value)
                if entry is not None:
                    return key, entry
                more = cursor.next()
        return None

    def keys_of(self, data_ids: Collection[bytes]) -> set[bytes]:
        """The keys of all fragments of these data ids."""
        overlay, frozen = self.overlay, self.frozen
        keys = {key for data_id in data_ids for key in self._stored_keys(data_id)}
        for newer in (frozen, overlay):
            if newer is not None:
                keys.update(key for key in newer.fragments.copy() if key[:16] in data_ids)
        return {key for key in keys if self.lookup(key) is not None}

    def _stored_keys(self, prefix: bytes) -> list[bytes]:
        """The keys in LMDB with this prefix, whatever the overlays say of them."""
        found: list[bytes] = []
        with self._begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
            more = cursor.set_range(prefix)
            while more and cursor.key().startswith(prefix):
                found.append(cursor.key())
                more = cursor.next()
        return found

    def keys(self, after: bytes, limit: int) -> list[bytes]:
        """The next ``limit`` keys after ``after`` in order, from one short snapshot."""
        overlay, frozen = self.overlay, self.frozen
        newer = dict(frozen.fragments) if frozen is not None else {}
        newer.update(overlay.fragments.copy())
        found: list[bytes] = []
        with self._begin() as txn, txn.cursor(db=self._db["fragments"]) as cursor:
            more = cursor.set_range(after)
            while more and len(found) < limit:
                key = cursor.key()
                if key > after and key not in newer:
                    found.append(key)
                more = cursor.next()
        end = found[-1] if len(found) == limit else b"\xff" * (KEY_BYTES + 1)
        found.extend(key for key, entry in newer.items() if entry is not None and after < key <= end)
        return sorted(found)[:limit]

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        """All fragments in key order, in slices of one short snapshot each."""
        after = b""
        while keys := self.keys(after, 1000):
            for key in keys:
                entry = self.lookup(key)
                if entry is not None:
                    yield key, entry
            after = keys[-1]

    def retired(self, data_id: bytes) -> RetireRow | None:
        """The data id's entry of the garbage list."""
        for overlay in (self.overlay, self.frozen):
            if overlay is not None and data_id in overlay.retired:
                return overlay.retired[data_id]
        with self._begin() as txn:
            value = txn.get(data_id, db=self._db["retired"])
            return None if value is None else decode(value, RetireRow)

    def due(self, now_ms: int, limit: int, after: tuple[int, bytes] = (0, b"")) -> list[Retirement]:
        """What is on the garbage list and due, the longest due first, after the entry with this time and data id."""
        overlay, frozen = self.overlay, self.frozen
        newer = dict(frozen.retired) if frozen is not None else {}
        newer.update(overlay.retired.copy())
        found = [
            Retirement(data_id, row.owner, row.due_ms, row.origin)
            for data_id, row in newer.items()
            if row is not None and row.due_ms <= now_ms and (row.due_ms, data_id) > after
        ]
        count = 0
        with self._begin() as txn:
            cursor = txn.cursor(db=self._db["due"])
            cursor.set_range(after[0].to_bytes(8, "big") + after[1])
            for key in cursor.iternext(values=False):
                due_ms, data_id = int.from_bytes(key[:8], "big"), key[8:]
                if due_ms > now_ms or count == limit:
                    break
                value = txn.get(data_id, db=self._db["retired"])
                if data_id not in newer and value is not None and (due_ms, data_id) > after:
                    row = decode(value, RetireRow)
                    found.append(Retirement(data_id, row.owner, due_ms, row.origin))
                    count += 1
        return sorted(found, key=lambda entry: (entry.due_ms, entry.data_id))[:limit]

    def _begin(self) -> Any:
        """A transaction that reads."""
        try:
            return self._env.begin()
        except lmdb.PanicError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: lmdb.PanicError) -> DiskUnusable:
        """LMDB takes and reads nothing more after it could not write its first pages."""
        return DiskUnusable(f"the fragment index in {self.directory} can't be read before a restart: {error}")

    # --- changes, by the owner --------------------------------------------------------------------------------------

    def put(self, key: bytes, entry: Entry) -> Entry | None:
        """A record of this fragment is in the log. Returns the entry that it replaced. A record older than the known
        one is only added to its shadows.
        """
        return self.replace(key, self.lookup(key), entry)

    def replace(self, key: bytes, old: Entry | None, entry: Entry) -> Entry | None:
        """As ``put``, for a caller that has looked up ``old``, the known entry."""
        accounts = self.accounts
        if old is not None and old.segment:
            if old.sequence > entry.sequence:
                self._set(key, old._replace(shadows=accounts.existing((*old.shadows, entry.segment))))
                return None
            accounts.add_live(old.segment, -old.record_bytes)
            entry = entry._replace(shadows=accounts.existing((*old.shadows, *entry.shadows, old.segment)))
        if old is None:
            self.fragments += 1
        self._set(key, entry)
        accounts.add_live(entry.segment, entry.record_bytes)
        if old is not None and old.sequence != entry.sequence:
            self.damage.discard(key)
        return old

    def _set(self, key: bytes, entry: Entry) -> None:
        overlay = self.overlay
        overlay.fragments[key] = entry
        if key[20] == 1 and key[16:20] == b"\0\0\0\0":
            overlay.copies[key[:16]] = key

    def drop(self, key: bytes, sequence: int) -> Entry | None:
        """A note says that records of this fragment up to ``sequence`` are gone. Returns the entry, if there was
        one.
        """
        old = self.lookup(key)
        if old is None or old.sequence > sequence:
            return None
        self.fragments -= 1
        self.overlay.fragments[key] = None
        self.accounts.add_live(old.segment, -old.record_bytes)
        self.damage.discard(key)
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
            self.accounts.add_live(old.segment, -old.record_bytes)
            row = msgspec.structs.replace(row, shadows=self.accounts.existing((*old.shadows, old.segment)))
        self.overlay.retired[data_id] = row
        self.accounts.add_live(row.segment, row.record_bytes)

    def unretire(self, data_id: bytes, sequence: int) -> None:
        old = self.retired(data_id)
        if old is not None and old.sequence <= sequence:
            self.overlay.retired[data_id] = None
            self.accounts.add_live(old.segment, -old.record_bytes)

    def apply_notes(self, segment: int, record_bytes: int, sequence: int, notes: Sequence[Note]) -> list[Entry]:
        """A record of notes is in the log. Returns the entries that it made garbage."""
        dropped: list[Entry] = []
        share = record_bytes // max(len(notes), 1)
        for note in notes:
            if isinstance(note, Delete):
                old = self.drop(note.id, sequence)
                if old is not None:
                    dropped.append(old)
                self._pin(segment, note.targets, share)
            elif isinstance(note, Touch):
                touched = self.touch(note.id, note.created_ms, sequence)
                if touched is not None:
                    self.accounts.pin(segment, (touched.segment,), share)
            elif isinstance(note, Retire):
                row = RetireRow(note.owner, note.due_ms, segment, share, sequence, origin=note.origin)
                self.retire(note.data_id, row)
            else:
                self.unretire(note.data_id, sequence)
                self._pin(segment, note.targets, share)
        return dropped

    def _pin(self, segment: int, targets: Iterable[int], count: int) -> None:
        self.accounts.pin(segment, self.accounts.existing(targets), count)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def freeze(self, position: Position, dead: tuple[int, ...]) -> Checkpoint:
        """Begins a checkpoint: everything so far is in the log before ``position``, and durable there. By the owner;
        one at a time.
        """
        assert self.frozen is None
        overlay = self.frozen = self.overlay
        self.overlay = Overlay()
        row = CheckpointRow(
            INDEX_VERSION, self.disk_id, position.segment, position.offset, self.sequence, self.fragments
        )
        return Checkpoint(overlay, row, self.accounts.take_changes(), self.damage.take_changes(), dead)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Writes it, synced. From any one thread. Raises lmdb.Error."""
        with self._env.begin(write=True) as txn:
            _write_fragments(txn, self._db["fragments"], checkpoint.overlay.fragments)
            self._write_retired(txn, checkpoint.overlay.retired)
            for number, raw in checkpoint.segments.items():
                _put_or_delete(txn, self._db["segments"], number.to_bytes(8, "big"), raw)
            for key, cells in checkpoint.damaged.items():
                _put_or_delete(txn, self._db["damaged"], key, encode(tuple(cells)) if cells else b"")
            txn.put(b"checkpoint", encode(checkpoint.row), db=self._db["meta"])

    def thaw(self, checkpoint: Checkpoint) -> None:
        """The commit is durable. By the owner."""
        self.checkpoint = Position(checkpoint.row.segment, checkpoint.row.offset)
        self.frozen = None

    def checkpoint_now(self, position: Position) -> None:
        """A whole checkpoint in this thread, while nothing else uses the index. Raises DiskUnusable."""
        checkpoint = self.freeze(position, ())
        try:
            self.commit(checkpoint)
        except lmdb.Error as error:
            raise DiskUnusable(f"the fragment index in {self.directory} can't be written: {error}") from error
        self.thaw(checkpoint)

    def _write_retired(self, txn: Any, rows: dict[bytes, RetireRow | None]) -> None:
        for data_id, row in rows.items():
            old = txn.get(data_id, db=self._db["retired"])
            if old is not None:
                txn.delete(decode(old, RetireRow).due_ms.to_bytes(8, "big") + data_id, db=self._db["due"])
                txn.delete(data_id, db=self._db["retired"])
            if row is not None:
                txn.put(data_id, encode(row), db=self._db["retired"])
                txn.put(row.due_ms.to_bytes(8, "big") + data_id, b"", db=self._db["due"])

    def close(self) -> None:
        self._residency.close()
        self._env.close()


def refused(directory: Path, error: lmdb.Error) -> DiskUnusable | IndexDamaged:
    """The error for an index that LMDB can't open or read. It is damaged only where LMDB or the drive says so. An
    index that finds no room, memory or permission is whole, and a new one would need the same.
    """
    if lacks_space(directory, error):
        return DiskUnusable(
            f"the disk is full: it has no room for the fragment index in {directory}: {error}", state="full"
        )
    code = getattr(error, "code", None) or 0  # LMDB's own are negative
    if code > 0 and code not in MEDIA_ERRORS:
        return DiskUnusable(f"the fragment index in {directory} can't be opened: {error}", state="failed")
    return IndexDamaged(f"the fragment index in {directory} cannot be read: {error}")


def _put_or_delete(txn: Any, db: Any, key: bytes, value: bytes) -> None:
    """An empty value deletes the key."""
    if value:
        txn.put(key, value, db=db)
    else:
        txn.delete(key, db=db)


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
