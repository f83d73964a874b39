"""Removes the files of an audit log whose last entry is old enough, oldest first, each after an entry that says so.

It never removes a file of the chain that is being written, nor a file with an invalid entry: something is wrong with
it, and it may be evidence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from storaged.clock import Clock
from storaged.cluster.audit.chains import PRUNED
from storaged.cluster.audit.files import chain_files
from storaged.cluster.audit.format import ENTRY_BYTES_MAX, Entry, parse_line
from storaged.cluster.audit.log import AuditLog
from storaged.cluster.audit.trail import audited
from storaged.cluster.audit.verify import DAY_MS
from storaged.durable import sync_path
from storaged.errors import AuditUnwritable

EVERY_S: Final = 6 * 3600.0

log = structlog.get_logger(__name__)


class Old(NamedTuple):
    """A file that may be removed, and its first and last entry."""

    path: Path
    first: Entry
    last: Entry


def old_files(directory: Path, current: str, before_ms: int) -> Iterator[Old]:
    """The oldest files whose last entry is older than ``before_ms``, up to the first that is not. Raises OSError."""
    for chain, files in chain_files(directory).items():
        if chain == current:
            return
        for path in files:
            ends = _ends(path)
            if ends is None or ends[1].time_ms >= before_ms:
                return
            yield Old(path, *ends)


def _ends(path: Path) -> tuple[Entry, Entry] | None:
    """The first and last entry; None when a line is invalid. Bytes that a crash left after the last line do
    not count.
    """
    first: Entry | None = None
    last: Entry | None = None
    with path.open("rb") as file:
        while line := file.readline(ENTRY_BYTES_MAX + 1):
            if not line.endswith(b"\n"):
                break
            try:
                last = parse_line(line[:-1])
            except ValueError:
                return None
            first = first or last
    return (first, last) if first is not None and last is not None else None


async def prune(audit: AuditLog, clock: Clock, keep_days: int) -> int:
    """Removes files older than ``keep_days`` and returns their number. Raises AuditUnwritable (then nothing is
    removed), OSError.
    """
    before_ms = clock.wall_ms() - keep_days * DAY_MS
    removed = 0
    for old in await asyncio.to_thread(lambda: list(old_files(audit.directory, audit.head.chain, before_ms))):
        facts = {"chain": old.last.chain, "first": old.first.sequence, "last": old.last.sequence, "hash": old.last.hash}
        async with audited(
            audit, PRUNED, actor=f"node:{audit.node}", target=f"file:{old.path.name}", last_ms=old.last.time_ms, **facts
        ):
            await asyncio.to_thread(_remove, old.path)
        removed += 1
    return removed


def _remove(path: Path) -> None:
    path.unlink()
    sync_path(path.parent)


async def prune_regularly(audit: AuditLog, clock: Clock, keep_days: int) -> None:
    """Runs until cancelled. ``keep_days`` 0: nothing is ever removed."""
    while keep_days:
        await asyncio.sleep(EVERY_S)
        try:
            if removed := await prune(audit, clock, keep_days):
                log.info("files of the audit log were old enough and are removed", files=removed, keep_days=keep_days)
        except (AuditUnwritable, OSError) as error:
            log.error("old files of the audit log are not removed", reason=str(error))
