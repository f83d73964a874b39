"""What was shown of rows of listings lately, so that listing a bucket again opens, and prints, only what is new in it.

It is kept when a page is mostly of what was listed before: a bucket that is listed once, from one end to the other,
pays nothing for it, and pushes nothing out.
A row counts only for the very head that it was made of, at its own key, and while the bucket key is held that was at
hand when it was opened: so it is never stale, and
goes with that key, as what a read opened does (``objects.cache.opened_records``). What is kept is in memory only, and
bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from storaged.objects.api import Show
from storaged.objects.background import when_gone
from storaged.objects.ports import BucketKey

ROW_BYTES = 450
"""What a row takes besides its key and head: what the S3 front shows of it, and its places in two tables."""


class _Rows:
    """By key: the head of each row, and what was shown of it."""

    __slots__ = ("heads", "shown")

    def __init__(self) -> None:
        self.heads: dict[bytes, bytes] = {}
        self.shown: dict[bytes, Any] = {}


_Generation = WeakKeyDictionary[BucketKey, dict[Show, _Rows]]


class ListedLately:
    """Rows in two generations, together about ``bytes_max``: when the younger one is half of that, it becomes the older
    one, and the older one is forgotten. A row of
    the older one that is asked for is young again."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._met: WeakSet[BucketKey] = WeakSet()
        self._young: _Generation = WeakKeyDictionary()
        self._old: _Generation = WeakKeyDictionary()

    def meet(self, bucket_key: BucketKey, gone: Callable[[], None]) -> None:
        """``gone`` is called on this event loop soon after the key was let go of, so that what else is remembered of
        its bucket goes with it.
        """
        if bucket_key not in self._met:
            self._met.add(bucket_key)
            when_gone(bucket_key, gone)

    def find(self, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes]) -> list[Any]:
        """Of each key what ``show`` made of it, if that was of this head; else None."""
        known = _matching(self._young, bucket_key, show, keys, heads)
        if None in known and bucket_key in self._old:
            old = _matching(self._old, bucket_key, show, keys, heads)
            again = [index for index, shown in enumerate(old) if shown is not None and known[index] is None]
            for index in again:
                known[index] = old[index]
            self.keep(
                bucket_key,
                show,
                [keys[index] for index in again],
                [heads[index] for index in again],
                [old[index] for index in again],
            )
        return known

    def keep(
        self, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes], shown: Sequence[Any]
    ) -> None:
        """No more at a time than a page has."""
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


def _matching(
    generation: _Generation, bucket_key: BucketKey, show: Show, keys: Sequence[bytes], heads: Sequence[bytes]
) -> list[Any]:
    rows = generation.get(bucket_key, {}).get(show)
    if rows is None:
        return [None] * len(keys)
    shown = list(map(rows.shown.get, keys))
    same = list(map(eq, map(rows.heads.get, keys), heads))
    return shown if all(same) else [its if equal else None for its, equal in zip(shown, same, strict=True)]
