"""From segments to an index: the replay at every start, the rebuilding of a lost index, and a read-only check.

What may be cut is decided by what the log says of itself. Every head carries ``synced_end``; the largest that any valid
head of the last segment
carries (or the checkpoint's position, if that is behind it) is the border. Before it everything was durable and perhaps
acknowledged:
a record that does not hold there is damage; it is left where it is, its fragment is reported, and nothing is cut.
Behind it nothing is
proven: a record counts only when every one of its bytes holds, what is torn between such records becomes filler, and
the bytes behind the last one
are cut. Segments before the
last were synced whole before their successor was made, so they have no such zone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from storaged.errors import DiskForeign
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files, SegmentFile
from storaged.fragments.format import (
    FRAGMENT,
    HEAD_BYTES,
    KEY_BYTES,
    NOTES,
    SEGMENT_HEADER_BYTES,
    FormatError,
    FormatUnknown,
    RecordWriter,
    parse_fragment,
    parse_notes,
    parse_segment_header,
    segment_seed,
)
from storaged.fragments.index import Index, Position
from storaged.fragments.scan import Found, Gap, scan, whole


class Step(NamedTuple):
    """Progress of a long run: segments and bytes done, and in all."""

    segments_done: int
    segments: int
    bytes_done: int
    bytes: int


Progress = Callable[[Step], None]


@dataclass
class Report:
    """What a replay found. ``end`` is where the next record goes in segment ``last`` (0: there is none).

    ``gaps``: (segment, offset, length) of damage before the border. ``torn_bytes``: cut, or made filler, behind it.
    ``failure``: why the disk must be read-only, if it must.
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
    spill: Callable[[Position], None],
    progress: Progress | None = None,
) -> Report:
    """Brings the index up to the log's end and fills ``segments``. With an index that has no checkpoint it rebuilds all
    of it.

    ``spill(position)`` is called after every record; everything before the position has been applied, and is durable.
    Raises DiskForeign, FormatUnknown, OSError.
    """
    report = Report()
    numbers = files.segments()
    for number in numbers:
        segments[number] = files.open(number)
    _forget_lost(index, segments, report)
    todo = [number for number in numbers if number >= index.checkpoint.segment or number not in index.segments]
    total = sum(segments[number].size() for number in todo) if progress is not None else 0
    done = 0
    for position, number in enumerate(todo):
        last = number == numbers[-1]
        size = segments[number].size()
        if _identify(files, index, segments, number, last=last, read_only=read_only):
            known = number in index.segments and number == index.checkpoint.segment
            start = index.checkpoint.offset if known else SEGMENT_HEADER_BYTES
            if last:
                _replay_last(index, segments[number], number, start, report, spill, read_only=read_only)
            else:
                _replay_sealed(index, segments[number], number, start, report, spill)
        if progress is not None:
            done += size
            progress(Step(position + 1, len(todo), done, total))
    report.last = max(segments, default=0)
    if report.last and report.end == 0:
        use = index.segments.get(report.last)
        report.end = use.end if use is not None else SEGMENT_HEADER_BYTES
    return report


def _forget_lost(index: Index, segments: dict[int, SegmentFile], report: Report) -> None:
    """Segments that the index knows and the directory has not: what was live in them is missing, and said to be."""
    lost = {number for number in index.segments if number not in segments}
    if any(index.segments[number].live > 0 for number in lost):
        report.lost_segments = sorted(lost)
        for key, entry in index.entries():
            if entry.segment in lost:
                index.forget(key)
    for number in lost:
        index.remove_segment(number)


def _identify(
    files: Files, index: Index, segments: dict[int, SegmentFile], number: int, *, last: bool, read_only: bool
) -> bool:
    """Whether there may be records in it. A last segment whose creation was interrupted is removed."""
    file = segments[number]
    try:
        header = parse_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
    except FormatUnknown:
        raise
    except (FormatError, OSError):
        seed = segment_seed(index.disk_id, number)
        if not last or any(isinstance(item, Found) for item in scan(file, seed, SEGMENT_HEADER_BYTES, file.size())):
            return True  # its records know where they belong without it
        if number in index.segments or read_only:
            return False
        files.remove(number)
        del segments[number]
        return False
    if header.disk_id != index.disk_id:
        raise DiskForeign(f"segment {number} belongs to disk {header.disk_id}, not to {index.disk_id}")
    return True


def _replay_sealed(
    index: Index, file: SegmentFile, number: int, start: int, report: Report, spill: Callable[[Position], None]
) -> None:  # fmt: skip
    end = file.size()
    index.grow(number, end)
    if start == SEGMENT_HEADER_BYTES:
        index.punch(number, max(0, end - file.allocated()))
    for item in scan(file, segment_seed(index.disk_id, number), start, end):
        _take(index, number, item, report, spill)


def _replay_last(
    index: Index, file: SegmentFile, number: int, start: int, report: Report, spill: Callable[[Position], None], *, read_only: bool  # noqa: E501
) -> None:  # fmt: skip
    """First the border, for what proves how far the log was durable may stand at its very end; then what is torn behind
    it; then all that counts.

    A torn record with whole ones behind it is overwritten with a filler's head: once more records follow, nothing else
    would tell a later
    replay that it was never whole. This comes before any checkpoint that covers it.
    """
    seed = segment_seed(index.disk_id, number)
    end = file.size()
    border = max(
        (item.head.synced_end for item in scan(file, seed, start, end) if isinstance(item, Found)), default=start
    )
    border = max(border, start)
    if not read_only:
        report.failure = _settle(file, border)
    kept = border
    torn: dict[int, int] = {}
    for item in scan(file, seed, border, end):
        if isinstance(item, Found) and whole(file, item, end):
            kept = item.end
        else:
            torn[item.offset] = min(item.end, end) - item.offset
    if torn and not read_only and not report.failure:
        report.failure = _disarm(file, seed, border, kept, torn)
    report.end = kept
    report.torn_bytes = sum(torn.values())
    index.grow(number, kept)
    for item in scan(file, seed, start, min(kept, end)):
        if item.offset not in torn:
            _take(index, number, item, report, spill)


def _disarm(file: SegmentFile, seed: int, border: int, kept: int, torn: dict[int, int]) -> str:
    """Returns why it could not be done, if it could not."""
    try:
        for offset, length in torn.items():
            if offset < kept and length >= HEAD_BYTES:
                filler = RecordWriter(offset, seed, border)
                filler.mark(length)
                file.write(filler.buffers[:1], offset)
        file.truncate(kept)
        file.sync()
    except OSError as error:
        return f"cutting a torn tail: {error.strerror or error}"
    return ""


def _take(index: Index, number: int, item: Found | Gap, report: Report, spill: Callable[[Position], None]) -> None:
    if isinstance(item, Gap):
        report.gaps.append((number, item.offset, item.length))
        return
    report.records += 1
    report.sequence = max(report.sequence, item.head.sequence)
    if not apply(index, number, item):
        report.gaps.append((number, item.offset, item.head.record_bytes))
    index.sequence = max(index.sequence, report.sequence)
    spill(Position(number, item.end))


def _settle(file: SegmentFile, border: int) -> str:
    """Makes what a killed process left in the page cache durable, and has the tail read from the drive. Returns why
    not, if not.
    """
    try:
        file.sync()
    except OSError as error:
        return f"fdatasync at start: {error.strerror or error}"
    file.drop_cache(border)
    return ""


def apply(index: Index, number: int, found: Found) -> bool:
    """Puts a record into the index; False when its body does not hold, so that what it was is unknown."""
    head = found.head
    if found.message is None:
        return False
    try:
        if head.kind == FRAGMENT:
            header = parse_fragment(found.message)
            if len(header.id) != KEY_BYTES:
                return False
            entry = Entry(
                number, found.offset, head.record_bytes, head.payload_start, head.payload_bytes, head.cell_bytes,
                head.sequence, header.created_ms,
            )  # fmt: skip
            index.put(header.id, entry)
        elif head.kind == NOTES:
            index.apply(number, head.record_bytes, head.sequence, parse_notes(found.message))
    except FormatError:
        return False
    return True
