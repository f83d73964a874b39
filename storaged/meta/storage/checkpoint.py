"""Puts into LMDB what a batch or an overlay holds: rows get their node, what is small its sub-database, pages their
age.
"""

from __future__ import annotations

from collections.abc import Sequence

from storaged.meta.storage.heap import Heap
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.lookup import PAGE_AGE_BYTES
from storaged.meta.storage.overlay import Overlay, Ready
from storaged.meta.storage.rowkey import SEGMENT_BYTES, link_key, row_key, split
from storaged.meta.storage.rowvalue import open_small, seal_small

ROOTS_CACHED_MAX = 65_536
_NEXT_NODE = b"next"


class Applier:
    """For one store's checkpoints, one at a time. A transaction that is not committed must be the last: roots made in
    it are remembered.
    """

    def __init__(self, databases: dict[bytes, Database]) -> None:
        self._databases = databases
        self._rows = databases[b"rows"]
        self._heap = Heap(self._rows, databases[b"heap"], databases[b"meta"])
        self._roots: dict[bytes, int] = {}

    def apply(self, transaction: Transaction, overlay: Overlay) -> None:
        """In the order of the keys, so that neighbours share their page's copy. Raises lmdb.Error, RowDamaged."""
        rows: list[tuple[bytes, bytes, bytes, bytes]] = []
        for prefix in sorted(overlay.rows):
            root = self._root(transaction, prefix)
            for key, row in sorted(overlay.rows[prefix].items()):
                node, segment = (root, key) if len(key) <= SEGMENT_BYTES else self._node(transaction, root, key)
                rows.append((row_key(node, segment), prefix, key, row))
        self._heap.put(transaction, rows)
        for (database, key), value in overlay.others.items():
            if value is None:
                transaction.delete(key, db=self._databases[database])
            else:
                transaction.put(key, value, db=self._databases[database])

    def _root(self, transaction: Transaction, scope_key: bytes) -> int:
        root = self._roots.get(scope_key)
        if root is None:
            sealed = transaction.get(scope_key, db=self._databases[b"nodes"])
            if sealed is None:
                root = self._new_node(transaction)
                transaction.put(scope_key, seal_small(scope_key, root.to_bytes(8, "big")), db=self._databases[b"nodes"])
            else:
                root = int.from_bytes(open_small(scope_key, sealed), "big")
            if len(self._roots) >= ROOTS_CACHED_MAX:
                self._roots.clear()
            self._roots[scope_key] = root
        return root

    def _node(self, transaction: Transaction, node: int, key: bytes) -> tuple[int, bytes]:
        """The node and segment of a long key; links that are missing are made."""
        links, segment = split(key)
        for part in links:
            link = link_key(node, part)
            sealed = transaction.get(link, db=self._rows)
            if sealed is None:
                node = self._new_node(transaction)
                transaction.put(link, seal_small(link, node.to_bytes(8, "big")), db=self._rows)
            else:
                node = int.from_bytes(open_small(link, sealed), "big")
        return node, segment

    def _new_node(self, transaction: Transaction) -> int:
        nodes = self._databases[b"nodes"]
        sealed = transaction.get(_NEXT_NODE, db=nodes)
        node = 1 if sealed is None else int.from_bytes(open_small(_NEXT_NODE, sealed), "big")
        transaction.put(_NEXT_NODE, seal_small(_NEXT_NODE, (node + 1).to_bytes(8, "big")), db=nodes)
        return node


def apply_pages(transaction: Transaction, entries: Sequence[Ready]) -> None:
    """Puts pages, and deletes stale ones, which it counts. Raises lmdb.Error."""
    for entry in entries:
        for page in entry.pages:
            transaction.put(page.page_hash, page.created_ms.to_bytes(PAGE_AGE_BYTES, "big") + page.body)
        for page_hash, created_ms in entry.stale_pages:
            stored = transaction.get(page_hash)
            if stored is not None and stored[:PAGE_AGE_BYTES] == created_ms.to_bytes(PAGE_AGE_BYTES, "big"):
                transaction.delete(page_hash)
                entry.deleted += 1
