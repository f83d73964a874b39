"""Rows of listings that were opened lately, so that listing a bucket again opens, and prints, only what is new in it.

A row counts only for the very head that it was made of, at its own key, and while the bucket key is held that was at hand when it was opened: so it is never stale, and
goes with that key, as what a read opened does (``objects.opened``). What is kept is in memory only, and bounded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakSet

from storaged.objects.api import ListedObject
from storaged.objects.ports import BucketKey

ROW_BYTES = 600
"""What a row takes besides its key and head, printed text included."""

Rows = dict[bytes, ListedObject]


class ListedLately:
    """Rows in two generations, together about ``bytes_max``: when the younger one is half of that, it becomes the older one, and the older one is forgotten. A row of
    the older one that is asked for is young again."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._met: WeakSet[BucketKey] = WeakSet()
        self._young: WeakKeyDictionary[BucketKey, Rows] = WeakKeyDictionary()
        self._old: WeakKeyDictionary[BucketKey, Rows] = WeakKeyDictionary()

    def meet(self, bucket_key: BucketKey, gone: Callable[[], None]) -> None:
        """``gone`` is called when the key was let go of, so that what else is remembered of its bucket goes with it."""
        if bucket_key not in self._met:
            self._met.add(bucket_key)
            weakref.finalize(bucket_key, gone).atexit = False

    def find(self, bucket_key: BucketKey, keys: Sequence[bytes], heads: Sequence[bytes]) -> list[ListedObject | None]:
        """Of each key the row, if it was made of this head."""
        known = _matching(self._young.get(bucket_key, {}), keys, heads)
        old = self._old.get(bucket_key)
        if not old or None not in known:
            return known
        for index, row in enumerate(_matching(old, keys, heads)):
            if row is not None and known[index] is None:
                known[index] = row
                self.keep(bucket_key, [keys[index]], [row])
        return known

    def keep(self, bucket_key: BucketKey, keys: Sequence[bytes], rows: Sequence[ListedObject]) -> None:
        """No more at a time than a page has."""
        if self._bytes >= self._bytes_max // 2:
            self._old, self._young, self._bytes = self._young, WeakKeyDictionary(), 0
        self._young.setdefault(bucket_key, {}).update(zip(keys, rows, strict=True))
        self._bytes += len(rows) * ROW_BYTES + sum(map(len, keys)) + sum([len(row.head) for row in rows])

    def clear(self) -> None:
        self._young.clear()
        self._old.clear()
        self._bytes = 0


def _matching(rows: Rows, keys: Sequence[bytes], heads: Sequence[bytes]) -> list[ListedObject | None]:
    return [row if row is not None and row.head == head else None for row, head in zip(map(rows.get, keys), heads, strict=True)]
