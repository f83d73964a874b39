"""What is durable in the redo log and not yet in LMDB: how a batch looks there, and how it is read meanwhile. Pure.

The event loop adds to an overlay, one thread at a start, and both may be read by a checkpoint's thread: each look at
one of its tables is a single step of the interpreter, and a table never shrinks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from storaged.hashes import is_page
from storaged.meta.ports import Done, Slot, StoreBatch, StoredPage
from storaged.meta.storage.redo import BODY_BYTES_MAX
from storaged.meta.storage.rowvalue import pack_row, seal_small
from storaged.units import MIB
from storaged.wire import Buffer, Message, encode


class Table(dict[bytes, bytes]):
    """Rows by key, of one table || scope || shard."""

    __slots__ = ("_ordered",)

    def __init__(self) -> None:
        super().__init__()
        self._ordered: list[bytes] = []

    def ordered(self) -> list[bytes]:
        """The keys in their order: a listing reads a table once for every few rows. By the event loop alone."""
        known = self._ordered
        if len(known) < len(self):  # it never shrinks, and tells its keys in the order in which they came
            self._ordered = known = sorted(known + list(self)[len(known) :])
        return known


Copy = tuple[bytes, Sequence[Buffer]]
"""(encoded fragment header, payload) of a small object's copy."""

ENTRY_BYTES_MAX = BODY_BYTES_MAX - 5
"""What is left of a group for one entry, behind the header of the array."""

BATCH_BYTES_MAX = ENTRY_BYTES_MAX - 2 * MIB
"""Of rows and small values in one batch: it fits a group together with a copy of up to a MiB."""

ENTRY_OVERHEAD = 32
"""A row's prefix, and what says how long each part is, take no more."""


class Ready(Struct):
    """One batch on its way, ready for the disk. ``rows``: (table || scope || shard, key, row). ``others``:
    (sub-database, key, value; None deletes).

    Pages are written to LMDB directly, and so are not among what is logged; ``deleted`` says how many of
    ``stale_pages`` were.
    """

    done: Done
    rows: Sequence[tuple[bytes, bytes, bytes]] = ()
    others: Sequence[tuple[bytes, bytes, bytes | None]] = ()
    pages: Sequence[StoredPage] = ()
    stale_pages: Sequence[tuple[bytes, int]] = ()
    size: int = 0
    """Bytes of the rows, small values and copy, and a little more."""
    copy: Copy | None = None
    kept: Any = None
    """What is told to keep the copy, once it is durable here (``LmdbMetaStore.keep_copies``)."""
    operations: int = 0
    """Rows, small values and pages."""
    deleted: int = 0

    @property
    def changes_rows(self) -> bool:
        """Rows or small values: it goes to the log."""
        return bool(self.rows or self.others)


class Logged(Message, frozen=True):
    """A batch in the redo log: ``rows`` and ``others`` as in ``Ready``; ``copy``: the encoded fragment header and the
    payload of a small copy, or nothing.
    """

    rows: list[tuple[bytes, bytes, bytes]]
    others: list[tuple[bytes, bytes, bytes | None]]
    copy: tuple[bytes, bytes] | None


_decoder = msgspec.msgpack.Decoder(list[Logged])


def ready(batch: StoreBatch, done: Done) -> Ready:
    """Raises ValueError for what can't be stored."""
    rows = [_packed(slot) for slot in batch.slots]
    if len(rows) == 1 and not (batch.meta or batch.fences or batch.unfence or batch.pages):  # a change of a register
        _, key, row = rows[0]
        if (size := len(key) + len(row) + ENTRY_OVERHEAD) <= BATCH_BYTES_MAX:
            return Ready(done, rows, size=size, operations=1)
    others = _others_of(batch) if batch.meta or batch.fences or batch.unfence else ()
    for page in batch.pages:
        if not is_page(page.body, page.page_hash):
            raise ValueError("a page must be stored under its own hash")
    size = 0
    for _, key, row in rows:
        size += len(key) + len(row) + ENTRY_OVERHEAD
    for _, key, value in others:
        size += len(key) + len(value or b"") + ENTRY_OVERHEAD
    if size > BATCH_BYTES_MAX:
        raise ValueError(f"a batch of {size} bytes; the redo log takes {BATCH_BYTES_MAX}")
    return Ready(done, rows, others, batch.pages, size=size, operations=len(rows) + len(others) + len(batch.pages))


_packed_last: tuple[Slot, tuple[bytes, bytes, bytes]] | None = None


def _packed(slot: Slot) -> tuple[bytes, bytes, bytes]:
    """The replicas of one process are given the very same value under the very same ballot, one behind the other: what
    was packed for the first serves the others.
    """
    global _packed_last
    last = _packed_last
    if last is not None and last[0].value is slot.value and last[0].ballot is slot.ballot and last[0].name is slot.name:
        return last[1]
    prefix = slot.name.prefix
    row = prefix, slot.name.key, pack_row(slot, prefix)
    _packed_last = slot, row
    return row


def _others_of(batch: StoreBatch) -> list[tuple[bytes, bytes, bytes | None]]:
    others: list[tuple[bytes, bytes, bytes | None]] = [
        (b"fences", fence.scope, seal_small(fence.scope, bytes([fence.final]) + fence.nonce)) for fence in batch.fences
    ]
    others.extend((b"fences", scope, None) for scope in batch.unfence)
    for name, value in batch.meta.items():
        if not name or name.startswith("\0"):
            raise ValueError(f"not a name for a small value: {name!r}")
        others.append((b"meta", name.encode(), seal_small(name.encode(), value)))
    return others


def encode_group(entries: Sequence[Ready]) -> bytes:
    """The body of a group of the log. ``size`` of a single entry, or of all together up to a MiB, is what a group
    takes.
    """
    group: list[tuple[Any, Any, Any]] = []
    for entry in entries:
        copy = None
        if entry.copy is not None:
            header, payload = entry.copy
            copy = header, payload[0] if len(payload) == 1 else b"".join(payload)
        group.append((entry.rows, entry.others, copy))
    return encode(group)


def decode_group(body: Buffer) -> list[Logged]:
    """Raises msgspec.MsgspecError."""
    return _decoder.decode(body)


class Overlay:
    """The newest of what some groups of the log say."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Table] = {}
        """By table || scope || shard, then by key."""
        self.others: dict[tuple[bytes, bytes], bytes | None] = {}

    def add(self, entries: Iterable[Ready | Logged]) -> None:
        rows, others = self.rows, self.others
        for entry in entries:
            for prefix, key, row in entry.rows:
                table = rows.get(prefix)
                if table is None:
                    table = rows[prefix] = Table()
                table[key] = row
            for database, key, value in entry.others:
                others[database, key] = value


def row_of(overlays: tuple[Overlay, Overlay], prefix: bytes, key: bytes) -> bytes | None:
    """The row of a register that has not reached LMDB. ``overlays``: the fresh one, then the frozen one: what leaves
    the first is in the second by then, and what
    leaves that is in LMDB."""
    for overlay in overlays:
        table = overlay.rows.get(prefix)
        if table is not None and (row := table.get(key)) is not None:
            return row
    return None


def touched(tables: Sequence[Table], *, after: bytes, prefix: bytes, through: bytes | None) -> bool:
    """Whether ``tables`` have rows with key > ``after`` and the prefix, up to ``through`` (None: anywhere)."""
    for table in tables:
        keys = table.ordered()
        first = max(bisect_right(keys, after), bisect_left(keys, prefix))
        if first < len(keys) and keys[first].startswith(prefix) and (through is None or keys[first] <= through):
            return True
    return False


def merged(
    stored: list[tuple[bytes, bytes]], tables: Sequence[Table], *, after: bytes, prefix: bytes, limit: int
) -> list[tuple[bytes, bytes]]:
    """A slice of LMDB (the first ``limit`` rows with key > ``after`` and the prefix) with what ``tables``, oldest
    first, say beside or instead of its rows.
    """
    bound = (
        stored[-1][0] if stored and len(stored) >= limit else None
    )  # behind it LMDB may have rows that were not read
    found = dict(stored)
    for table in tables:
        keys = table.ordered()
        first = max(bisect_right(keys, after), bisect_left(keys, prefix))
        for key in keys[first : first + limit]:
            if not key.startswith(prefix) or (bound is not None and key > bound):
                break
            found[key] = table[key]
    return sorted(found.items())[:limit]
