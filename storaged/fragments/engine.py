"""One disk's segment log and index, without threads or event loop: what is done to the disk, and in which order.

Everything here is called from one thread at a time (the store's writer thread, or its event loop; a simulation; an
offline tool), but ``reader`` and ``sync_apart``, which any
thread may use, and ``commit``, which one other thread may run beside it.

Theory of operation. ``append`` and ``note`` put records at the end of the active segment and then change the index's
overlay; ``sync`` makes
all of them durable by one fdatasync. A fragment's place is its proof of durability: what lies before ``synced`` is
safe. When the active
segment is full it gets a last mark, is synced for good, and the next one is created, so only the last segment can have
a torn tail.

A write or sync that fails makes the disk read-only for ever: after a failed fsync the kernel has marked the pages
clean, and what a read returns
may not be on the drive (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020). Only a write that
found no
space is taken back, by cutting the segment to where it was.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lmdb
from msgspec import Struct

from storaged.errors import DiskUnusable, FragmentDamaged, OperatorError, PeerRefused, StoragedError
from storaged.fragments import recovery
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files, SegmentFile, Space
from storaged.fragments.format import (
    KEY_BYTES,
    LARGE,
    PAGE,
    PAYLOAD_BYTES_MAX,
    SEGMENT_BYTES_MAX,
    SEGMENT_HEADER_BYTES,
    Delete,
    FormatUnknown,
    Note,
    Placed,
    RecordWriter,
    Retire,
    SegmentHeader,
    Touch,
    Unretire,
    cell_sums,
    encode_notes,
    pack_segment_header,
    segment_seed,
)
from storaged.fragments.index import Checkpoint, Index, Position
from storaged.fragments.ports import FragmentHeader, Retirement, Usage
from storaged.fragments.reader import Reader
from storaged.hashes import is_fragment, quick_check
from storaged.units import MIB, format_size
from storaged.wire import encode

REFUSED_BYTES_MAX = MIB
"""A disk that refused writes stays full until so much more is free than its reserve (or what was refused, when that is
less): between the two it would take some
writes and refuse others, and the cluster would not know whether to count on it."""

AT_ONCE_CELLS_MAX = 4096
"""Their sums take 2 ms. Who sends a fragment says how large its cells are."""

TIME_MS_MAX = 1 << 63
"""The index has 64 bits for when a fragment was created or is due, and a touch adds to it."""


def check_time(time_ms: int) -> None:
    """Raises PeerRefused."""
    if not 0 <= time_ms <= TIME_MS_MAX:
        raise PeerRefused(f"{time_ms} ms; a time lies in 0..2^63", remote_code="BAD_REQUEST")


@dataclass(frozen=True)
class StoreLimits:
    """Sizes in bytes unless said otherwise.

    ``reserve_bytes`` None: 5% of the file system. A checkpoint is due after ``overlay_entries_max`` changes or
    ``replay_bytes_max`` of log: they
    bound memory and the time of a start. ``compact_garbage_part`` is the share of a segment's held bytes that makes it
    worth rewriting; ``compact_rest_s``
    after something changed the disk looks for such a segment.
    """

    segment_bytes: int = 256 * MIB
    reserve_bytes: int | None = None
    note_reserve_bytes: int = 4 * MIB
    overlay_entries_max: int = 16_384
    replay_bytes_max: int = 256 * MIB
    writeback_bytes: int = MIB
    compact_garbage_part: float = 0.5
    compact_bytes_per_s: int = 64 * MIB
    compact_step_bytes: int = MIB
    compact_rest_s: float = 2.0
    punch_queue_max: int = 65_536
    queue_bytes_max: int = 64 * MIB
    batch_bytes_max: int = 16 * MIB
    batch_writes_max: int = 512
    read_threads: int = 4


class Write(Struct):
    """A fragment to be appended, prepared where its caller runs."""

    key: bytes
    header: FragmentHeader
    message: bytes
    payload: list[memoryview]
    payload_bytes: int
    room: int
    """Bytes of the segment that its record takes at most."""
    check: bytes = b""
    """Compared with the payload in place of its hash: see ``ports.FragmentStore.write``."""

    @classmethod
    def of(
        cls,
        header: FragmentHeader,
        payload: Sequence[bytes | bytearray | memoryview],
        message: bytes = b"",
        check: bytes = b"",
    ) -> Write:
        """``message``: the header's encoding, where that is known. Raises PeerRefused (BAD_FRAGMENT) when header and
        payload contradict each other.
        """
        first = payload[0] if len(payload) == 1 else None
        if type(first) is memoryview and first.format == "B" and len(first) == first.nbytes > 0:
            views, count = [first], len(first)  # of a copy, mostly
        else:
            views = [memoryview(buffer).cast("B") for buffer in payload if len(buffer)]
            count = sum([len(view) for view in views])
        key = header.id
        if len(key) != KEY_BYTES:
            raise _not_a_fragment(f"a fragment id has {KEY_BYTES} bytes, not {len(key)}")
        if count != header.length:
            raise _not_a_fragment(f"the header announces {header.length} bytes, the payload has {count}")
        if not 1 <= header.cell_bytes <= PAYLOAD_BYTES_MAX or count > PAYLOAD_BYTES_MAX:
            raise _not_a_fragment(
                f"cells of {header.cell_bytes} and a payload of {count} bytes; both are limited to {PAYLOAD_BYTES_MAX}"
            )
        if not 0 <= header.created_ms <= TIME_MS_MAX:
            raise _not_a_fragment(f"it was created at {header.created_ms} ms; a time lies in 0..2^63")
        message = message or encode(header)
        return cls(
            key, header, message, views, count, RecordWriter.bytes_max(len(message), count, header.cell_bytes), check
        )

    def matches_hash(self) -> bool:
        """Whether the payload is what the block's hashes say it is (copies share one hash), or what was checked when it
        was hashed.
        """
        if self.check:
            return quick_check(self.payload) == self.check
        hashes, k, position = self.header.hashes, self.key[20], self.key[22]
        if not hashes:
            return True
        expected = hashes[0] if k == 1 and len(hashes) == 1 else hashes[position] if position < len(hashes) else b""
        return is_fragment(self.payload, expected)


def _not_a_fragment(reason: str) -> PeerRefused:
    return PeerRefused(f"not a fragment: {reason}", remote_code="BAD_FRAGMENT")


@dataclass(frozen=True)
class Hole:
    """Garbage that may be punched once what made it garbage is durable."""

    segment: int
    offset: int
    length: int
    after: Position


class Engine:
    """Opens with ``recover``. ``failure`` is the reason why the disk is read-only, empty while it is not."""

    def __init__(
        self,
        files: Files,
        index: Index,
        limits: StoreLimits,
        *,
        now_ms: Callable[[], int],
        on_damage: Callable[[bytes, int], None],
    ) -> None:
        assert SEGMENT_HEADER_BYTES < limits.segment_bytes <= SEGMENT_BYTES_MAX
        self.files = files
        self.index = index
        self.limits = limits
        self.failure = ""
        self.lost = False
        """It failed in a way that lasts: what it holds need not be on the drive, and counts as lost, now and after a
        restart.
        """
        self._marked = True
        """A start will know of that."""
        self.note_failed: Callable[[str], bool] = lambda _reason: False
        """Called with the reason in the thread that found a lasting failure, before it is noted on the disk: the owner
        keeps it on another one. Whether it did. It must
        not raise."""
        self.segments: dict[int, SegmentFile] = {}
        self.active = 0
        self.end = self.synced = Position(0, 0)
        self._synced_apart = Position(0, 0)
        self.compacting = 0
        self.stuck: set[int] = set()
        self.holes: deque[Hole] = deque()
        self.syncs = self.appended_bytes = self.compacted_bytes = self.punched_bytes = 0
        self.reader = Reader(index, self.segment, on_damage)
        self._now_ms = now_ms
        self._dirty_from = 0
        self._checkpointed_bytes = 0
        self._reserve_ready = False
        self._refused_bytes = 0
        self.spare_bytes = 0
        """That fragments might have taken when that was last looked at."""

    def segment(self, number: int) -> SegmentFile | None:
        return self.segments.get(number)

    # --- start and stop
    # ---------------------------------------------------------------------------------------------------

    def recover(
        self, progress: recovery.Progress | None = None, *, read_only: bool = False, failed_before: str = ""
    ) -> recovery.Report:
        """Replays what the last checkpoint does not cover, cuts a torn tail, and makes what it kept durable
        (``read_only``: neither).

        ``failed_before``: why the disk failed for good, as its owner knows, who is believed when the disk itself does
        not say so.
        Raises DiskForeign when the segments are another disk's, OperatorError when a later version wrote them.
        """
        self.failure = "opened for reading only" if read_only else self.files.failure() or failed_before
        try:
            report = recovery.replay(
                self.files, self.index, self.segments, read_only=bool(self.failure), spill=self._spill, progress=progress  # noqa: E501
            )  # fmt: skip
        except FormatUnknown as error:
            raise OperatorError(
                f"This version cannot read the disk {self.index.disk_id}: {error}. Nothing was changed."
            ) from error
        self.index.sequence = max(self.index.sequence, report.sequence)
        self.active = report.last
        self.end = self.synced = Position(report.last, report.end)
        self._dirty_from = report.end
        if report.failure and not self.failure:
            self.fail(report.failure)
        if self.failure:
            self.lost = True
            self.synced = Position(0, 0)  # what is in the page cache of a disk that failed need not be on the drive
        if not self.failure:
            self._reserve_ready = self.files.reserve(self.limits.note_reserve_bytes)
        return report

    def _spill(self, position: Position) -> None:
        """Bounds the overlay during a long replay."""
        if len(self.index.overlay) >= self.limits.overlay_entries_max and not self.failure:
            checkpoint = self.index.freeze(position, ())
            self.index.commit(checkpoint)
            self.index.thaw(checkpoint)

    def close(self) -> None:
        """A last mark and checkpoint, so that the next start replays nothing and knows that nothing is torn."""
        if not self.failure and self.active:
            try:
                self._mark()
                self.sync()
                checkpoint = self.freeze()
                self.commit(checkpoint)
                self.thaw(checkpoint)
            except (DiskUnusable, lmdb.Error, OSError):
                pass  # the next start replays the log, and says why the disk is read-only or its index damaged
        self.index.close()
        self.files.close()

    # --- appending
    # ----------------------------------------------------------------------------------------------------------

    def takes(self, writes: Sequence[Write]) -> bool:
        """Whether the active segment has room for them, so that ``append`` waits for no disk but where the page cache
        does, and takes no long time.
        """
        if sum([write.payload_bytes // write.header.cell_bytes for write in writes]) > AT_ONCE_CELLS_MAX:
            return False
        return self._has_room(writes)

    def _has_room(self, writes: Sequence[Write]) -> bool:
        need = sum([write.room for write in writes])
        return bool(self.active) and not self.failure and self.limits.segment_bytes - self.end.offset >= need

    def append(
        self, writes: Sequence[Write], *, into_reserve: bool = False, checked: bool = False
    ) -> list[StoragedError | None]:
        """One answer a write: None when it is in the log (not yet durable) and in the index, else why not. ``checked``:
        they match their hashes.
        """
        refusal = (
            None if into_reserve else self._refusal(sum(write.payload_bytes + len(write.message) for write in writes))
        )
        if refusal is not None:
            return [refusal] * len(writes)
        answers: list[StoragedError | None] = [None] * len(writes)
        if checked and self._has_room(writes) and len({write.key for write in writes}) == len(writes):
            self._append_some(list(enumerate(writes)), answers)
            return answers
        pending: list[tuple[int, Write]] = []
        keys: set[bytes] = set()
        room = 0
        for position, write in enumerate(writes):
            need = write.room
            if not checked and not write.matches_hash():
                answers[position] = FragmentDamaged(
                    f"the payload of {write.key.hex()} is not what the hashes in its header say; not written"
                )
                continue
            if write.key in keys or need > room:
                self._append_some(pending, answers)
                pending, keys = [], set()
                room = self._make_room(need)
            if need > room:
                answers[position] = self._unusable()
                continue
            room -= need
            keys.add(write.key)
            pending.append((position, write))
        self._append_some(pending, answers)
        return answers

    def _append_some(self, pending: list[tuple[int, Write]], answers: list[StoragedError | None]) -> None:
        """Of distinct fragments, for which the active segment has room."""
        if not pending:
            return
        writer, index = self._writer(), self.index
        placed: list[tuple[Write, Placed, int]] = []
        sequence = index.sequence
        for _, write in pending:
            sequence += 1
            cell_bytes = write.header.cell_bytes
            sums = cell_sums(write.payload, cell_bytes)
            where = writer.fragment(write.message, sums, write.payload, write.payload_bytes, cell_bytes, sequence)
            placed.append((write, where, sequence))
        index.sequence = sequence
        error = self._write_out(writer)
        if error is not None:
            for position, _ in pending:
                answers[position] = error
            return
        known = index.lookup_all([write.key for _, write in pending])  # the keys of a group are distinct
        active = self.active
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
                self._garbage(old)

    def move(self, key: bytes, entry: Entry, message: bytes, sums: bytes, payload: bytes) -> StoragedError | None:
        """Compaction's copy of a live record: same sequence number, same cell sums whatever the cells are now."""
        if self._make_room(RecordWriter.bytes_max(len(message), len(payload), entry.cell_bytes)) == 0:
            return self._unusable()
        writer = self._writer()
        where = writer.fragment(
            message, sums, [payload] if payload else [], len(payload), entry.cell_bytes, entry.sequence
        )
        error = self._write_out(writer)
        if error is None:
            self.compacted_bytes += where.record_bytes
            moved = entry._replace(
                segment=self.active,
                offset=where.offset,
                record_bytes=where.record_bytes,
                payload_start=where.payload_start,
                shadows=(),
            )
            self.index.put(key, moved)
        return error

    def note(self, notes: Sequence[Note], sequence: int = 0) -> StoragedError | None:
        """Appends notes in one record (``sequence`` only for compaction's copies). They may use the reserve."""
        if self.failure:
            return self._unusable()
        message = encode_notes(notes)
        if not sequence:
            self.index.sequence += 1
            sequence = self.index.sequence
        placed = self._place_notes(message, sequence)
        if isinstance(placed, StoragedError) and not self.failure and self._reserve_ready:
            self._reserve_ready = not self.files.reserve(0)
            placed = self._place_notes(message, sequence)
        if isinstance(placed, StoragedError):
            return placed
        for old in self.index.apply(self.active, placed.record_bytes, sequence, notes):
            self._garbage(old)
        return None

    def _place_notes(self, message: bytes, sequence: int) -> Placed | StoragedError:
        """Writes them, into a new segment if need be."""
        if not self._make_room(RecordWriter.bytes_max(len(message), 0, 0)):
            return self._unusable()
        writer = self._writer()
        placed = writer.notes(message, sequence)
        return self._write_out(writer) or placed

    def delete(self, keys: Sequence[bytes], created_ms: Sequence[int] = ()) -> int:
        """How many there were (and, with ``created_ms``, were as old as it says). Takes a data id whose last fragment
        goes off the garbage list. Raises DiskUnusable.
        """
        found: dict[bytes, Entry] = {}
        for index, key in enumerate(keys):
            entry = self.index.lookup(key)
            if entry is not None and (not created_ms or entry.created_ms == created_ms[index]):
                found[key] = entry
        notes: list[Note] = [
            Delete(key, self.index.existing((entry.segment, *entry.shadows))) for key, entry in found.items()
        ]  # fmt: skip
        listed = {data_id for data_id in {key[:16] for key in found} if self.index.retired(data_id) is not None}
        if listed:
            listed -= {key[:16] for key in self.index.of(listed) - found.keys()}
            for data_id in sorted(listed):
                notes.extend(self._unretire(data_id))
        if notes:
            self._raise(self.note(notes))
        return len(found)

    def touch(self, keys: Sequence[bytes], created_ms: int) -> None:
        entries = [(key, self.index.lookup(key)) for key in keys]
        notes: list[Note] = [
            Touch(key, max(created_ms, entry.created_ms + 1)) for key, entry in entries if entry is not None
        ]
        if notes:
            self._raise(self.note(notes))

    def retire(self, entries: Sequence[Retirement]) -> None:
        """An entry that is on the list already stays as it is: its delay has begun."""
        fresh: dict[bytes, Note] = {}
        for data_id, owner, due_ms in entries:
            if data_id not in fresh and self.index.retired(data_id) is None:
                fresh[data_id] = Retire(data_id, owner, due_ms)
        if fresh:
            self._raise(self.note(list(fresh.values())))

    def unretire(self, data_id: bytes) -> None:
        notes = self._unretire(data_id)
        if notes:
            self._raise(self.note(notes))

    def _unretire(self, data_id: bytes) -> list[Note]:
        row = self.index.retired(data_id)
        return [] if row is None else [Unretire(data_id, self.index.existing((row.segment, *row.shadows)))]

    def sync(self) -> None:
        """Everything appended so far is durable when it returns. Raises DiskUnusable."""
        if self.failure:
            raise self._unusable()
        if self.synced == self.end or not self.active:
            return
        try:
            self.segments[self.active].sync()
        except OSError as error:
            self.fail(f"fdatasync of segment {self.active}: {error.strerror or error}")
            raise self._unusable() from error
        self.syncs += 1
        self.synced = self.end

    def sync_apart(self) -> None:
        """As ``sync`` but for what ``synced`` says, and in any thread: through a descriptor of its own, so that the
        writer hears of a failure as well. What is
        not in the active segment was synced when that was begun. Also on a disk that takes no writes for a reason that
        a restart ends: it is believed then.
        Raises DiskUnusable on one that has failed for good where that could not be noted: a start would believe it."""
        end = self.end
        file = self.segments.get(end.segment)
        if file is None or self.lost:
            self._raise(None if self._marked else self._unusable())
            return
        try:
            file.sync_apart()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and end.segment != self.active:
                return  # sealed, emptied and removed meanwhile
            self.fail(f"fdatasync of segment {end.segment}: {error.strerror or error}")
            self._raise(None if self._marked else self._unusable())
        else:
            self._synced_apart = end

    # --- the active segment
    # ---------------------------------------------------------------------------------------------------

    def _writer(self) -> RecordWriter:
        synced = max(self.synced, self._synced_apart)
        border = synced.offset if synced.segment == self.active else 0
        return RecordWriter(self.end.offset, segment_seed(self.index.disk_id, self.active), border)

    def _write_out(self, writer: RecordWriter) -> StoragedError | None:
        """Writes and advances the end. ENOSPC is taken back; any other error is the disk's last."""
        file = self.segments[self.active]
        try:
            file.write(writer.buffers, writer.start)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.fail(f"write to segment {self.active}: {error.strerror or error}")
                return self._unusable()
            try:
                file.truncate(writer.start)
            except OSError as second:
                self.fail(
                    f"segment {self.active} could not be cut back after {error.strerror}: {second.strerror or second}"
                )
                return self._unusable()
            return self._unusable()
        self.end = Position(self.active, writer.end)
        self.appended_bytes += writer.end - writer.start
        self.index.grow(self.active, writer.end)
        return None

    @property
    def write_back_due(self) -> bool:
        return self.end.offset - self._dirty_from >= self.limits.writeback_bytes

    def write_back(self) -> None:
        """Has the kernel begin with what was written since it was told last, when that is much. It may wait for the
        disk.
        """
        if self.write_back_due:
            end = self.end.offset
            self.segments[self.active].start_writeback(self._dirty_from, end - self._dirty_from)
            self._dirty_from = end

    def _make_room(self, need: int) -> int:
        """Bytes that the active segment takes, a new one begun if need be; less than ``need`` only when the disk
        refused.
        """
        room = self.limits.segment_bytes - self.end.offset
        if self.active and (room >= need or self.end.offset == SEGMENT_HEADER_BYTES):
            return max(room, need)
        try:
            if self.active:
                self.sync()
            self._create(max((self.active, self.index.checkpoint.segment, *self.segments)) + 1)
        except DiskUnusable:
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.fail(f"a new segment could not be made: {error.strerror or error}")
            return 0
        return max(self.limits.segment_bytes - self.end.offset, need)

    def _create(self, number: int) -> None:
        """The segment exists durably, with its header, before the first record goes there."""
        file = self.files.create(number)
        try:
            file.write([pack_segment_header(SegmentHeader(self.index.disk_id, number, self._now_ms()))], 0)
            file.sync()
            self.files.sync_directory()
        except OSError:
            self.files.remove(number)
            raise
        self.segments[number] = file
        self.index.grow(number, SEGMENT_HEADER_BYTES)
        self.active = number
        self.end = self.synced = Position(number, SEGMENT_HEADER_BYTES)
        self._dirty_from = SEGMENT_HEADER_BYTES

    def _mark(self) -> None:
        """Says in the log itself that everything before was synced."""
        self.sync()
        writer = self._writer()
        writer.mark()
        self._raise(self._write_out(writer))

    # --- state
    # --------------------------------------------------------------------------------------------------------------------  # noqa: E501

    def _refusal(self, count: int) -> StoragedError | None:
        """Why new fragments are refused now, if they are."""
        refusal = self.refusal(count)
        if refusal is None and not self._reserve_ready:
            self._reserve_ready = self.files.reserve(self.limits.note_reserve_bytes)
        return refusal

    def refusal(self, count: int) -> StoragedError | None:
        """Why so many bytes more would be refused now, if they would. In any thread."""
        if self.failure:
            return self._unusable()
        space = self._space()
        reserve = space.total // 20 if self.limits.reserve_bytes is None else self.limits.reserve_bytes
        self.spare_bytes = space.free - reserve
        if self.spare_bytes < count:
            self._refused_bytes = min(count, REFUSED_BYTES_MAX)
            return self._unusable()
        return None

    def fail(self, reason: str, *, lasting: bool = True) -> None:
        """The disk is read-only from now on; ``lasting``: after a restart too, because what it holds can no longer be
        believed to be on the drive.
        """
        self.failure = reason
        if lasting:
            self.lost = True
            noted = self.note_failed(reason)
            self._marked = self.files.mark_failed(reason) or noted

    def _unusable(self) -> DiskUnusable:
        if self.failure:
            return DiskUnusable(f"the disk is read-only: {self.failure}", state="read-only")
        space = self._space()
        return DiskUnusable(f"the disk is full up to its reserve: {format_size(space.free)} are free", state="full")

    def _space(self) -> Space:
        """What the file system says. One that says nothing any more is gone: no reason for the process, and its other
        disks, to end.
        """
        try:
            return self.files.space()
        except OSError as error:
            if not self.failure:
                self.fail(f"its directory does not answer: {error.strerror or error}", lasting=False)
            return Space(0, 0)

    @staticmethod
    def _raise(error: StoragedError | None) -> None:
        if error is not None:
            raise error

    def usage(self) -> Usage:
        space = self._space()
        reserve = space.total // 20 if self.limits.reserve_bytes is None else self.limits.reserve_bytes
        if space.free - self._refused_bytes >= reserve:
            self._refused_bytes = 0
        state = "read-only" if self.failure else "full" if space.free - self._refused_bytes < reserve else "ok"
        index = self.index
        return Usage(
            state, index.held_bytes, max(0, space.free - reserve), index.fragments, index.garbage_bytes, self.failure
        )

    # --- checkpoints and space
    # -------------------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        if self.index.frozen is not None or self.failure:
            return False
        log_bytes = self.appended_bytes - self._checkpointed_bytes
        full = len(self.index.overlay) >= self.limits.overlay_entries_max or log_bytes >= self.limits.replay_bytes_max
        return full or bool(self.dead_segments())

    def dead_segments(self) -> tuple[int, ...]:
        """Sealed segments that hold nothing that counts."""
        uses = self.index.segments
        idle = [
            number
            for number in self.index.idle
            if number not in (self.active, self.compacting) and number in self.segments
        ]
        return tuple(number for number in idle if uses[number].live <= 0 and not uses[number].pins)

    def freeze(self) -> Checkpoint:
        """Begins a checkpoint of everything so far. Raises DiskUnusable."""
        self.sync()
        self._checkpointed_bytes = self.appended_bytes
        return self.index.freeze(self.end, self.dead_segments())

    def commit(self, checkpoint: Checkpoint) -> None:
        """May run in another thread, beside everything else but a second one. Raises lmdb.Error."""
        self.index.commit(checkpoint)

    def thaw(self, checkpoint: Checkpoint) -> None:
        """The commit is durable: segments that were dead before it can go."""
        self.index.thaw(checkpoint)
        for number in checkpoint.dead:
            if self.segments.pop(number, None) is not None:
                self.files.remove(number)
                self.index.remove_segment(number)
                self.stuck.discard(number)

    def _garbage(self, old: Entry) -> None:
        if (
            old.payload_bytes >= LARGE
            and len(self.holes) < self.limits.punch_queue_max
            and old.segment in self.segments
        ):
            start = -(-(old.offset + old.payload_start) // PAGE) * PAGE
            length = (old.offset + old.payload_start + old.payload_bytes - start) // PAGE * PAGE
            if length > 0:
                self.holes.append(Hole(old.segment, start, length, self.end))

    def punch(self) -> bool:
        """Gives the pages of one dead payload back; whether there was one whose death is durable."""
        if not self.holes or self.holes[0].after > self.synced:
            return False
        hole = self.holes.popleft()
        file = self.segments.get(hole.segment)
        try:
            if file is not None and file.punch(hole.offset, hole.length):
                self.index.punch(hole.segment, hole.length)
                self.punched_bytes += hole.length
        except OSError:
            pass  # the bytes stay garbage, compaction gets them back
        return True
