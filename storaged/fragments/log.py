"""The segment files of one disk, of which only the last one, the *active* segment, grows.

Records are appended at ``end``. What lies before ``synced`` is durable, so a fragment's place is its proof of
durability. When the active segment is full it is synced for good and the next one is created: so only the last segment
can have a torn tail.

A write or a sync that fails makes the disk read-only for ever: after a failed fsync the kernel has marked the pages
clean, and what a read returns may not be on the drive (Rebello et al., "Can Applications Recover from fsync Failures?",
ATC 2020). Only a write that found no space is taken back: the segment is cut to where it was. A file that could not be
opened for want of a descriptor is another thing: nothing was done, and it is tried again.

One thread at a time calls this, but ``sync_apart``, which any thread may use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from storaged.durable import NoRoom
from storaged.errors import DiskUnusable
from storaged.fragments.disk_state import DiskState
from storaged.fragments.files import NO_SPACE, Files, NotOpened, SegmentFile
from storaged.fragments.format import (
    SEGMENT_BYTES_MAX,
    SEGMENT_HEADER_BYTES,
    RecordWriter,
    SegmentHeader,
    pack_segment_header,
    segment_seed,
)
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Position
from storaged.fragments.limits import StoreLimits


class SegmentLog:
    """``segments`` has every segment by its number; ``active`` is the last one's, 0 before there is one."""

    def __init__(
        self, files: Files, index: Index, state: DiskState, limits: StoreLimits, now_ms: Callable[[], int]
    ) -> None:
        assert SEGMENT_HEADER_BYTES < limits.segment_bytes <= SEGMENT_BYTES_MAX
        self._files = files
        self._index = index
        self._state = state
        self._limits = limits
        self._now_ms = now_ms
        self.segments: dict[int, SegmentFile] = {}
        self.active = 0
        self.end = self.synced = Position(0, 0)
        self._synced_apart = Position(0, 0)
        self._syncing = threading.Lock()
        """Held from the beginning of ``sync`` until its failure, if it fails, is known."""
        self._writeback_from = 0
        self.syncs = self.appended_bytes = 0

    def continue_at(self, position: Position) -> None:
        """Records go on at ``position``, as a replay found it; all before it is durable."""
        self.active = position.segment
        self.end = self.synced = position
        self._writeback_from = position.offset

    # --- appending --------------------------------------------------------------------------------------------------

    def has_room(self, need: int) -> bool:
        """Whether the active segment takes so many bytes more."""
        return bool(self.active) and not self._state.failure and self._limits.segment_bytes - self.end.offset >= need

    def make_room(self, need: int) -> int:
        """Begins a new segment if the active one has no room for ``need`` bytes. Returns the bytes that the active
        segment takes: less than ``need`` only when the disk refused.
        """
        room = self._limits.segment_bytes - self.end.offset
        if self.active and (room >= need or self.end.offset == SEGMENT_HEADER_BYTES):
            return max(room, need)
        try:
            if self.active:
                self.sync()
            self._create(max((self.active, self._index.checkpoint.segment, *self.segments)) + 1)
        except DiskUnusable:
            return 0
        except OSError as error:
            if error.errno in NO_SPACE or isinstance(error, NotOpened):
                self._state.found_no_space(error)
            else:
                self._state.fail(f"a new segment could not be made: {error.strerror or error}")
            return 0
        return max(self._limits.segment_bytes - self.end.offset, need)

    def _create(self, number: int) -> None:
        """The segment exists durably, with its header, before the first record goes there."""
        file = self._files.create(number)
        try:
            file.write([pack_segment_header(SegmentHeader(self._index.disk_id, number, self._now_ms()))], 0)
            file.sync()
            self._files.sync_directory()
        except OSError:
            self._files.remove(number)
            raise
        self.segments[number] = file
        self._index.accounts.grow(number, SEGMENT_HEADER_BYTES)
        self.continue_at(Position(number, SEGMENT_HEADER_BYTES))

    def writer(self) -> RecordWriter:
        """Lays records at the end of the active segment."""
        synced = max(self.synced, self._synced_apart)
        border = synced.offset if synced.segment == self.active else 0
        return RecordWriter(self.end.offset, segment_seed(self._index.disk_id, self.active), border)

    def write_out(self, writer: RecordWriter) -> DiskUnusable | None:
        """Writes the records and advances the end; returns the error when the disk could not. A write that found no
        space is cut off again; any other error is the disk's last.
        """
        file = self.segments[self.active]
        try:
            file.write(writer.buffers, writer.start)
        except OSError as error:
            if isinstance(error, NotOpened):
                self._state.found_no_space(error)
            elif error.errno in NO_SPACE:
                self._cut_back(file, writer.start, error)
                self._state.found_no_space(error)
            else:
                self._state.fail(f"write to segment {self.active}: {error.strerror or error}")
            return self._state.unusable()
        self.end = Position(self.active, writer.end)
        self.appended_bytes += writer.end - writer.start
        self._index.accounts.grow(self.active, writer.end)
        return None

    def _cut_back(self, file: SegmentFile, end: int, cause: OSError) -> None:
        try:
            file.truncate(end)
        except OSError as error:
            self._state.fail(
                f"segment {self.active} could not be cut back after {cause.strerror}: {error.strerror or error}"
            )

    def mark(self) -> None:
        """Syncs, and says in the log itself that everything before was synced. Raises DiskUnusable."""
        self.sync()
        writer = self.writer()
        writer.mark()
        error = self.write_out(writer)
        if error is not None:
            raise error

    def remove(self, number: int) -> bool:
        """Removes a segment's file durably; False when it is gone already. Raises OSError."""
        if self.segments.pop(number, None) is None:
            return False
        self._files.remove(number)
        return True

    # --- durability -------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Everything appended so far is durable when it returns. Raises DiskUnusable."""
        if self._state.failure:
            raise self._state.unusable()
        if self.synced == self.end or not self.active:
            return
        with self._syncing:
            try:
                self.segments[self.active].sync()
            except OSError as error:
                self._state.fail(f"fdatasync of segment {self.active}: {error.strerror or error}")
                raise self._state.unusable() from error
        self.syncs += 1
        self.synced = self.end

    def sync_apart(self) -> None:
        """As ``sync``, in any thread, but ``synced`` stays as it is. It uses a descriptor of its own, so that the
        writer hears of a failure as well.

        What is not in the active segment was synced when that one was begun. A disk that takes no writes for a reason
        that ends with a restart is synced too: its fragments count then. Raises DiskUnusable on a disk whose failure
        lasts and could not be noted: the next start would believe it. Raises NoRoom when there is no descriptor now.
        """
        end = self.end
        file = self.segments.get(end.segment)
        if file is None or self._state.lost:
            self._raise_unless_noted()
            return
        try:
            file.sync_apart()
        except NotOpened as error:
            raise NoRoom(f"segment {end.segment} can't be synced now: {error.strerror or error}") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) and end.segment != self.active:
                return  # meanwhile it was sealed, emptied and removed
            self._state.fail(f"fdatasync of segment {end.segment}: {error.strerror or error}")
            self._raise_unless_noted()
        else:
            with self._syncing:
                pass  # a descriptor hears of no failure that was reported to another one before it was opened
            if self._state.lost:
                self._raise_unless_noted()
                return
            self._synced_apart = end

    def _raise_unless_noted(self) -> None:
        if not self._state.failure_noted:
            raise self._state.unusable()

    @property
    def write_back_due(self) -> bool:
        return self.end.offset - self._writeback_from >= self._limits.writeback_bytes

    def write_back(self) -> None:
        """When much was written since the last call, the kernel begins to write it to the drive. May wait for the
        disk.
        """
        if self.write_back_due:
            end = self.end.offset
            self.segments[self.active].start_writeback(self._writeback_from, end - self._writeback_from)
            self._writeback_from = end
