"""Keys of up to 1,041 bytes, in order, in a map whose own keys end at 511 bytes (LMDB's). Pure.

Theory of operation
    All rows live in one ordered map. A row's key there is

        node (u64 BE) || segment (up to 480 bytes)            a row
        node (u64 BE) || segment (480 bytes) || 0x01          a link: its value names a child node

    A *node* is a region of the map: one per (table, scope, shard), the root, and one per 480-byte prefix that longer
    keys share. The first 480 bytes of a longer key lead over the link to the child node, and the rest is a key in that
    node; 1,041 bytes are three levels. A link's key is one byte longer than any row's, so the two can't be confused. It
    sorts directly after the row whose segment it extends (if there is one) and before every other row: first the exact
    key, then all keys that continue it, which is byte order.

    The walk is written once, here, over a narrow view of the map (``Rows``), so that its order is proved on a dict and
    used on LMDB.
"""

from __future__ import annotations

from typing import Protocol

from storaged.meta.names import KEY_BYTES_MAX

SEGMENT_BYTES = 480
NODE_BYTES = 8
ROW_KEY_BYTES_MAX = NODE_BYTES + SEGMENT_BYTES + 1

LINK_MARK = b"\x01"

assert ROW_KEY_BYTES_MAX + 1 <= 511, "seeking after a link takes one more byte, and must stay within LMDB's limit"
assert KEY_BYTES_MAX <= 3 * SEGMENT_BYTES


class Rows(Protocol):
    """One snapshot of the ordered map."""

    def get(self, row_key: bytes) -> bytes | None: ...

    def read(self, first: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to ``limit`` entries with key >= ``first``, in order."""

    def child(self, link: bytes, value: bytes) -> int:
        """The node that a link's value names. Raises RowDamaged."""


def row_key(node: int, segment: bytes) -> bytes:
    """The key of a row, ``segment`` at most 480 bytes."""
    return node.to_bytes(NODE_BYTES, "big") + segment


def link_key(node: int, segment: bytes) -> bytes:
    """The key of the link after exactly 480 bytes."""
    return node.to_bytes(NODE_BYTES, "big") + segment + LINK_MARK


def is_link(key: bytes) -> bool:
    return len(key) == ROW_KEY_BYTES_MAX


def split(key: bytes) -> tuple[list[bytes], bytes]:
    """The 480-byte prefixes to follow over links, and the segment in the last node.

    A key of exactly 480 bytes is a row of its own: it follows no link.
    """
    cut = max(0, (len(key) - 1) // SEGMENT_BYTES) * SEGMENT_BYTES
    return [key[at : at + SEGMENT_BYTES] for at in range(0, cut, SEGMENT_BYTES)], key[cut:]


def find(rows: Rows, root: int, key: bytes) -> bytes | None:
    """The map's key of ``key``'s row. None when a link on the way to it is missing, and so the row is missing too."""
    if len(key) <= SEGMENT_BYTES:
        return row_key(root, key)
    links, segment = split(key)
    node = root
    for part in links:
        link = link_key(node, part)
        value = rows.get(link)
        if value is None:
            return None
        node = rows.child(link, value)
    return row_key(node, segment)


def walk(rows: Rows, root: int, *, after: bytes, prefix: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    """(key, value) of up to ``limit`` rows under ``root`` with key > ``after`` and the prefix, in key order."""
    found: list[tuple[bytes, bytes]] = []
    first = max(after + b"\0", prefix)
    if not first.startswith(prefix) or limit <= 0:
        return found
    pending = _descend(rows, root, first)
    while pending and len(found) < limit:
        node, path, at = pending.pop()
        left = prefix[len(path) :]
        if len(left) > SEGMENT_BYTES:
            break  # only the child of one link of this node has the prefix, and the walk is past that link
        bound = row_key(node, left)
        batch = rows.read(at, limit - len(found))
        if batch and batch[-1][0].startswith(bound) and ROW_KEY_BYTES_MAX not in [len(key) for key, _ in batch]:
            found += [(path + key[NODE_BYTES:], value) for key, value in batch]
            continue
        for key, value in batch:
            if not key.startswith(bound):
                break
            if is_link(key):
                child = rows.child(key, value)
                pending.append((node, path, key + b"\0"))
                pending.append((child, path + key[NODE_BYTES:-1], row_key(child, b"")))
                break
            found.append((path + key[NODE_BYTES:], value))
    return found


def _descend(rows: Rows, root: int, first: bytes) -> list[tuple[int, bytes, bytes]]:
    """Where to read: (node, the bytes that lead to it, the map's key to begin at) for every node on the way to
    ``first``, the deepest last.
    """
    pending: list[tuple[int, bytes, bytes]] = []
    links, segment = split(first)
    node, path = root, b""
    for part in links:
        link = link_key(node, part)
        pending.append((node, path, link + b"\0"))
        value = rows.get(link)
        if value is None:
            return pending
        node, path = rows.child(link, value), path + part
    pending.append((node, path, row_key(node, segment)))
    return pending
