"""How long an audit log is kept: files whose last entry is old enough are removed, oldest first, each after an entry
that says so.

A file of the chain that is being written is never removed, nor one that does not end with an entry that holds:
something is wrong with it, and it may be evidence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from storaged.clock import Clock
from storaged.cluster.audit.files import chain_files
from storaged.cluster.audit.format import ENTRY_BYTES_MAX, Entry, parse_line
from storaged.cluster.audit.log import AuditLog, audited
from storaged.cluster.audit.verify import DAY_MS, PRUNED
from storaged.durable import sync_path
from storaged.errors import AuditUnwritable

EVERY_S: Final = 6 * 3600.0

log = structlog.get_logger(__name__)


class Old(NamedTuple):
    """A file that may go, and its first and last entry."""

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
    """None when some line of it does not hold; bytes that a crash tore behind the last do not count."""
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
    """Removes what is older than ``keep_days``. Returns how many files. Raises AuditUnwritable (then nothing is
    removed), OSError."""
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
    """Until cancelled. ``keep_days`` 0: nothing is ever removed."""
    while keep_days:
        await asyncio.sleep(EVERY_S)
        try:
            if removed := await prune(audit, clock, keep_days):
                log.info("files of the audit log were old enough and are removed", files=removed, keep_days=keep_days)
        except (AuditUnwritable, OSError) as error:
            log.error("old files of the audit log are not removed", reason=str(error))
