"""What was written to a disk's shards lately, so that what was found of their rows before can be known to be so still,
without looking. In memory only.

Theory of operation
    A shard's *count* moves before its rows change and once more after, so a count that is read before a snapshot of the
    rows and is the same later stands for that
    snapshot: nothing changed since. An odd count stands for nothing: rows change while it is this. Shards share counts
    by hash; whose count has moved may have changed. Beside each count lie the keys that were written last, with what
    the count was after them: what was found of a range is still so when none of the keys written since is in it. A
    write that was under way when the count was read is
    among these.

    The event loop writes and reads. Another thread may read meanwhile, each look at a table being a single step of the
    interpreter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from storaged.units import MIB

COUNTS = 4_096
KEYS_OF_ONE_MAX = 64
BYTES_MAX = 6 * MIB
"""Of all shards together: 15,000 keys of 30 bytes, when every count has some."""

_KEY_BYTES = 200
_WRITTEN_BYTES = 900
"""What is kept of a key besides it, and of a count."""


class _Written:
    """``keys``: (count after it, table || scope || shard, key), oldest first. ``forgotten``: the count after the last
    one that is not there any more.
    """

    __slots__ = ("forgotten", "keys")

    def __init__(self, forgotten: int) -> None:
        self.keys: deque[tuple[int, bytes, bytes]] = deque()
        self.forgotten = forgotten


Touched = set[int]
"""Counts that are odd."""


class Changes:
    """Of one store since it was opened. ``prefix`` is always a shard's: table || scope || shard."""

    def __init__(self) -> None:
        self._counts = [0] * COUNTS
        self._written: dict[int, _Written] = {}
        self._bytes = 0

    def of(self, prefix: bytes) -> int:
        """The shard's count."""
        return self._counts[hash(prefix) % COUNTS]

    def since(self, count: int, prefix: bytes, *, after: bytes, key_prefix: bytes, through: bytes | None) -> bool:
        """May rows with key > ``after`` and the prefix, up to ``through`` (None: to the end), have changed since the
        count was this?
        """
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
    def counting(self, rows: Sequence[tuple[bytes, bytes]]) -> Iterator[None]:
        """While rows, (prefix, key), change."""
        touched = self.begin(rows)
        try:
            yield
        finally:
            self.end(touched)

    def begin(self, rows: Iterable[tuple[bytes, bytes]]) -> Touched:
        """Before rows, (prefix, key), change; ``end`` is to follow, whatever comes of it."""
        if self._bytes > BYTES_MAX:
            self._written, self._bytes = {}, 0
        counts, all_written, size = self._counts, self._written, 0
        touched: Touched = set()
        for prefix, key in rows:
            at = hash(prefix) % COUNTS
            touched.add(at)
            written = all_written.get(at)
            if written is None:
                written = all_written[at] = _Written(counts[at])
                size += _WRITTEN_BYTES
            keys = written.keys
            keys.append((counts[at] + 2, prefix, key))
            size += _KEY_BYTES + len(key)
            if len(keys) > KEYS_OF_ONE_MAX:
                written.forgotten = keys[0][0]  # before it is gone, for who looks meanwhile
                _, _, oldest = keys.popleft()
                size -= _KEY_BYTES + len(oldest)
        self._bytes += size
        self.end(touched)
        return touched

    def end(self, touched: Touched) -> None:
        counts = self._counts
        for at in touched:
            counts[at] += 1
