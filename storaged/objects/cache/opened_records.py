"""A cache of opened records, so that a record that is read often is opened once.

A client that downloads a large object asks for many ranges, and most clients send HEAD before GET. Each request reads
the record from a majority anyway, but it need not decode it, unwrap its key and open its metadata again. An entry
counts only for exactly the bytes that it was made of, under the key that opened them: so it is never stale, and of no
use once the bucket's key is gone (``KeyService.try_bucket_key``). The cache is in memory only, and bounded.

An entry has a data key in the clear, so it must not live longer than the bucket's key in this process, except for a
turn of the event loop. Entries hold only a weak reference to that key and are dropped with it: when it expires, when
the key cache evicts it, or when the keyring is closed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from weakref import WeakSet

from storaged.meta.names import RegisterName, Value
from storaged.objects.api import ObjectInfo
from storaged.objects.background import when_gone
from storaged.objects.code.versions import OpenedVersion
from storaged.objects.ports import BucketKey
from storaged.objects.records import Lock
from storaged.sov1 import StreamKey

ENTRY_BYTES = 1536
"""Memory of an entry besides what depends on its record. The record is there encoded, decoded without the sealed
fields, and opened: 2.6 times its bytes, as measured with metadata of 40 and of 1,600 bytes.
"""


class OpenedRecord:
    """A key's current version, opened. ``version_id``: as clients name it.

    ``body`` and ``visibility`` are those of the register's value. ``bucket_key()``
    is the key that opened it, or None when that key is gone. ``info`` and ``key`` (of the only part) are filled in at
    first use. ``key`` is not its cipher, which would take another 7 KiB and save 1 us. ``steady``: the key had this
    record when it was last looked at, and replicas agreed at once. ``with_data``: of a version that borrows its data,
    the register that had the data when it was last looked up, and the version with it (``read.borrowed``).
    """

    __slots__ = (
        "body", "bucket_key", "info", "key", "lock", "opened", "steady", "version_id", "visibility", "with_data",
    )  # fmt: skip

    def __init__(
        self,
        value: Value | OpenedRecord,
        bucket_key: BucketKey,
        opened: OpenedVersion,
        version_id: str = "",
        lock: Lock | None = None,
    ) -> None:
        """``value``: the register's, or an entry that was made of it."""
        self.body: bytes = value.body
        self.visibility: int = value.visibility
        self.bucket_key = weakref.ref(bucket_key)
        self.opened = opened
        self.version_id = version_id
        self.lock = lock
        self.info: ObjectInfo | None = None
        self.key: StreamKey | None = None
        self.steady = True
        self.with_data: tuple[RegisterName, OpenedRecord] | None = None

    def learn_data(self, owner: RegisterName, opened: OpenedVersion) -> None:
        """``opened``: the version with the data that the record of ``owner`` has. It has a ``key`` of its own, for that
        of other data would open nothing."""
        bucket_key = self.bucket_key()
        if bucket_key is not None and (self.with_data is None or self.with_data[1].opened.version != opened.version):
            self.with_data = owner, OpenedRecord(self, bucket_key, opened, self.version_id, self.lock)

    def forget_data(self, entry: OpenedRecord) -> None:
        """The data is not where ``entry`` says."""
        if self.with_data is not None and self.with_data[1] is entry:
            self.with_data = None


class OpenedRecordCache:
    """The entries used last, by (bucket id, key), in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._records: OrderedDict[tuple[bytes, bytes], OpenedRecord] = OrderedDict()
        self._watched: WeakSet[BucketKey] = WeakSet()
        """The bucket keys of entries. Each is watched since its first entry."""

    def get(self, place: tuple[bytes, bytes], value: Value) -> OpenedRecord | None:
        """None unless the entry was made of this very value. The caller compares ``bucket_key`` with the key that it
        has.
        """
        found = self._records.get(place)
        if found is None or found.body != value.body or found.visibility != value.visibility:
            return None
        self._records.move_to_end(place)
        return found

    def likely(self, place: tuple[bytes, bytes]) -> OpenedRecord | None:
        """The entry that the key's record, which was not read yet, probably fits. None where the last guess was wrong
        or came to nothing, or the record has just changed: then it may do so often.
        """
        found = self._records.get(place)
        return found if found is not None and found.steady else None

    def put(self, place: tuple[bytes, bytes], opened: OpenedRecord) -> None:
        bucket_key = opened.bucket_key()
        if bucket_key is None:
            return
        opened.steady = place not in self._records
        self.drop(place)
        self._records[place] = opened
        self._bytes += _cost(opened)
        while self._bytes > self._bytes_max:
            self._bytes -= _cost(self._records.popitem(last=False)[1])
        if bucket_key not in self._watched:
            self._watched.add(bucket_key)
            when_gone(bucket_key, self._drop_orphans)

    def drop(self, place: tuple[bytes, bytes]) -> None:
        before = self._records.pop(place, None)
        if before is not None:
            self._bytes -= _cost(before)

    def _drop_orphans(self) -> None:
        for place, opened in list(self._records.items()):
            if opened.bucket_key() is None:
                self.drop(place)

    def clear(self) -> None:
        self._records.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)


def _cost(entry: OpenedRecord) -> int:
    entries = 1 if entry.opened.borrowed is None else 2  # ``with_data``
    return entries * ENTRY_BYTES + len(entry.body) * 8 // 3
