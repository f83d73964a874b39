"""The walk over a bucket that makes its index: it notes each key that has a day, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

from storaged.errors import DataDamaged
from storaged.meta.names import Table
from storaged.meta.ports import PageQuery
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.kinds import VERSIONING
from storaged.objects.configuration.lifecycle import LIFECYCLE
from storaged.objects.lifecycle.index import drop_row, every_due, write_notes
from storaged.objects.lifecycle.look import Judge, find
from storaged.objects.lifecycle.notes import Notes
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.wire import encode

ROWS_A_PAGE = 1000
VERSIONED_ROWS_A_PAGE = 100
"""Each has the newest versions of its key, up to some 20 KiB."""
ROWS_A_PIECE = 10_000
"""Keys after which the index is written, and the progress."""
LATE_MS = 3_600_000
"""How far the clocks of gateways that write rows may differ: rows that are older by more than this go after a walk."""
_BEYOND = b"\xff"
"""Sorts after all that keys go on with, since they are UTF-8. After a prefix it says that this prefix is done."""


def rules_digest(plane: ObjectPlane, bucket: BucketRecord) -> bytes:
    """Of all that decides when a look is due; a walk is for one of them. It is keyed, since rules are sealed. Raises
    KeyringUnavailable.
    """
    configuration = plane.configurations.of(bucket)
    rules, versioning = configuration.get(LIFECYCLE), configuration.get(VERSIONING)
    known = (encode(rules) if rules is not None else b"", versioning is not None, plane.limits.lifecycle_day_ms)
    return plane.keys.authenticate((b"lifecycle rules", bucket.id), repr(known).encode())


def _next_prefix(prefixes: Sequence[bytes], after: bytes) -> bytes | None:
    """The prefix with which a walk goes on after this key; None: it has ended."""
    for prefix in prefixes:
        if prefix > after or (after.startswith(prefix) and after != prefix + _BEYOND):
            return prefix
    return None


async def walk_piece(
    plane: ObjectPlane, judge: Judge, bucket: BucketRecord, after: bytes
) -> tuple[bytes | None, int, int]:
    """Notes the keys after ``after``, at least ROWS_A_PIECE of them unless the bucket ends. Returns after which key the
    next piece begins (None: there is none), how many keys this one had, and how many can't be read. Raises
    ServiceUnavailable, NoSuchBucket; then the piece has to be walked again.
    """
    rules, versioned = await judge.fresh(judge.rules), bool(await judge.fresh(judge.versioning))
    notes = Notes(plane.configurations, plane.counters, judge.day_ms)
    keys, count, damaged = BucketKeys(plane, bucket), 0, 0
    prefix = _next_prefix(rules.prefixes, after)
    while prefix is not None and count < ROWS_A_PIECE:
        query = PageQuery(
            Table.OBJECT,
            bucket.id,
            bucket.shard_numbers,
            prefix=prefix,
            after=after if after.startswith(prefix) else b"",
            limit=VERSIONED_ROWS_A_PAGE if versioned else ROWS_A_PAGE,
            hidden=True,
        )
        page = await plane.scanner.list_page(query)
        for row in page.rows:
            count += 1
            try:
                found = await find(plane, judge, bucket, row.key, decode_record(row.value), keys)
            except DataDamaged:
                damaged += 1
                continue
            day = found.first_day(judge.today())
            if day is not None:
                notes.add(bucket, row.key, day)
        after = prefix + _BEYOND if page.next_after is None else page.next_after
        prefix = _next_prefix(rules.prefixes, after)
    await write_notes(plane, notes)
    return (after if prefix is not None else None), count, damaged


async def drop_older_rows(plane: ObjectPlane, bucket: BucketRecord, began_ms: int) -> int:
    """Deletes the rows from before a walk that has ended: it has noted all that they have."""
    count = 0
    async for row in every_due(plane, bucket):
        if row.made_ms < began_ms - LATE_MS:
            await drop_row(plane, row.name)
            count += 1
    return count
