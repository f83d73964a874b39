"""For an operator, on a disk that no daemon has open: rebuild its index from the segments, or check everything on
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storaged.durable import sync_path
from storaged.errors import FragmentDamaged, IndexDamaged
from storaged.fragments.damage import HEAD_CELL
from storaged.fragments.engine import Engine
from storaged.fragments.files import Files, PosixFiles
from storaged.fragments.format import SEGMENT_HEADER_BYTES, FormatError, parse_segment_header, segment_seed
from storaged.fragments.index import Index
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import FragmentId
from storaged.fragments.recovery import Progress, Report, Step
from storaged.fragments.scan import Found, scan


@dataclass
class CheckReport:
    """``disk_id``: empty for a disk that never got a fragment. ``damaged``: (fragment, bad cells; -1 is the head).
    ``gaps``: (segment, offset, length) of bytes that are no record, before the log's end.
    """

    disk_id: str
    fragments: int = 0
    bytes: int = 0
    damaged: list[tuple[FragmentId, tuple[int, ...]]] = field(default_factory=list)
    gaps: list[tuple[int, int, int]] = field(default_factory=list)
    lost_segments: list[int] = field(default_factory=list)


def disk_id_of(files: Files) -> str:
    """The id in the first segment whose header holds; empty when there is none."""
    for number in files.segments():
        try:
            return parse_segment_header(files.open(number).read(0, SEGMENT_HEADER_BYTES)).disk_id
        except (FormatError, OSError):
            continue
    return ""


def _id_in_index(place: Path) -> str:
    """Empty when it has none, or can't be read."""
    if not place.exists():
        return ""
    try:
        index = Index(place, "")
    except IndexDamaged:
        return ""
    index.close()
    return index.disk_id


def _nameless() -> IndexDamaged:
    return IndexDamaged("nothing says which disk this is: the header of every segment is damaged, and so is the index")


def rebuild_index(
    directory: Path, *, disk_id: str = "", progress: Progress | None = None, now_ms: Callable[[], int] = lambda: 0
) -> Report:
    """Makes a new index from the segments alone, and puts it in the old one's place when it is complete. After an
    interruption at any point either the old index or the new one is there.

    Raises DirectoryInUse, DiskForeign, DiskUnusable (the index can't be written), OperatorError, OSError.
    """
    files = PosixFiles(directory)
    fresh, old, place = directory / "index.new", directory / "index.old", directory / "index"
    try:
        disk_id = disk_id or disk_id_of(files) or _id_in_index(place)
        if not disk_id and files.segments():
            raise _nameless()
        shutil.rmtree(fresh, ignore_errors=True)
        index = Index(fresh, disk_id)
        engine = Engine(files, index, StoreLimits(), now_ms=now_ms, on_damage=lambda _key, _cell: None)
        try:
            report = engine.recover(progress)
            if engine.unwritten is not None:
                raise engine.state.unusable()
            if disk_id:  # else there is nothing: neither a segment, nor a checkpoint
                index.checkpoint_now(engine.log.end)
        finally:
            index.close()
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        sync_path(directory)
        shutil.rmtree(old, ignore_errors=True)
        return report
    finally:
        files.close()


def check(directory: Path, *, disk_id: str = "", progress: Progress | None = None) -> CheckReport:
    """Reads every live fragment and every record's head. Changes neither the segments nor the index.

    ``progress`` gets fragments as bytes of payload. Raises DirectoryInUse, DiskForeign, DiskUnusable,
    IndexDamaged, OperatorError, OSError.
    """
    files = PosixFiles(directory)
    try:
        if not (directory / "index").exists():
            raise IndexDamaged(f"there is no fragment index in {directory}")
        index = Index(directory / "index", disk_id or disk_id_of(files))
        report = CheckReport(index.disk_id)
        try:
            if not index.disk_id and files.segments():
                raise _nameless()
            _check(files, index, report, progress)
        finally:
            index.close()
        return report
    finally:
        files.close()


def _check(files: Files, index: Index, report: CheckReport, progress: Progress | None) -> None:
    bad: dict[bytes, set[int]] = {}
    engine = Engine(
        files, index, StoreLimits(), now_ms=lambda: 0, on_damage=lambda key, cell: bad.setdefault(key, set()).add(cell)
    )
    index.damage.clear()  # known damage is to be found and reported again
    found = engine.recover(read_only=True)
    report.lost_segments = found.lost_segments
    total = index.accounts.live_bytes
    for key, entry in index.entries():
        report.fragments += 1
        report.bytes += entry.payload_bytes
        try:
            engine.reader.verify(key)
        except FragmentDamaged:
            bad.setdefault(key, set()).add(HEAD_CELL)
        if progress is not None and report.fragments % 100 == 0:
            progress(Step(0, len(engine.log.segments), report.bytes, total))
    report.damaged = [(FragmentId.unpack(key), tuple(sorted(cells))) for key, cells in sorted(bad.items())]
    segments = index.accounts.segments
    for number, file in sorted(engine.log.segments.items()):
        end = segments[number].end if number in segments else file.size()
        for item in scan(file, segment_seed(report.disk_id, number), SEGMENT_HEADER_BYTES, end):
            if not isinstance(item, Found):
                report.gaps.append((number, item.offset, item.length))
            elif item.message is None:
                report.gaps.append((number, item.offset, item.head.record_bytes))
