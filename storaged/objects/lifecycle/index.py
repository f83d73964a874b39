"""The index of a bucket's lifecycle: rows of the table LIFECYCLE, by day; and how far its walk is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

import msgspec

from storaged.errors import NoSuchBucket, StoragedError
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import Change, RegisterName, Table, Visibility
from storaged.meta.ports import PageQuery, Row
from storaged.objects.code.progress import progress_in
from storaged.objects.lifecycle.notes import Notes
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.units import KIB
from storaged.wire import Message, decode, encode

KEYS_A_ROW = 500
ROW_BYTES_MAX = 64 * KIB
"""Of the keys in a row, about."""
ROWS_A_READ = 8
DROPS_AT_ONCE = 16
DAY_MAX = (1 << 32) - 1
FORMAT = 1

_DUE = b"d"
_STATE = b"s"


class LifecycleKeys(Message, frozen=True):
    """A row of the index: keys that have to be looked at on the day that the row's name has. ``made_ms``: when it was
    written.
    """

    format: int
    made_ms: int
    keys: tuple[bytes, ...]


class LifecycleState(Message, frozen=True):
    """How far lifecycle is in one bucket.

    ``rules``: a keyed digest of the rules that the walk is for, and of what else decides. ``began_ms``: when the walk
    began; ``walked_ms``: when it ended, 0 while it is under way. ``after``: the last key that it has noted.
    ``objects``: how many keys it has seen. The others count since the bucket has rules: current versions that
    ``expired``, ``noncurrent`` versions and delete ``markers`` that were deleted, looks that found nothing due
    (``early``), and versions that a lock kept (``locked``).
    """

    format: int
    rules: bytes
    began_ms: int
    walked_ms: int = 0
    after: bytes = b""
    objects: int = 0
    expired: int = 0
    noncurrent: int = 0
    markers: int = 0
    early: int = 0
    locked: int = 0


class DueRow(NamedTuple):
    """``made_ms``: 0 for a row that can't be read, which has no keys."""

    name: RegisterName
    day: int
    made_ms: int
    keys: tuple[bytes, ...]


def state_name(bucket: BucketRecord) -> RegisterName:
    return RegisterName(Table.LIFECYCLE, bucket.id, bucket.shard_numbers[0], _STATE)


def _row_name(bucket: BucketRecord, day: int, row_id: bytes) -> RegisterName:
    numbers = bucket.shard_numbers
    return RegisterName(
        Table.LIFECYCLE,
        bucket.id,
        numbers[row_id[0] % len(numbers)],
        _DUE + min(max(day, 0), DAY_MAX).to_bytes(4, "big") + row_id,
    )


# --- rows


async def put_keys(plane: ObjectPlane, bucket: BucketRecord, day: int, keys: Sequence[bytes]) -> None:
    """Writes keys of one day as rows. Raises StoragedError; some rows may be written then."""
    for some in _cut(keys):
        body = encode(LifecycleKeys(FORMAT, plane.clock.wall_ms(), tuple(some)))
        name = _row_name(bucket, day, plane.entropy(DATA_ID_BYTES))
        await plane.registers.change(name, lambda _value, body=body: Change(body))  # type: ignore[misc]
        plane.counters.lifecycle_rows += 1


def _cut(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    some: list[bytes] = []
    size = 0
    for key in keys:
        if some and (len(some) >= KEYS_A_ROW or size + len(key) > ROW_BYTES_MAX):
            yield some
            some, size = [], 0
        some.append(key)
        size += len(key)
    if some:
        yield some


async def write_notes(plane: ObjectPlane, notes: Notes, bucket_id: bytes | None = None) -> None:
    """Writes what is noted, of one bucket or of all; also what another task writes is written when this returns. Notes
    that can't be written stay; those of a bucket that is gone are dropped. Raises the last error.
    """
    failed: StoragedError | None = None
    async with notes.writing:
        for bucket, day, keys in notes.take(bucket_id):
            try:
                await put_keys(plane, bucket, day, keys)
            except NoSuchBucket:
                continue
            except StoragedError as error:
                failed = error
                for key in keys:
                    notes.add(bucket, key, day)
    if failed is not None:
        raise failed


async def every_due(
    plane: ObjectPlane, bucket: BucketRecord, through: int = DAY_MAX, *, after: bytes = b""
) -> AsyncIterator[DueRow]:
    """The rows up to a day, the earliest day first; those whose register's key is greater than ``after``."""
    async for row in _every_row(plane, bucket, _DUE, after):
        found = _due_row(bucket, row)
        if found.day > through:
            return
        yield found


async def _every_row(plane: ObjectPlane, bucket: BucketRecord, prefix: bytes, after: bytes = b"") -> AsyncIterator[Row]:
    """Few at a time, since they are long."""
    start: bytes | None = after
    while start is not None:
        page = await plane.scanner.list_page(
            PageQuery(Table.LIFECYCLE, bucket.id, bucket.shard_numbers, prefix=prefix, after=start, limit=ROWS_A_READ)
        )
        for row in page.rows:
            yield row
        start = page.next_after


def _due_row(bucket: BucketRecord, row: Row) -> DueRow:
    day, row_id = int.from_bytes(row.key[1:5], "big"), row.key[5:] or b"\0"
    name = _row_name(bucket, day, row_id)
    try:
        found = decode(row.value.body, LifecycleKeys)
    except msgspec.MsgspecError:
        return DueRow(name, day, 0, ())
    return DueRow(name, day, found.made_ms, found.keys)


async def drop_row(plane: ObjectPlane, name: RegisterName) -> None:
    await plane.registers.change(name, lambda _value: Change(b"", Visibility.TOMBSTONE))


async def drop_index(plane: ObjectPlane, bucket: BucketRecord) -> int:
    """Deletes all rows of a bucket: it has no rules any more, or it is about to go. Returns how many there were."""
    names = [
        state_name(bucket) if row.key == _STATE else _due_row(bucket, row).name
        async for row in _every_row(plane, bucket, b"")
    ]
    for start in range(0, len(names), DROPS_AT_ONCE):
        await asyncio.gather(*(drop_row(plane, name) for name in names[start : start + DROPS_AT_ONCE]))
    return len(names)


# --- the state


async def read_state(plane: ObjectPlane, bucket: BucketRecord) -> LifecycleState | None:
    """None: there is none, or none that can be read. Raises ServiceUnavailable."""
    return progress_in((await plane.registers.read(state_name(bucket))).value, LifecycleState, FORMAT)


async def write_state(plane: ObjectPlane, bucket: BucketRecord, state: LifecycleState) -> None:
    """The last writer counts: of two, one notes keys again."""
    body = encode(state)
    await plane.registers.change(state_name(bucket), lambda _value: Change(body))
