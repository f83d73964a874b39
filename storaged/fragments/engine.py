"""One disk's segment log and index, without threads or event loop: what is done to the disk, and in which order.

One thread at a time calls this: the store's writer thread or its event loop, a simulation, an offline tool. The
exceptions: any thread may use ``reader`` and ``log.sync_apart``, and one other thread may run ``commit``.

Theory of operation. ``append`` and ``note`` put records at the end of the log and then change the index's overlay.
``log.sync`` makes all of them durable by one fdatasync. ``freeze``, ``commit`` and ``thaw`` are the three steps of a
checkpoint; segments that hold nothing that counts are removed by the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lmdb
import msgspec

from storaged.errors import (
    DiskUnusable,
    FragmentDamaged,
    FragmentMissing,
    FragmentOther,
    IndexDamaged,
    OperatorError,
    StoragedError,
)
from storaged.fragments import recovery
from storaged.fragments.condemned import DATA_ID_BYTES, Condemned
from storaged.fragments.disk_state import DiskState
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files
from storaged.fragments.format import (
    HOLE_BYTES_MIN,
    PAGE,
    Delete,
    FormatUnknown,
    Note,
    Placed,
    RecordWriter,
    Retire,
    Touch,
    Unretire,
    cell_sums,
    encode_notes,
)
from storaged.fragments.index import Index, refused
from storaged.fragments.index_rows import Checkpoint, Position
from storaged.fragments.limits import StoreLimits
from storaged.fragments.log import SegmentLog
from storaged.fragments.ports import CELLS_MAX, FragmentId, Retirement, Usage
from storaged.fragments.reader import Reader
from storaged.fragments.write import Write
from storaged.lmdb_file import lacks_space

TRY_APPEND_CELLS_MAX = 4096
"""Their sums take 2 ms. The sender of a fragment says how large its cells are."""


@dataclass(frozen=True)
class Hole:
    """Garbage that may be punched once what made it garbage is durable: when ``after`` is synced."""

    segment: int
    offset: int
    length: int
    after: Position


class Engine:
    """Opens with ``recover``."""

    def __init__(
        self,
        files: Files,
        index: Index,
        limits: StoreLimits,
        *,
        now_ms: Callable[[], int],
        on_damage: Callable[[bytes, int], None],
    ) -> None:
        self.files = files
        self.index = index
        self.limits = limits
        self.state = DiskState(files, limits)
        self.log = SegmentLog(files, index, self.state, limits, now_ms)
        self.reader = Reader(index, self.log.segments, on_damage)
        self.compacting = 0
        """The segment that compaction reads; 0: none."""
        self.stuck: set[int] = set()
        """Segments that compaction can't empty: a record in them is damaged."""
        self.holes: deque[Hole] = deque()
        self.unwritten: Checkpoint | None = None
        """A checkpoint of ``recover`` that found no room on the disk. The owner commits and thaws it when there is
        room."""
        self.compacted_bytes = self.punched_bytes = 0
        self._checkpointed_bytes = 0

    # --- start and stop ---------------------------------------------------------------------------------------------

    def recover(
        self, progress: recovery.Progress | None = None, *, read_only: bool = False, failed_before: str = ""
    ) -> recovery.Report:
        """Replays what the last checkpoint does not cover, cuts a torn tail, and makes what it kept durable
        (``read_only``: neither).

        ``failed_before``: why the disk failed for good, as its owner has noted; used when the disk itself has no note.
        Raises DiskForeign when the segments are another disk's, OperatorError when a later version wrote them,
        DiskUnusable when the index can't be written for another reason than lack of space, or is not damaged and can't
        be read now, or the directory can't be synced, IndexDamaged when the index is damaged.
        """
        state = self.state
        state.failure = "opened for reading only" if read_only else self.files.failure() or failed_before
        try:
            report = recovery.replay(
                self.files,
                self.index,
                self.log.segments,
                read_only=bool(state.failure),
                spill=self._spill,
                progress=progress,
            )
        except FormatUnknown as error:
            raise OperatorError(
                f"This version cannot read the disk {self.index.disk_id}: {error}. Nothing was changed."
            ) from error
        except lmdb.Error as error:
            raise refused(self.index.directory, error) from error
        except msgspec.MsgspecError as error:  # of a row in the index: records with such a content are gaps
            raise IndexDamaged(f"the fragment index in {self.index.directory} cannot be read: {error}") from error
        self.index.sequence = max(self.index.sequence, report.sequence)
        if report.last >= self.index.checkpoint.segment:
            self.log.continue_at(Position(report.last, report.end))
        # Else the last segments are gone, and no replay would look for new records before the checkpoint: the next
        # record begins a segment after it.
        if report.failure and not state.failure:
            state.fail(report.failure)
        if state.failure:
            state.lost = True
            # what is in the page cache of a disk that failed need not be on the drive
            self.log.synced = Position(0, 0)
        else:
            state.hold_note_reserve()
        return report

    def _spill(self, position: Position) -> None:
        """Bounds the overlay during a long replay. A disk without room for that is full, and starts all the same."""
        if len(self.index.overlay) < self.limits.overlay_entries_max or self.state.failure or self.unwritten:
            return
        checkpoint = self.index.freeze(position, ())
        try:
            self.index.commit(checkpoint)
        except lmdb.Error as error:
            if not lacks_space(self.index.directory, error):
                raise DiskUnusable(f"the fragment index can't be written: {error}") from error
            self.unwritten = checkpoint
            self.state.starved = f"checkpoint of the fragment index: {error}"
        else:
            self.index.thaw(checkpoint)

    def close(self) -> None:
        """Writes a last mark and a checkpoint, so that the next start replays nothing and knows that nothing is
        torn.
        """
        if not self.state.failure and self.log.active and self.index.frozen is None:
            try:
                self.log.mark()
                checkpoint = self.freeze()
                self.commit(checkpoint)
                self.thaw(checkpoint)
            except (DiskUnusable, lmdb.Error, OSError):
                pass  # the next start replays the log, and says why the disk is read-only or its index damaged
        self.index.close()
        self.files.close()

    # --- fragments --------------------------------------------------------------------------------------------------

    def can_append_now(self, writes: Sequence[Write]) -> bool:
        """Whether ``append`` would take no long time, and wait for the disk only where the page cache does: the active
        segment has room, and the cells are few.
        """
        cells = sum([write.payload_bytes // write.header.cell_bytes for write in writes])
        return cells <= TRY_APPEND_CELLS_MAX and self.log.has_room(sum([write.room for write in writes]))

    def append(
        self, writes: Sequence[Write], *, into_reserve: bool = False, checked: bool = False
    ) -> list[StoragedError | None]:
        """Returns for each write None when it is in the log (not yet durable) and in the index, else the error.

        ``into_reserve``: these were acknowledged, so they may take the space that others leave free. ``checked``: they
        match their hashes.
        """
        refusal = None if into_reserve else self._refusal(writes)
        if refusal is not None:
            return [refusal] * len(writes)
        answers: list[StoragedError | None] = [None] * len(writes)
        pending: list[tuple[int, Write]] = []
        keys: set[bytes] = set()
        room = 0
        for place, write in enumerate(writes):
            if not checked and (mismatch := write.mismatch()) is not None:
                answers[place] = mismatch
                continue
            if write.key in keys or write.room > room:
                self._append_some(pending, answers)
                pending, keys = [], set()
                room = self.log.make_room(write.room)
            if write.spare_other and (other := self._other(write)) is not None:
                answers[place] = other
                continue
            if write.room > room:
                answers[place] = self.state.unusable()
                continue
            room -= write.room
            keys.add(write.key)
            pending.append((place, write))
        self._append_some(pending, answers)
        return answers

    def _other(self, write: Write) -> FragmentOther | None:
        """The error for a write that would replace a sound fragment by another one."""
        try:
            found = self.reader.read(write.key, 0, CELLS_MAX)
        except (FragmentMissing, FragmentDamaged):
            return None
        cells = [cell for cell in found.cells if cell is not None]
        if found.bad or write.may_replace(found.header, cells):
            return None
        return FragmentOther(f"the disk has another fragment {write.key.hex()}, which is sound; it stays")

    def _refusal(self, writes: Sequence[Write]) -> DiskUnusable | None:
        refusal = self.state.refusal(sum(write.payload_bytes + len(write.message) for write in writes))
        if refusal is None:
            self.state.hold_note_reserve()
        return refusal

    def _append_some(self, pending: list[tuple[int, Write]], answers: list[StoragedError | None]) -> None:
        """Appends distinct fragments for which the active segment has room, by one vectored write."""
        if not pending:
            return
        writer, index = self.log.writer(), self.index
        placed: list[tuple[Write, Placed, int]] = []
        sequence = index.sequence
        for _, write in pending:
            sequence += 1
            cell_bytes = write.header.cell_bytes
            sums = cell_sums(write.payload, cell_bytes)
            where = writer.fragment(write.message, sums, write.payload, write.payload_bytes, cell_bytes, sequence)
            placed.append((write, where, sequence))
        index.sequence = sequence
        error = self.log.write_out(writer)
        if error is not None:
            for place, _ in pending:
                answers[place] = error
            return
        known = index.lookup_all([write.key for _, write in pending])
        active = self.log.active
        for (write, (offset, record_bytes, payload_start), sequence), before in zip(placed, known, strict=True):
            header = write.header
            entry = Entry(
                active,
                offset,
                record_bytes,
                payload_start,
                write.payload_bytes,
                header.cell_bytes,
                sequence,
                header.created_ms,
            )
            old = index.replace(write.key, before, entry)
            if old is not None:
                self._queue_hole(old)

    def move(self, key: bytes, entry: Entry, message: bytes, sums: bytes, payload: bytes) -> StoragedError | None:
        """Compaction's copy of a live record: same sequence number, same cell sums whatever the cells are now."""
        log = self.log
        if not log.make_room(RecordWriter.bytes_max(len(message), len(payload), entry.cell_bytes)):
            return self.state.unusable()
        writer = log.writer()
        buffers = [payload] if payload else []
        where = writer.fragment(message, sums, buffers, len(payload), entry.cell_bytes, entry.sequence)
        error = log.write_out(writer)
        if error is None:
            self.compacted_bytes += where.record_bytes
            self.index.put(key, entry._replace(segment=log.active, shadows=(), **where._asdict()))
        return error

    # --- notes ------------------------------------------------------------------------------------------------------

    def note(self, notes: Sequence[Note], sequence: int = 0) -> StoragedError | None:
        """Appends notes in one record (``sequence`` only for compaction's copies). They may use the reserve."""
        state = self.state
        if state.failure:
            return state.unusable()
        message = encode_notes(notes)
        if not sequence:
            self.index.sequence += 1
            sequence = self.index.sequence
        placed = self._place_notes(message, sequence)
        if isinstance(placed, StoragedError) and not state.failure and state.release_note_reserve():
            placed = self._place_notes(message, sequence)
        if isinstance(placed, StoragedError):
            return placed
        for old in self.index.apply_notes(self.log.active, placed.record_bytes, sequence, notes):
            self._queue_hole(old)
        return None

    def _place_notes(self, message: bytes, sequence: int) -> Placed | StoragedError:
        """Writes them, into a new segment if need be."""
        if not self.log.make_room(RecordWriter.bytes_max(len(message), 0, 0)):
            return self.state.unusable()
        writer = self.log.writer()
        placed = writer.notes(message, sequence)
        return self.log.write_out(writer) or placed

    def _note_or_raise(self, notes: Sequence[Note]) -> None:
        if notes and (error := self.note(notes)) is not None:
            raise error

    def delete(self, keys: Sequence[bytes], created_ms: Sequence[int] = ()) -> int:
        """Returns how many there were (and, with ``created_ms``, were exactly as old). A data id whose last fragment
        goes is taken off the garbage list. Raises DiskUnusable.
        """
        found: dict[bytes, Entry] = {}
        for place, key in enumerate(keys):
            entry = self.index.lookup(key)
            if entry is not None and (not created_ms or entry.created_ms == created_ms[place]):
                found[key] = entry
        existing = self.index.accounts.existing
        notes: list[Note] = [Delete(key, existing((entry.segment, *entry.shadows))) for key, entry in found.items()]
        listed = {data_id for data_id in {key[:16] for key in found} if self.index.retired(data_id) is not None}
        if listed:
            listed -= {key[:16] for key in self.index.keys_of(listed) - found.keys()}
            for data_id in sorted(listed):
                notes.extend(self._unretire_notes(data_id))
        self._note_or_raise(notes)
        return len(found)

    def touch(self, keys: Sequence[bytes], created_ms: int) -> None:
        """Renews the age of those that are there. Raises DiskUnusable."""
        entries = [(key, self.index.lookup(key)) for key in keys]
        self._note_or_raise(
            [Touch(key, max(created_ms, entry.created_ms + 1)) for key, entry in entries if entry is not None]
        )

    def retire(self, entries: Sequence[Retirement]) -> None:
        """An entry that is on the list already keeps its delay, which has begun, and its owner. Where nothing was known
        of the data, its origin becomes that of the new entry. Raises DiskUnusable.
        """
        fresh: dict[bytes, Retire] = {}
        for data_id, owner, due_ms, origin in entries:
            known = fresh.get(data_id) or self.index.retired(data_id)
            if known is None:
                fresh[data_id] = Retire(data_id, owner, due_ms, origin)
            elif origin and not known.origin and owner == known.owner:
                fresh[data_id] = Retire(data_id, owner, known.due_ms, origin)
        self._note_or_raise(list(fresh.values()))

    def delete_condemned(self, keys: Sequence[bytes], condemned: Condemned) -> int:
        """Deletes those whose data ids are still condemned. Raises DiskUnusable."""
        taken = condemned.take({key[:DATA_ID_BYTES] for key in keys})
        try:
            return self.delete([key for key in keys if key[:DATA_ID_BYTES] in taken])
        finally:
            condemned.gone(taken)

    def unretire(self, data_id: bytes) -> None:
        """Raises DiskUnusable."""
        self._note_or_raise(self._unretire_notes(data_id))

    def _unretire_notes(self, data_id: bytes) -> list[Note]:
        row = self.index.retired(data_id)
        if row is None:
            return []
        return [Unretire(data_id, self.index.accounts.existing((row.segment, *row.shadows)))]

    # --- checkpoints and space --------------------------------------------------------------------------------------

    def holds_copy(self, data_id: bytes, was_durable: bool) -> bool:
        """Whether the disk has the whole copy of a data id, not known to be damaged; and it is synced, or was durable
        before.
        """
        found = self.index.copy_entry(data_id)
        if found is None or found[0] in self.index.damage or found[1].segment not in self.log.segments:
            return False
        return was_durable or self._is_synced(found[1])

    def is_durable(self, fragment: FragmentId) -> bool:
        """True for one that is not there."""
        entry = self.index.lookup(fragment.pack())
        return entry is None or self._is_synced(entry)

    def _is_synced(self, entry: Entry) -> bool:
        return Position(entry.segment, entry.offset + entry.record_bytes) <= self.log.synced

    def usage(self) -> Usage:
        state, spare_bytes = self.state.describe()
        accounts = self.index.accounts
        return Usage(
            state,
            accounts.held_bytes,
            spare_bytes,
            self.index.fragments,
            accounts.garbage_bytes,
            self.state.failure,
        )

    def checkpoint_due(self) -> bool:
        if self.index.frozen is not None or self.state.failure:
            return False
        log_bytes = self.log.appended_bytes - self._checkpointed_bytes
        full = len(self.index.overlay) >= self.limits.overlay_entries_max or log_bytes >= self.limits.replay_bytes_max
        return full or bool(self.dead_segments())

    def dead_segments(self) -> tuple[int, ...]:
        """Sealed segments that hold nothing that counts."""
        accounts, log = self.index.accounts, self.log
        idle = [
            number for number in accounts.idle if number not in (log.active, self.compacting) and number in log.segments
        ]
        return tuple(
            number for number in idle if accounts.segments[number].live <= 0 and not accounts.segments[number].pins
        )

    def freeze(self) -> Checkpoint:
        """Begins a checkpoint of everything so far. Raises DiskUnusable."""
        self.log.sync()
        self._checkpointed_bytes = self.log.appended_bytes
        return self.index.freeze(max(self.log.end, self.index.checkpoint), self.dead_segments())

    def commit(self, checkpoint: Checkpoint) -> None:
        """May run in another thread, beside everything else but a second one. Raises lmdb.Error."""
        self.index.commit(checkpoint)

    def thaw(self, checkpoint: Checkpoint) -> None:
        """The commit is durable: segments that were dead before it can go. Raises OSError."""
        self.index.thaw(checkpoint)
        for number in checkpoint.dead:
            if self.log.remove(number):
                self.index.accounts.remove(number)
                self.stuck.discard(number)

    def _queue_hole(self, old: Entry) -> None:
        """Remembers the whole pages of a payload that became garbage."""
        if (
            old.payload_bytes >= HOLE_BYTES_MIN
            and len(self.holes) < self.limits.punch_queue_max
            and old.segment in self.log.segments
        ):
            start = -(-(old.offset + old.payload_start) // PAGE) * PAGE
            length = (old.offset + old.payload_start + old.payload_bytes - start) // PAGE * PAGE
            if length > 0:
                self.holes.append(Hole(old.segment, start, length, self.log.end))

    @property
    def can_punch(self) -> bool:
        return bool(self.holes) and self.holes[0].after <= self.log.synced

    def punch(self) -> bool:
        """Gives the pages of one dead payload back to the file system; False when there is none whose death is
        durable.
        """
        if not self.can_punch:
            return False
        hole = self.holes.popleft()
        file = self.log.segments.get(hole.segment)
        try:
            if file is not None and file.punch(hole.offset, hole.length):
                self.index.accounts.punch(hole.segment, hole.length)
                self.punched_bytes += hole.length
        except OSError:
            pass  # the bytes stay garbage, compaction gets them back
        return True
