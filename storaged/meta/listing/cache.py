"""Pieces of shards as they were listed last, in bounded memory, so that what has not changed since is neither sent,
opened nor printed again.

Nothing here is believed: a piece counts only in a request in which a majority of the shard's replicas says that it is
still what it was (``meta.listing.merge.shards``).

Pieces lie end to end: where one ends, the next was asked for. So a page that begins in the middle of one, as the next
page of a listing does, is put together from
those that it lies in. With a delimiter a piece serves only who begins where it begins: the key that stands for a common
prefix does so from there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from storaged.units import MIB

PIECES_BYTES_MAX = 8 * MIB
"""Some 25,000 keys of 30 bytes."""

_PIECE_BYTES = 700
_ROW_BYTES = 2 * (33 + 8)
"""What a piece takes, and each of its rows, besides the bytes of the keys and heads."""


class Place(NamedTuple):
    """What is listed of one shard."""

    table: int
    scope: bytes
    shard: int
    prefix: bytes
    delimiter: bytes
    visible: int


class Held:
    """A piece: the answer to an ask for ``limit`` entries behind ``after``, whose digest it had. Its keys and heads,
    and up to where it goes. ``bounds``: the rows and
    bytes that the ask allowed. It is asked for again with the same: with narrower ones a piece that did not change
    would end earlier, and be sent once more.
    ``listed``: up to where it was on pages."""

    __slots__ = ("after", "bounds", "cost", "digest", "done", "heads", "keys", "limit", "listed", "place", "through")

    def __init__(
        self,
        place: Place,
        after: bytes,
        limit: int,
        digest: int,
        keys: Sequence[bytes],
        heads: Sequence[bytes],
        through: bytes,
        done: bool,
        bounds: tuple[int, int],
    ) -> None:
        self.place = place
        self.after = after
        self.limit = limit
        self.digest = digest
        self.keys = keys
        self.heads = heads
        self.through = through
        self.done = done
        self.bounds = bounds
        self.listed = b""
        self.cost = _PIECE_BYTES + len(through) + len(keys) * _ROW_BYTES + sum(map(len, keys)) + sum(map(len, heads))

    def entries_behind(self, after: bytes) -> int:
        return len(self.keys) - bisect_right(self.keys, after)


class _Shard:
    """Its pieces by where they begin."""

    __slots__ = ("pieces", "starts")

    def __init__(self) -> None:
        self.starts: list[bytes] = []
        self.pieces: dict[bytes, Held] = {}


class Remembered:
    """The pieces used last, in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int = PIECES_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._shards: dict[Place, _Shard] = {}
        self._used: OrderedDict[Held, None] = OrderedDict()

    def along(self, place: Place, after: bytes, entries: int, pieces_max: int) -> list[Held]:
        """The pieces that hold what comes behind ``after``, one behind the other, until that many entries or no more
        are known.
        """
        found: list[Held] = []
        shard = self._shards.get(place)
        while shard is not None and entries > 0 and len(found) < pieces_max:
            piece = _covering(shard, after, exactly=bool(place.delimiter))
            if piece is None:
                break
            found.append(piece)
            self._used.move_to_end(piece)
            entries -= piece.entries_behind(after)
            if piece.done:
                break
            after = piece.through
        return found

    def keep(self, piece: Held) -> None:
        """In the place of the one that began there."""
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

    def drop(self, piece: Held) -> None:
        """Does nothing for one that is not kept any more."""
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
        """Every piece of a bucket."""
        for piece in [piece for piece in self._used if piece.place.scope == scope]:
            self.drop(piece)

    def __len__(self) -> int:
        return len(self._used)


def _covering(shard: _Shard, after: bytes, *, exactly: bool) -> Held | None:
    if exactly:
        return shard.pieces.get(after)
    at = bisect_right(shard.starts, after)
    piece = shard.pieces[shard.starts[at - 1]] if at else None
    return piece if piece is not None and (piece.done or piece.through > after) else None
