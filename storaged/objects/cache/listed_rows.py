"""A cache of what listings showed of rows, so that listing a bucket again opens and prints only the rows that are new.

Rows are cached when most of a page was listed before. So a bucket that is listed once, from one end to the other, costs
nothing and evicts nothing. A row counts only for exactly the head that it was made of, at its own key, and while the
bucket key is held that opened it: so it is never stale, and is dropped with that key, as opened records are
(``objects.cache.opened_records``). The cache is in memory only, and bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from storaged.objects.background import when_gone
from storaged.objects.listing_types import Show
from storaged.objects.ports import BucketKey

ROW_BYTES = 450
"""Memory of a row besides its key and head: what the S3 front shows of it, and its places in two tables."""


class _Rows:
    """By key: the head of each row, and what was shown of it."""

    __slots__ = ("heads", "shown")

    def __init__(self) -> None:
        self.heads: dict[bytes, bytes] = {}
        self.shown: dict[bytes, Any] = {}


_Generation = WeakKeyDictionary[BucketKey, dict[Show, _Rows]]


class ListedRowCache:
    """Rows in two generations, together about ``bytes_max``. When the young one has half of that, it becomes the old
    one, and the old one is dropped. A hit in the old one moves the row to the young one.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._watched: WeakSet[BucketKey] = WeakSet()
        self._young: _Generation = WeakKeyDictionary()
        self._old: _Generation = WeakKeyDictionary()

    def watch(self, bucket_key: BucketKey, on_gone: Callable[[], None]) -> None:
        """Calls ``on_gone`` on this event loop soon after the key is gone, so that other cached data of its bucket is
        dropped with it.
        """
        if bucket_key not in self._watched:
            self._watched.add(bucket_key)
            when_gone(bucket_key, on_gone)

    def find(self, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes]) -> list[Any]:
        """For each key what ``show`` made of it, if it was made of this head; otherwise None."""
        known = _find(self._young, bucket_key, show, keys, heads)
        if None in known and bucket_key in self._old:
            old = _find(self._old, bucket_key, show, keys, heads)
            again = [index for index, shown in enumerate(old) if shown is not None and known[index] is None]
            for index in again:
                known[index] = old[index]
            self.put(
                bucket_key,
                show,
                [keys[index] for index in again],
                [heads[index] for index in again],
                [old[index] for index in again],
            )
        return known

    def put(
        self, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes], shown: Sequence[Any]
    ) -> None:
        """At most a page at a time."""
        if self._bytes >= self._bytes_max // 2:
            self._old, self._young, self._bytes = self._young, WeakKeyDictionary(), 0
        shows = self._young.get(bucket_key)
        if shows is None:
            shows = self._young[bucket_key] = {}
        rows = shows.setdefault(show, _Rows())
        rows.heads.update(zip(keys, heads, strict=True))
        rows.shown.update(zip(keys, shown, strict=True))
        self._bytes += len(keys) * ROW_BYTES + sum(map(len, keys)) + sum(map(len, heads))

    def clear(self) -> None:
        self._young.clear()
        self._old.clear()
        self._bytes = 0


def _find(
    generation: _Generation, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes]
) -> list[Any]:
    rows = generation.get(bucket_key, {}).get(show)
    if rows is None:
        return [None] * len(keys)
    shown = list(map(rows.shown.get, keys))
    same = list(map(eq, map(rows.heads.get, keys), heads))
    return shown if all(same) else [its if equal else None for its, equal in zip(shown, same, strict=True)]
