"""Tracks recent writes to a disk's shards, to validate cached scans without a look at the rows. In memory only.

Theory of operation
    A shard's *count* rises before its rows change and once more after, so a count that is the same before a snapshot of
    the rows and later validates the snapshot: nothing changed since. An odd count validates nothing: rows are changing
    while it is odd. Shards share counts by hash, so a shard whose count has moved may have changed. Beside each count
    lie the keys that were written last, each with the count after its write: a cached range is still valid when no key
    written since is in it. A write that was under way when the count was read is among these keys.

    The event loop writes and reads. Another thread may read meanwhile, since each access to a table is a single step of
    the interpreter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from storaged.units import MIB

COUNTS = 4_096
KEYS_OF_ONE_MAX = 64
BYTES_MAX = 6 * MIB
"""Of all shards together: 15,000 keys of 30 bytes when each count has some."""

_KEY_BYTES = 200
_WRITTEN_BYTES = 900
"""Overhead in memory of a key, and of a count."""


class _Written:
    """``keys``: (count after it, table || scope || shard, key), oldest first. ``forgotten``: the count after the last
    one that was dropped.
    """

    __slots__ = ("forgotten", "keys")

    def __init__(self, forgotten: int) -> None:
        self.keys: deque[tuple[int, bytes, bytes]] = deque()
        self.forgotten = forgotten


OddCounts = set[int]
"""Indices of the counts that are odd."""


class DirtyRangeTracker:
    """``ports.DirtyRanges`` of one store since it was opened."""

    def __init__(self) -> None:
        self._counts = [0] * COUNTS
        self._written: dict[int, _Written] = {}
        self._bytes = 0

    def count_of(self, prefix: bytes) -> int:
        return self._counts[hash(prefix) % COUNTS]

    def changed_since(
        self, count: int, prefix: bytes, *, after: bytes, key_prefix: bytes, through: bytes | None
    ) -> bool:
        at = hash(prefix) % COUNTS
        if self._counts[at] == count and not count % 2:
            return False
        written = self._written.get(at)
        if written is None:
            return True
        keys = list(written.keys)
        if written.forgotten > count:
            return True
        return any(
            then > count
            and shard == prefix
            and key > after
            and key.startswith(key_prefix)
            and (through is None or key <= through)
            for then, shard, key in keys
        )

    @contextmanager
    def changing(self, rows: Sequence[tuple[bytes, bytes]]) -> Iterator[None]:
        """While rows, (prefix, key), change."""
        odd = self.begin(rows)
        try:
            yield
        finally:
            self.end(odd)

    def begin(self, rows: Iterable[tuple[bytes, bytes]]) -> OddCounts:
        """Before rows, (prefix, key), change. ``end`` must follow, also after an error."""
        if self._bytes > BYTES_MAX:
            self._written, self._bytes = {}, 0
        counts, all_written, size = self._counts, self._written, 0
        odd: OddCounts = set()
        for prefix, key in rows:
            at = hash(prefix) % COUNTS
            odd.add(at)
            written = all_written.get(at)
            if written is None:
                written = all_written[at] = _Written(counts[at])
                size += _WRITTEN_BYTES
            keys = written.keys
            keys.append((counts[at] + 2, prefix, key))
            size += _KEY_BYTES + len(key)
            if len(keys) > KEYS_OF_ONE_MAX:
                written.forgotten = keys[0][0]  # before it is removed, for a reader in another thread
                _, _, oldest = keys.popleft()
                size -= _KEY_BYTES + len(oldest)
        self._bytes += size
        self.end(odd)
        return odd

    def end(self, odd: OddCounts) -> None:
        counts = self._counts
        for at in odd:
            counts[at] += 1
