"""The sum of each shard's rows, by which replicas are compared without a look at the rows.

Theory of operation
    The *sum* of a shard (table || scope || shard) is that of the checks of all its rows, as numbers, modulo 2^64. A
    check stands for a row's key, ballot and value, and equal rows have equal checks at all replicas
    (``meta.storage.rowvalue``). So replicas with the same rows have the same sum, and others have the same one by an
    accident of one in 2^64. A node that lies about its rows can as well lie about their sum.

    Each checkpoint changes the sums with the rows, in one transaction. So a sum is always that of the rows beside it,
    whatever was lost or put back. Readers add what the overlays change.

    A shard has a sum from its first row on. Shards of an older store get theirs when it is asked for (``read_slice``):
    between checkpoints their rows are read, a slice at a time; what checkpoints change in the part that was read is
    added.

    A program that knows no sums leaves them as they were. So ``meta`` has the number of the last start of the store in
    which sums were kept. When it is not that of the start before, all sums are removed at the start.

    sub-database   key                                   value
    nodes          table || scope || shard || "sum"      check || the sum (u64 BE)
    meta           NUL "sums"                            check || start of the store (u64 BE)

A sum says nothing about damage: a row whose bytes changed, or that a damaged page lost, still counts in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from storaged.meta.storage.cursor import StoredRows
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.rowkey import walk
from storaged.meta.storage.rowvalue import MASK, NAME_PREFIX_BYTES, check_number, open_number, seal_number
from storaged.meta.store_ports import RowDamaged

SLICE_ROWS = 1_000
"""Read at once of a shard without a sum: some milliseconds, in which no checkpoint is made."""

WANTED_MAX = 65_536

_SUM = b"sum"
_STARTS = b"\0sums"

StoredRow = tuple[bytes, bytes, bytes, bytes]
"""Key in ``rows``, table || scope || shard, key, row."""


def _key(prefix: bytes) -> bytes:
    return prefix + _SUM


def stored_sum(transaction: Transaction, nodes: Database, prefix: bytes) -> int | None:
    """The sum of a shard's rows in LMDB; None where it is not known. Raises lmdb.Error."""
    key = _key(prefix)
    sealed = transaction.get(key, db=nodes)
    try:
        return None if sealed is None else open_number(key, bytes(sealed))
    except RowDamaged:
        return None


def begin_start(transaction: Transaction, nodes: Database, meta: Database, starts: int) -> None:
    """At a start of the store, the ``starts``-th: removes the sums if another program may have changed rows since they
    were kept. Raises lmdb.Error.
    """
    try:
        kept = open_number(_STARTS, transaction.get(_STARTS, b"", db=meta))
    except RowDamaged:  # or missing
        kept = 0
    if kept != starts - 1:
        with transaction.cursor(nodes) as cursor:
            stale = [key for key in cursor.iternext(values=False) if len(key) == NAME_PREFIX_BYTES + len(_SUM)]
        for key in stale:
            transaction.delete(key, db=nodes)
    transaction.put(_STARTS, seal_number(_STARTS, starts), db=meta)


class Sums:
    """The sums of one store, as its checkpoints change them. The holder of the checkpointer's lock calls. After a
    transaction that was not committed a new object takes its place.
    """

    def __init__(self, databases: Mapping[bytes, Database]) -> None:
        self._nodes = databases[b"nodes"]
        self._building = b""
        """The shard whose sum is being built."""
        self._through = b""
        """Up to this key its rows are in ``_sum``."""
        self._sum = 0

    def change(
        self,
        transaction: Transaction,
        rows: Sequence[StoredRow],
        stamps_before: Mapping[bytes, bytes],
        fresh: Iterable[bytes],
    ) -> None:
        """``rows`` take the place of those with ``stamps_before`` (by key in ``rows``). ``fresh``: the shards that had
        no rows. Raises lmdb.Error.
        """
        changes = dict.fromkeys(fresh, 0)
        known = dict.fromkeys(changes, 0)
        for at, prefix, key, row in rows:
            change = check_number(row) - check_number(stamps_before.get(at, b""))
            changes[prefix] = changes.get(prefix, 0) + change
            if prefix == self._building and key <= self._through:
                self._sum += change
        for prefix, change in changes.items():
            before = known.get(prefix)
            if before is None:
                before = stored_sum(transaction, self._nodes, prefix)
            if before is not None:
                self._put(transaction, prefix, before + change)

    def _put(self, transaction: Transaction, prefix: bytes, total: int) -> None:
        key = _key(prefix)
        transaction.put(key, seal_number(key, total & MASK), db=self._nodes)

    def read_slice(self, transaction: Transaction, prefix: bytes, root: int) -> int | None:
        """Reads on in the rows of a shard without a sum. Its sum, once all of them were read; None before. Raises
        RowDamaged, lmdb.Error.
        """
        if prefix != self._building:
            self._building, self._through, self._sum = prefix, b"", 0
        found = walk(StoredRows(transaction), root, after=self._through, prefix=b"", limit=SLICE_ROWS)
        self._sum += sum([check_number(value) for _, value in found])
        if len(found) < SLICE_ROWS:
            self._building = b""
            return self._sum & MASK
        self._through = found[-1][0]
        return None

    def note(self, transaction: Transaction, prefix: bytes, total: int) -> None:
        """No checkpoint was made since ``read_slice`` returned it. Raises lmdb.Error."""
        self._put(transaction, prefix, total)
