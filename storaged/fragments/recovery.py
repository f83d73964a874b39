"""From segments to an index: the replay at every start, the rebuild of a lost index, and a read-only check.

The log itself says what may be cut. Every head carries ``synced_end``. The *border* is the largest one that any valid
head of the last segment carries, or the checkpoint's position if that comes later.

Before the border everything was durable, and perhaps acknowledged. A record there that does not hold is damage: it
stays where it is, its fragment is reported, and nothing is cut. After the border nothing is proven: a record counts
only when every one of its bytes holds. What is torn between such records becomes filler, and the bytes after the last
one are cut. Earlier segments were synced whole before their successor was made, so they have no such zone.

What the index knows was durable, too. A segment that is gone, or shorter than the index knows it, has lost data.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from storaged.errors import DiskForeign, DiskUnusable
from storaged.fragments.entry import Entry
from storaged.fragments.files import NO_SPACE, Files, NotOpened, SegmentFile
from storaged.fragments.format import (
    FRAGMENT,
    HEAD_BYTES,
    KEY_BYTES,
    NOTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_HEADER_BYTES,
    FormatError,
    FormatUnknown,
    RecordWriter,
    parse_fragment,
    parse_notes,
    parse_segment_header,
    segment_seed,
)
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Position
from storaged.fragments.scan import Found, Gap, scan, whole

_NO_SYNC_OF_DIRECTORIES = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP)
"""The answer of a file system that knows no such sync, or of one that this process may not read."""

LATEST = 64
"""Segments whose sizes are looked at. What a drive or a file system loses in a crash was written lately; to look at all
files of a large disk takes minutes.
"""


class Step(NamedTuple):
    """Progress of a long run: segments and bytes done, and in all."""

    segments_done: int
    segments: int
    bytes_done: int
    bytes: int


Progress = Callable[[Step], None]
Spill = Callable[[Position], None]


@dataclass
class Report:
    """What a replay found. ``end`` is where the next record goes in segment ``last`` (0: there is none).

    ``gaps``: (segment, offset, length) of damage before the border, and of ends that are gone. ``torn_bytes``: cut, or
    made filler, after it. ``failure``: why the disk must be read-only, if it must.
    """

    last: int = 0
    end: int = 0
    sequence: int = 0
    records: int = 0
    torn_bytes: int = 0
    lost_segments: list[int] = field(default_factory=list)
    gaps: list[tuple[int, int, int]] = field(default_factory=list)
    failure: str = ""


def replay(
    files: Files,
    index: Index,
    segments: dict[int, SegmentFile],
    *,
    read_only: bool,
    spill: Spill,
    progress: Progress | None = None,
) -> Report:
    """Brings the index up to the log's end and fills ``segments``. Rebuilds an index that has no checkpoint.

    ``spill(position)`` is called after every record; everything before the position has been applied, and is durable.
    Raises DiskForeign, DiskUnusable, FormatUnknown, OSError.
    """
    numbers = files.segments()
    for number in numbers:
        segments[number] = files.open(number)
    run = _Replay(files, index, segments, read_only, spill)
    run.forget_lost()
    todo = [number for number in numbers if number >= index.checkpoint.segment or number not in index.accounts.segments]
    total = sum(segments[number].size() for number in todo) if progress is not None else 0
    done = 0
    for place, number in enumerate(todo):
        size = segments[number].size()
        run.segment(number, last=number == numbers[-1])
        if progress is not None:
            done += size
            progress(Step(place + 1, len(todo), done, total))
    report = run.report
    report.last = max(segments, default=0)
    if report.last and report.end == 0:
        use = index.accounts.segments.get(report.last)
        report.end = use.end if use is not None else SEGMENT_HEADER_BYTES
    return report


class _Replay:
    def __init__(
        self, files: Files, index: Index, segments: dict[int, SegmentFile], read_only: bool, spill: Spill
    ) -> None:
        self._files = files
        self._index = index
        self._segments = segments
        self._read_only = read_only
        self._spill = spill
        self.report = Report()

    def forget_lost(self) -> None:
        """What the index knows and the files do not have any more: segments, and ends of the latest ones. What was live
        there is missing from now on.
        """
        index, report = self._index, self.report
        known = index.accounts.segments
        lost = {number for number in known if number not in self._segments}
        if any(known[number].live > 0 for number in lost):
            report.lost_segments = sorted(lost)
        latest = sorted(known.keys() - lost)[-LATEST:]
        sizes = dict.fromkeys(lost, 0) | {number: self._segments[number].size() for number in latest}
        short = [number for number in latest if sizes[number] < known[number].end]
        report.gaps += [(number, sizes[number], known[number].end - sizes[number]) for number in short]
        if report.lost_segments or short:
            for key, entry in index.entries():
                if entry.offset + entry.record_bytes > sizes.get(entry.segment, SEGMENT_BYTES_MAX):
                    index.forget(key)
        for number in lost:
            index.accounts.remove(number)

    def segment(self, number: int, *, last: bool) -> None:
        """Replays one segment from where the checkpoint ends."""
        if not self._identify(number, last=last):
            return
        index = self._index
        known = number in index.accounts.segments and number == index.checkpoint.segment
        start = index.checkpoint.offset if known else SEGMENT_HEADER_BYTES
        if last:
            self._replay_last(number, start)
        else:
            self._replay_sealed(number, start)

    def _identify(self, number: int, *, last: bool) -> bool:
        """Whether there may be records in it. A last segment whose creation was interrupted is removed."""
        file = self._segments[number]
        try:
            header = parse_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
        except FormatUnknown:
            raise
        except (FormatError, OSError):
            items = scan(file, segment_seed(self._index.disk_id, number), SEGMENT_HEADER_BYTES, file.size())
            if not last or any(isinstance(item, Found) for item in items):
                return True  # its records are bound to their place without the header
            if number in self._index.accounts.segments or self._read_only:
                return False
            self._files.remove(number)
            del self._segments[number]
            return False
        if header.disk_id != self._index.disk_id:
            raise DiskForeign(f"segment {number} belongs to disk {header.disk_id}, not to {self._index.disk_id}")
        return True

    def _replay_sealed(self, number: int, start: int) -> None:
        file = self._segments[number]
        end = file.size()
        self._index.accounts.grow(number, end)
        if start == SEGMENT_HEADER_BYTES:
            self._index.accounts.punch(number, max(0, end - file.allocated()))
        for item in scan(file, segment_seed(self._index.disk_id, number), start, end):
            self._take(number, item)

    def _replay_last(self, number: int, start: int) -> None:
        """Finds the border first, for the head that proves how far the log was durable may lie at its very end. Then
        finds what is torn after it, and at last applies all that counts.

        A torn record with whole ones after it is overwritten with a filler's head, before any checkpoint that covers
        it. Otherwise a later replay, which sees more records after it, could not know that it was never whole.
        """
        file, report = self._segments[number], self.report
        seed = segment_seed(self._index.disk_id, number)
        end = file.size()
        proven = [item.head.synced_end for item in scan(file, seed, start, end) if isinstance(item, Found)]
        border = max([start, *proven])
        if not self._read_only:
            report.failure = _make_durable(self._files, file, border)
        kept = border
        torn: dict[int, int] = {}
        for item in scan(file, seed, border, end):
            if isinstance(item, Found) and whole(file, item, end):
                kept = item.end
            else:
                torn[item.offset] = min(item.end, end) - item.offset
        if torn and not self._read_only and not report.failure:
            report.failure = _cut(self._files, file, seed, border, kept, torn)
        report.end = kept
        report.torn_bytes = sum(torn.values())
        self._index.accounts.grow(number, kept)
        for item in scan(file, seed, start, min(kept, end)):
            if item.offset not in torn:
                self._take(number, item)

    def _take(self, number: int, item: Found | Gap) -> None:
        report, index = self.report, self._index
        if isinstance(item, Gap):
            report.gaps.append((number, item.offset, item.length))
            return
        report.records += 1
        report.sequence = max(report.sequence, item.head.sequence)
        if not apply(index, number, item):
            report.gaps.append((number, item.offset, item.head.record_bytes))
        index.sequence = max(index.sequence, report.sequence)
        self._spill(Position(number, item.end))


def _make_durable(files: Files, file: SegmentFile, border: int) -> str:
    """Syncs what a killed process left in the page cache: the bytes, and the file's name if it was killed as it made
    the segment. Has the tail read from the drive. Returns why that failed, empty when it did not. Raises DiskUnusable
    where the file system or a permission forbids to sync the directory: nothing was lost by that, so the disk is not
    marked as failed for good.
    """
    try:
        file.sync()
        files.sync_directory()
    except NotOpened:
        raise
    except OSError as error:
        if error.errno in _NO_SYNC_OF_DIRECTORIES:
            reason = f"the directory of the segments can't be synced: {error.strerror or error}"
            raise DiskUnusable(reason, state="failed") from error
        return f"fdatasync at start: {error.strerror or error}"
    file.drop_cache(border)
    return ""


def _cut(files: Files, file: SegmentFile, seed: int, border: int, kept: int, torn: dict[int, int]) -> str:
    """Makes torn records before ``kept`` filler, and cuts the file there. Returns why that failed, empty when it did
    not. What is torn may be a hole, which takes room: the reserve for notes, if need be. Raises DiskUnusable when there
    is no room; nothing was lost by that.
    """
    cut = False
    try:
        for offset, length in torn.items():
            if offset < kept and length >= HEAD_BYTES:
                filler = RecordWriter(offset, seed, border)
                filler.mark(length)
                file.write(filler.buffers[:1], offset)
        file.truncate(kept)
        cut = True
        file.sync()
    except OSError as error:
        reason = f"cutting a torn tail: {error.strerror or error}"
        if error.errno in NO_SPACE and not cut:
            if files.reserve(0):
                return _cut(files, file, seed, border, kept, torn)
            raise DiskUnusable(reason, state="full") from error
        return reason
    return ""


def apply(index: Index, number: int, found: Found) -> bool:
    """Puts a record into the index. False when its body does not hold, so that its content is unknown."""
    head = found.head
    if found.message is None:
        return False
    try:
        if head.kind == FRAGMENT:
            header = parse_fragment(found.message)
            if len(header.id) != KEY_BYTES:
                return False
            entry = Entry(
                number,
                found.offset,
                head.record_bytes,
                head.payload_start,
                head.payload_bytes,
                head.cell_bytes,
                head.sequence,
                header.created_ms,
            )
            index.put(header.id, entry)
        elif head.kind == NOTES:
            index.apply_notes(number, head.record_bytes, head.sequence, parse_notes(found.message))
    except FormatError:
        return False
    return True
