"""Names and values of registers. Pure.

A register is named by (table, scope, shard, key). ``scope`` is the bucket's id of 16 bytes, or 16 zero bytes in the
system table. The shard decides the ring partition. Every replica keeps the rows of one (table, scope, shard) in the
order of ``key``.

    table    key                                  shard                                  value (objects/records.py)
    OBJECT   the S3 key, UTF-8, 1..1024 bytes     numbers[xxh3-64(key) mod their count]  ObjectRecord
    UPLOAD   S3 key || 0x00 || upload id (16)     the object's shard = upload id[0]      UploadRecord
    PART     upload id (16) || number (u16 BE)    upload id[0]                           PartRecord
    EVENT    one byte of the hash of S3 keys      the objects' shard                     PendingKeys
    LIFECYCLE  "d" || day (u32 BE) || id (16)     numbers[id[0] mod their count]         LifecycleKeys
               "s"                                the first                              LifecycleState
    INVENTORY  "s" || hash of an id (16)          the first                              InventoryState
               "f" || hash || report (16) ||      the first                              InventoryFile
               number (u32 BE)
    SYSTEM   a path: bucket/NAME, user/KEY, ...   0 (the system partition)               by prefix
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, NamedTuple

import xxhash
from msgspec import Meta

from storaged.cluster.layout import SYSTEM_PARTITION, partition_of
from storaged.ids import UPLOAD_ID_BYTES
from storaged.wire import Message

KEY_BYTES_MAX = 1024 + 1 + UPLOAD_ID_BYTES
SYSTEM_SCOPE = bytes(16)
PACKED_HEAD_BYTES = 18
"""Of a packed name: all but the key."""


class Table(IntEnum):
    SYSTEM = 0
    OBJECT = 1
    UPLOAD = 2
    PART = 3
    EVENT = 4
    """Which keys may have events that are not delivered yet (``objects.write.outbox``)."""
    LIFECYCLE = 5
    """What ``objects.lifecycle`` has to look at, by day: derived from the objects."""
    INVENTORY = 6
    """How far the inventories of a bucket are (``objects.inventory``)."""


class RegisterName(NamedTuple):
    table: int
    scope: bytes
    shard: int
    key: bytes

    @property
    def partition(self) -> int:
        return SYSTEM_PARTITION if self.table == Table.SYSTEM else partition_of(self.scope, self.shard)

    def pack(self) -> bytes:
        """table (1) || scope (16) || shard (1) || key: unambiguous, since only the key varies in length."""
        return self.prefix + self.key

    @property
    def prefix(self) -> bytes:
        """What ``pack`` begins with, 18 bytes: the same for all keys of one table, scope and shard."""
        return bytes((self.table,)) + self.scope + bytes((self.shard,))

    @classmethod
    def unpack(cls, data: bytes) -> RegisterName:
        """Raises ValueError for what is no register's name."""
        if not PACKED_HEAD_BYTES < len(data) <= PACKED_HEAD_BYTES + KEY_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes are no register's name")
        return cls(data[0], data[1:17], data[17], data[18:])


def shard_of(key: bytes, numbers: Sequence[int]) -> int:
    """The shard that a key belongs to: one of the bucket's shard ``numbers`` (``BucketRecord.shard_numbers``)."""
    return numbers[xxhash.xxh3_64_intdigest(key) % len(numbers)]


def object_name(bucket_id: bytes, numbers: Sequence[int], key: bytes) -> RegisterName:
    """``numbers``: the bucket's shard numbers, as for ``shard_of``."""
    return RegisterName(Table.OBJECT, bucket_id, shard_of(key, numbers), key)


def event_name(name: RegisterName) -> RegisterName:
    """The register that says whether the object of ``name`` may have events that are not delivered yet."""
    slot = xxhash.xxh3_64_intdigest(name.key) >> 56
    return RegisterName(Table.EVENT, name.scope, name.shard, bytes((slot,)))


UPLOAD_SUFFIX_BYTES = 17
"""Of an upload's key, after the object's: 0x00, and its id."""


def upload_name(bucket_id: bytes, key: bytes, upload_id: bytes) -> RegisterName:
    return RegisterName(Table.UPLOAD, bucket_id, upload_id[0], key + b"\0" + upload_id)


def object_of_upload(name: RegisterName) -> RegisterName:
    """The register of the object that an upload's register belongs to."""
    return RegisterName(Table.OBJECT, name.scope, name.shard, name.key[:-UPLOAD_SUFFIX_BYTES])


def part_name(bucket_id: bytes, upload_id: bytes, number: int) -> RegisterName:
    return RegisterName(Table.PART, bucket_id, upload_id[0], upload_id + number.to_bytes(2, "big"))


def system_name(path: str) -> RegisterName:
    return RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, path.encode())


class Visibility(IntEnum):
    """What a listing of current objects does with a row."""

    TOMBSTONE = 0
    """Deleted: the register stays for its sequence number, no listing shows it."""
    HIDDEN = 1
    """There is something (older versions under a delete marker), but a plain listing does not show it."""
    LIVE = 2


SEQUENCE_MAX = 1 << 62


class Value(Message, frozen=True):
    """What a register holds. ``sequence`` grows with every change and survives deletes. ``operation`` is the id of the
    change that made it, so that a proposer can tell its own change from another's after an unknown outcome. ``payload``
    is the data id (16 bytes) of a small object whose copies are on the disks of this register's replicas, or empty.

    A value with another sequence does not decode: a replica that lies must not lead a register to where its sequences
    end. Nor does one with a visibility that no row can hold: a proposer would carry it to replicas that can't store it.
    """

    sequence: Annotated[int, Meta(ge=0, le=SEQUENCE_MAX)]
    operation: bytes
    visibility: Annotated[int, Meta(ge=0, le=255)]
    body: bytes
    payload: bytes = b""


class Change(NamedTuple):
    """What an update function wants the register to become."""

    body: bytes
    visibility: int = Visibility.LIVE
    payload: bytes = b""


class Ballot(NamedTuple):
    """Ordered as a tuple. ``epoch`` of the layout, ``counter`` (microseconds or more), proposer ``node`` name, boot
    ``incarnation`` (8 bytes).
    """

    epoch: int
    counter: int
    node: str
    incarnation: bytes


ZERO_BALLOT = Ballot(0, 0, "", b"")
