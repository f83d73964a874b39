"""Records that were opened lately, so that a key that is read often is opened once.

A client that downloads a large object asks for it in many ranges, and most ask HEAD before GET; each request reads the
record from a majority anyway, but need not
decode it, unwrap its key and open its metadata anew. An entry counts only for the very bytes that it was made of, under
the very key that opened them: so it is never
stale, and of no use once the bucket's key is no longer held (``KeyService.try_bucket_key``). What is kept is in
memory only, and bounded.

An entry has a data key in the clear, so it lives no longer than the bucket's key in this process, but for a turn of the
event loop: entries do not hold that key, and
go with it, be it that it expired, was pushed out, or that the keyring was closed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakSet

from storaged.meta.names import Value
from storaged.objects.api import ObjectInfo
from storaged.objects.background import when_gone
from storaged.objects.ports import BucketKey
from storaged.sov1 import StreamKey

if TYPE_CHECKING:
    from storaged.objects.code.versions import OpenedVersion

ENTRY_BYTES = 1536
"""What an entry takes besides what comes from its record, which is there encoded, decoded but for what was sealed, and
opened: 2.6 times, as measured with metadata of
40 bytes and of 1,600."""


class Opened:
    """A key's current version, opened: ``body`` and ``visibility`` are those of the register's value, ``bucket_key()``
    what opened it, or None when that has gone. ``info`` and ``key`` (of the
    only part) are filled in by who needs them first. The key, not its cipher: that takes another 7 KiB, and saves 1
    us."""

    __slots__ = ("body", "bucket_key", "info", "key", "opened", "visibility")

    def __init__(self, value: Value, bucket_key: BucketKey, opened: OpenedVersion) -> None:
        self.body = value.body
        self.visibility = value.visibility
        self.bucket_key = weakref.ref(bucket_key)
        self.opened = opened
        self.info: ObjectInfo | None = None
        self.key: StreamKey | None = None


class OpenedLately:
    """The entries used last, by (bucket id, key), in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[tuple[bytes, bytes], Opened] = OrderedDict()
        self._met: WeakSet[BucketKey] = WeakSet()
        """The bucket keys of entries, each watched since its first."""

    def get(self, place: tuple[bytes, bytes], value: Value) -> Opened | None:
        """None unless it was made of this very value. The caller compares ``bucket_key`` with the
        one that is at hand.
        """
        found = self._kept.get(place)
        if found is None or found.body != value.body or found.visibility != value.visibility:
            return None
        self._kept.move_to_end(place)
        return found

    def keep(self, place: tuple[bytes, bytes], opened: Opened) -> None:
        bucket_key = opened.bucket_key()
        if bucket_key is None:
            return
        self.drop(place)
        self._kept[place] = opened
        self._bytes += _cost(opened)
        while self._bytes > self._bytes_max:
            self._bytes -= _cost(self._kept.popitem(last=False)[1])
        if bucket_key not in self._met:
            self._met.add(bucket_key)
            when_gone(bucket_key, self._drop_orphans)

    def drop(self, place: tuple[bytes, bytes]) -> None:
        before = self._kept.pop(place, None)
        if before is not None:
            self._bytes -= _cost(before)

    def _drop_orphans(self) -> None:
        for place, opened in list(self._kept.items()):
            if opened.bucket_key() is None:
                self.drop(place)

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)


def _cost(opened: Opened) -> int:
    return ENTRY_BYTES + len(opened.body) * 8 // 3
