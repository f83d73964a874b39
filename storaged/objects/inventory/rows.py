"""How far the inventories of a bucket are: rows of the table INVENTORY.

An inventory has a *state*, and one row for each data file of the report under way. A file's row says with which version
the next file begins. It is written once, after the file is stored. The first worker that writes it has made that file,
and a second worker goes on from there. So one worker or several make a report, and no version is in two of its files.

A worker may stand still at any step, while others end reports and begin new ones. So it deletes only rows of reports
that are surely over. Without the row of its first file, a report would get another first file, and a worker that knows
the old one would go on from where that ended.

The rows are not sealed, since storage nodes know the keys of objects anyway, from their registers. The MD5 of a file is
sealed, since it is computed from content.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection

from storaged.errors import DataDamaged
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import PageQuery, Row
from storaged.objects.code.progress import progress_in
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.records import BucketRecord
from storaged.wire import Message, encode

FORMAT = 1
DIGEST_BYTES = 16

_STATE = b"s"
_FILE = b"f"


class InventoryState(Message, frozen=True):
    """How far one inventory is.

    ``report``: random, of the report that is under way or was made last. ``configuration``: a keyed digest of its
    configuration. ``began_ms``: when it began; ``finished_ms``: 0 while it is under way. The others are of the finished
    report: how many ``rows`` and ``files`` it has, how many keys were ``unreadable``, and the key of its ``manifest``.
    """

    format: int
    report: bytes
    configuration: bytes
    began_ms: int
    finished_ms: int = 0
    rows: int = 0
    files: int = 0
    unreadable: int = 0
    manifest: bytes = b""


class InventoryFile(Message, frozen=True):
    """A data file of a report: its ``key`` in the target, its ``size`` in bytes and its sealed ``md5``. The next file
    begins after the versions of the key ``after``, or in them, below the ordinal ``below``; ``last``: there is none.
    ``rows``, ``unreadable``: of this file and those before it.
    """

    format: int
    report: bytes
    number: int
    key: bytes
    size: int
    md5: bytes
    after: bytes
    below: int
    last: bool
    rows: int
    unreadable: int


def digest_of(inventory_id: str) -> bytes:
    """The part of a row's key that names the inventory."""
    return hashlib.sha256(inventory_id.encode()).digest()[:DIGEST_BYTES]


def _name(bucket: BucketRecord, key: bytes) -> RegisterName:
    return RegisterName(Table.INVENTORY, bucket.id, bucket.shard_numbers[0], key)


def _state_in(value: Value | None) -> InventoryState | None:
    return progress_in(value, InventoryState, FORMAT)


def _file_in(value: Value | None) -> InventoryFile | None:
    return progress_in(value, InventoryFile, FORMAT)


async def read_state(plane: ObjectPlane, bucket: BucketRecord, digest: bytes) -> InventoryState | None:
    """None: there is none, or none that can be read. Raises ServiceUnavailable."""
    return _state_in((await plane.registers.read(_name(bucket, _STATE + digest))).value)


async def begin(
    plane: ObjectPlane, bucket: BucketRecord, digest: bytes, before: InventoryState | None, new: InventoryState
) -> InventoryState:
    """Begins a report, unless the state is not ``before`` any more: then another worker has begun. Returns the state
    that there is. Deletes the rows of the files of earlier reports. Raises ServiceUnavailable, NoSuchBucket.
    """
    body = encode(new)
    earlier = [row.key async for row in _every_row(plane, bucket, _FILE + digest)]  # later, others may begin reports

    def update(value: Value | None) -> Change | None:
        return Change(body) if _state_in(value) == before else None

    found = _state_in((await plane.registers.change(_name(bucket, _STATE + digest), update)).after)
    if found == new:
        await _drop(plane, bucket, earlier)
    return found if found is not None else new


async def finish(
    plane: ObjectPlane, bucket: BucketRecord, digest: bytes, state: InventoryState, finished: InventoryState
) -> bool:
    """Ends the report of ``state``; False: another one has begun. Raises ServiceUnavailable, NoSuchBucket."""
    body = encode(finished)

    def update(value: Value | None) -> Change | None:
        return Change(body) if _state_in(value) == state else None

    return _state_in((await plane.registers.change(_name(bucket, _STATE + digest), update)).after) == finished


async def add_file(plane: ObjectPlane, bucket: BucketRecord, digest: bytes, new: InventoryFile) -> InventoryFile:
    """Adds a data file to its report, unless that has one of this number: returns the one that it has. Raises
    ServiceUnavailable, NoSuchBucket.
    """
    body = encode(new)

    def update(value: Value | None) -> Change | None:
        return Change(body) if _file_in(value) is None else None

    key = _FILE + digest + new.report + new.number.to_bytes(4, "big")
    found = _file_in((await plane.registers.change(_name(bucket, key), update)).after)
    return found if found is not None else new


async def every_file(
    plane: ObjectPlane, bucket: BucketRecord, digest: bytes, report: bytes
) -> AsyncIterator[InventoryFile]:
    """The files of a report, in order. Raises DataDamaged."""
    number = 0
    async for row in _every_row(plane, bucket, _FILE + digest + report):
        found = _file_in(row.value)
        if found is None or found.number != number:
            raise DataDamaged("A row of an inventory cannot be read.")
        number += 1
        yield found


def seal_md5(plane: ObjectPlane, bucket: BucketRecord, report: bytes, number: int, md5: bytes) -> bytes:
    """Of a data file. Raises KeyringUnavailable."""
    return plane.keys.seal_secret(md5, _context(bucket, report, number))


def open_md5(plane: ObjectPlane, bucket: BucketRecord, file: InventoryFile) -> bytes:
    """Raises DataDamaged, KeyringUnavailable."""
    try:
        return plane.keys.open_secret(file.md5, _context(bucket, file.report, file.number))
    except SealBroken as error:
        raise DataDamaged(f"A row of an inventory does not open: {error}") from None


def _context(bucket: BucketRecord, report: bytes, number: int) -> tuple[bytes, ...]:
    return (b"inventory file", bucket.id, report, number.to_bytes(4, "big"))


async def drop_files(plane: ObjectPlane, bucket: BucketRecord, digest: bytes, report: bytes) -> None:
    """Deletes the rows of the files of a report that is finished."""
    await _drop(plane, bucket, [row.key async for row in _every_row(plane, bucket, _FILE + digest + report)])


async def drop_all_but(plane: ObjectPlane, bucket: BucketRecord, kept: Collection[bytes] = ()) -> None:
    """Deletes all rows but those of inventories with these digests. States go first: this gateway's configuration may
    be old, and then a report of another gateway is over before it loses a file.
    """
    keys = [row.key async for row in _every_row(plane, bucket, b"")]
    dropped = [key for key in keys if key[1 : 1 + DIGEST_BYTES] not in kept]
    await _drop(plane, bucket, sorted(dropped, key=lambda key: not key.startswith(_STATE)))


async def _drop(plane: ObjectPlane, bucket: BucketRecord, keys: Collection[bytes]) -> None:
    for key in keys:
        await plane.registers.change(_name(bucket, key), lambda _value: Change(b"", Visibility.TOMBSTONE))


async def _every_row(plane: ObjectPlane, bucket: BucketRecord, prefix: bytes) -> AsyncIterator[Row]:
    after: bytes | None = b""
    while after is not None:
        shards = bucket.shard_numbers[:1]
        page = await plane.scanner.list_page(PageQuery(Table.INVENTORY, bucket.id, shards, prefix=prefix, after=after))
        for row in page.rows:
            yield row
        after = page.next_after
