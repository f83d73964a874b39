"""A cache of the pieces of shards that were listed last, in bounded memory: what has not changed since is not sent,
opened or printed again.

A cached piece is never trusted by itself: it counts only in a request in which a majority of the shard's replicas
answers with its digest (``meta.listing.shards``).

Pieces lie end to end: the next one was asked for where the one before it ends. So a page that begins in the middle of a
piece, as the next page of a listing does, is put together from the pieces that it overlaps. With a delimiter a piece
serves only a page that begins where the piece begins, since the key that represents a common prefix depends on that
position.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storaged.units import MIB

CACHE_BYTES_MAX = 8 * MIB
"""Some 25,000 keys of 30 bytes."""

_PIECE_BYTES = 700
_ROW_BYTES = 2 * (33 + 8)
"""Memory of a piece, and of each of its rows, besides the bytes of the keys and heads."""


class ListedShard(NamedTuple):
    """What is listed of one shard."""

    table: int
    scope: bytes
    shard: int
    prefix: bytes
    delimiter: bytes
    visible: int


@dataclass(slots=True, eq=False)
class CachedPiece:
    """The answer to an ask for ``limit`` entries after ``after``: its digest, its keys and heads, and up to where it
    goes.
    """

    place: ListedShard
    after: bytes
    limit: int
    digest: int
    keys: Sequence[bytes]
    heads: Sequence[bytes]
    through: bytes
    done: bool
    bounds: tuple[int, int]
    """The rows and bytes that the ask allowed. The next ask has the same bounds: with narrower ones a piece that did
    not change would end earlier, and be sent once more.
    """
    listed: bytes = b""
    """Up to where it was on pages."""
    cost: int = field(init=False)
    """Bytes of memory, about."""

    def __post_init__(self) -> None:
        self.cost = _PIECE_BYTES + len(self.through) + len(self.keys) * _ROW_BYTES
        self.cost += sum(map(len, self.keys)) + sum(map(len, self.heads))

    def entries_after(self, after: bytes) -> int:
        return len(self.keys) - bisect_right(self.keys, after)


class _Shard:
    """The pieces of one shard by where they begin."""

    __slots__ = ("pieces", "starts")

    def __init__(self) -> None:
        self.starts: list[bytes] = []
        self.pieces: dict[bytes, CachedPiece] = {}


class PieceCache:
    """The pieces used last, in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._shards: dict[ListedShard, _Shard] = {}
        self._used: OrderedDict[CachedPiece, None] = OrderedDict()

    def pieces_after(self, place: ListedShard, after: bytes, entries: int, pieces_max: int) -> list[CachedPiece]:
        """The pieces that cover what follows ``after``, end to end, until they have that many entries or the cache has
        no more.
        """
        found: list[CachedPiece] = []
        shard = self._shards.get(place)
        while shard is not None and entries > 0 and len(found) < pieces_max:
            piece = _covering(shard, after, exactly=bool(place.delimiter))
            if piece is None:
                break
            found.append(piece)
            self._used.move_to_end(piece)
            entries -= piece.entries_after(after)
            if piece.done:
                break
            after = piece.through
        return found

    def put(self, piece: CachedPiece) -> None:
        """Replaces the piece that began at the same key."""
        shard = self._shards.get(piece.place)
        if shard is not None and piece.after in shard.pieces:
            self.drop(shard.pieces[piece.after])
        shard = self._shards.setdefault(piece.place, _Shard())
        insort(shard.starts, piece.after)
        shard.pieces[piece.after] = piece
        self._used[piece] = None
        self._bytes += piece.cost
        while self._bytes > self._bytes_max:
            self.drop(next(iter(self._used)))

    def drop(self, piece: CachedPiece) -> None:
        """No-op for a piece that is not in the cache any more."""
        if piece not in self._used:
            return
        del self._used[piece]
        self._bytes -= piece.cost
        shard = self._shards[piece.place]
        del shard.pieces[piece.after]
        del shard.starts[bisect_left(shard.starts, piece.after)]
        if not shard.starts:
            del self._shards[piece.place]

    def forget(self, scope: bytes) -> None:
        """Drops every piece of a bucket."""
        for piece in [piece for piece in self._used if piece.place.scope == scope]:
            self.drop(piece)

    def __len__(self) -> int:
        return len(self._used)


def _covering(shard: _Shard, after: bytes, *, exactly: bool) -> CachedPiece | None:
    if exactly:
        return shard.pieces.get(after)
    at = bisect_right(shard.starts, after)
    piece = shard.pieces[shard.starts[at - 1]] if at else None
    return piece if piece is not None and (piece.done or piece.through > after) else None
