"""A batch of changes on its way to the disk, and its bytes in a group of the redo log. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from storaged.hashes import is_page
from storaged.meta.storage.redo import BODY_BYTES_MAX
from storaged.meta.storage.rowvalue import pack_row, seal_small
from storaged.meta.store_ports import Done, Fence, Slot, StoreBatch, StoredPage
from storaged.units import MIB
from storaged.wire import Buffer, Message, decoder_of, encode

LoggedCopy = tuple[bytes, Sequence[Buffer]]
"""(encoded fragment header, payload) of a small object's copy."""

ENTRY_BYTES_MAX = BODY_BYTES_MAX - 5
"""One entry of a group: what the header of the array leaves."""

BATCH_BYTES_MAX = ENTRY_BYTES_MAX - 2 * MIB
"""Of rows and small values in one batch: a group then also has room for a copy of up to a MiB."""

FINAL, LENDS = 1, 2
"""Flags of a fence, in the byte before its nonce. A final fence never lends, whatever its flags say."""

ENTRY_OVERHEAD = 32
"""Upper bound of a row's prefix and of the lengths of its parts."""


class PackedBatch(Struct):
    """One batch in the form that the disk takes. ``rows``: (table || scope || shard, key, row; an empty row deletes).
    ``others``: (sub-database, key, value; None deletes).

    Pages are not logged, since they are written to LMDB directly. ``deleted`` counts the ``stale_pages`` that were
    deleted.
    """

    on_done: Done
    rows: Sequence[tuple[bytes, bytes, bytes]] = ()
    others: Sequence[tuple[bytes, bytes, bytes | None]] = ()
    pages: Sequence[StoredPage] = ()
    stale_pages: Sequence[tuple[bytes, int]] = ()
    size: int = 0
    """Bytes of the rows, small values and copy, and a little more."""
    copy: LoggedCopy | None = None
    copy_write: Any = None
    """Passed to ``StoreHooks.keep_copies`` once the copy is durable in the log."""
    operations: int = 0
    """Rows, small values and pages."""
    deleted: int = 0

    @property
    def changes_rows(self) -> bool:
        """Whether it has rows or small values, and so goes to the log."""
        return bool(self.rows or self.others)


class LoggedBatch(Message, frozen=True):
    """A batch in the redo log: ``rows`` and ``others`` as in ``PackedBatch``; ``copy``: the encoded fragment header and
    the payload of a small copy, or nothing.
    """

    rows: list[tuple[bytes, bytes, bytes]]
    others: list[tuple[bytes, bytes, bytes | None]]
    copy: tuple[bytes, bytes] | None


_decode = decoder_of(list[LoggedBatch])


def pack_batch(batch: StoreBatch, on_done: Done) -> PackedBatch:
    """Raises ValueError for what can't be stored."""
    rows = [_packed(slot) for slot in batch.slots]
    if batch.gone:
        rows += [(name.prefix, name.key, b"") for name in batch.gone]
    if len(rows) == 1 and not (batch.meta or batch.fences or batch.unfence or batch.pages):  # a change of a register
        _, key, row = rows[0]
        if (size := len(key) + len(row) + ENTRY_OVERHEAD) <= BATCH_BYTES_MAX:
            return PackedBatch(on_done, rows, size=size, operations=1)
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
    operations = len(rows) + len(others) + len(batch.pages)
    return PackedBatch(on_done, rows, others, batch.pages, size=size, operations=operations)


_packed_last: tuple[Slot, tuple[bytes, bytes, bytes]] | None = None


def _packed(slot: Slot) -> tuple[bytes, bytes, bytes]:
    """The replicas of one process get the same value object under the same ballot in turn: the row packed for the
    first serves the others.
    """
    global _packed_last
    last = _packed_last
    if (
        last is not None
        and last[0].value is slot.value
        and last[0].ballot is slot.ballot
        and last[0].name is slot.name
        and last[0].copied is slot.copied
    ):
        return last[1]
    prefix = slot.name.prefix
    row = prefix, slot.name.key, pack_row(slot, prefix)
    _packed_last = slot, row
    return row


def _others_of(batch: StoreBatch) -> list[tuple[bytes, bytes, bytes | None]]:
    others: list[tuple[bytes, bytes, bytes | None]] = [
        (b"fences", fence.scope, seal_small(fence.scope, bytes((_flags(fence),)) + fence.nonce))
        for fence in batch.fences
    ]
    others.extend((b"fences", scope, None) for scope in batch.unfence)
    for name, value in batch.meta.items():
        if not name or name.startswith("\0"):
            raise ValueError(f"not a name for a small value: {name!r}")
        others.append((b"meta", name.encode(), seal_small(name.encode(), value)))
    return others


def _flags(fence: Fence) -> int:
    return FINAL if fence.final else LENDS if fence.lends else 0


def fence_of(scope: bytes, stored: bytes) -> Fence:
    """From its flags and its nonce."""
    final = bool(stored[0] & FINAL)
    return Fence(scope, stored[1:], final, bool(stored[0] & LENDS) and not final)


def encode_group(batches: Sequence[PackedBatch]) -> bytes:
    """The body of a group of the log. It takes no more bytes than the ``size`` of a single batch, or the sizes of
    several together up to a MiB.
    """
    group: list[tuple[Any, Any, Any]] = []
    for batch in batches:
        copy = None
        if batch.copy is not None:
            header, payload = batch.copy
            copy = header, payload[0] if len(payload) == 1 else b"".join(payload)
        group.append((batch.rows, batch.others, copy))
    return encode(group)


def decode_group(body: Buffer) -> list[LoggedBatch]:
    """Raises msgspec.MsgspecError."""
    return _decode(body)
