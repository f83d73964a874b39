"""Pieces of a shard: by them replicas find out which of their rows differ, without sending stamps or rows. Pure.

Theory of operation
    A *piece* is a run of rows in key order. It ends after a row whose check ends with four zero bits, so with about
    each sixteenth row. A check stands for the whole row, so replicas with the same rows cut them in the same places,
    and a row that only one of them has moves no border but those beside it. So replicas that are compared piece by
    piece agree again right after a row in which they differ. Slices of so many rows would not: each of them begins
    where the one before ended.

    A replica sends the key of each piece's last row, and a *mark*: the digest of the stamps of its rows (u64 BE), and
    how many they are (u32 BE).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from storaged.meta.storage.rowvalue import STAMP_BYTES, digest_of_stamps
from storaged.meta.store_ports import Stamps

_LAST_OF_CHECK = 8
_BORDER = re.compile(b"[" + b"".join(b"\\x%02x" % (high << 4) for high in range(16)) + b"]")
_MARK = struct.Struct(">QI")
MARK_BYTES = _MARK.size


def pieces_in(seen: Stamps) -> tuple[list[bytes], list[bytes]]:
    """The last keys and the marks of the pieces of these rows, which come with their keys. The last piece ends with the
    last row. Rows that are too short for a stamp are in one piece, which has no other's mark.
    """
    stamps, keys = seen.stamps, seen.keys
    if len(stamps) != seen.rows * STAMP_BYTES:
        return [seen.last], [_MARK.pack(digest_of_stamps(b"damaged" + stamps), seen.rows)]
    ends = [match.end() for match in _BORDER.finditer(stamps[_LAST_OF_CHECK::STAMP_BYTES])]
    if seen.rows and (not ends or ends[-1] != seen.rows):
        ends.append(seen.rows)
    marks, start = [], 0
    for end in ends:
        marks.append(_MARK.pack(digest_of_stamps(stamps[start * STAMP_BYTES : end * STAMP_BYTES]), end - start))
        start = end
    return [keys[end - 1] for end in ends], marks


def rows_of_marks(marks: Sequence[bytes]) -> int:
    """How many rows the pieces have. Raises struct.error for what is no mark."""
    return sum([_MARK.unpack(mark)[1] for mark in marks])
