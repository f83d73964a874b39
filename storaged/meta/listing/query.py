"""What a listing asks of shards, and what it gets: queries, feeds, reads and pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.listing.cache import CachedPiece, ListedShard
from storaged.meta.messages import ShardSlice
from storaged.meta.names import Value
from storaged.meta.storage.scan import Want, listing_hash


@dataclass(frozen=True)
class Query:
    """``visible``: the least Visibility that counts. ``settling_nonce`` of the scope's fence, if it has one.
    ``after_fence``: only replicas that hold it count. ``heads``: return only the heads of the bodies, not the values.
    """

    table: int
    scope: bytes
    prefix: bytes
    delimiter: bytes
    visible: int
    settling_nonce: bytes = b""
    heads: bool = False
    after_fence: bool = False

    @property
    def rows(self) -> Want:
        """The kind of answer to ask the supplier for."""
        return Want.HEADS if self.heads else Want.VISIBLE

    @property
    def hashed(self) -> Want:
        """The kind of answer to ask the others for."""
        return Want.HEADS_HASH if self.heads else Want.ROWS_HASH

    def listed_shard(self, shard: int) -> ListedShard:
        return ListedShard(self.table, self.scope, shard, self.prefix, self.delimiter, self.visible)


@dataclass
class Feed:
    """One shard while it is read: known up to ``through``, or to its end. ``supplier``: the disk that sends the rows.
    ``first``: the disks of one quorum, the supplier among them, to be asked first. ``moved``: a replica knows a later
    step of its partition than the view is of.
    """

    shard: int
    view: View
    supplier: str
    through: bytes
    first: Sequence[str] = ()
    done: bool = False
    moved: bool = False

    @property
    def quorum(self) -> Quorum:
        return self.view.quorum

    @property
    def disks(self) -> tuple[str, ...]:
        return self.view.quorum.disks


class Piece(NamedTuple):
    """A settled piece of a shard: the keys of its visible rows (of common prefixes: the first) with their values, or
    heads, and up to where it goes. ``parts``: the cached pieces that it consists of. ``again``: it was on a page
    before.
    """

    keys: Sequence[bytes]
    held: Sequence[Value] | Sequence[bytes]
    through: bytes
    done: bool
    parts: Sequence[CachedPiece] = ()
    again: bool = False


@dataclass(slots=True)
class PieceRead:
    """A range of a shard that is asked for as one: ``limit`` entries after ``after``."""

    feed: Feed
    after: bytes
    limit: int
    known: CachedPiece | None = None
    """The cached piece."""
    piece: Piece | None = None
    """The settled piece; None until then."""
    bounds: tuple[int, int] = (0, 0)
    """The rows and bytes that the last ask allowed."""
    supplier: str = field(init=False)
    """The disk that is asked for its rows."""
    _hashed: tuple[ShardSlice, bytes] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.supplier = self.feed.supplier

    def sent_hash(self, answer: ShardSlice) -> bytes:
        """The hash of what the supplier sent. Empty where it sent nothing, because ``known`` is what it has."""
        if self.known is not None and answer.digest == self.known.digest:
            return b""
        if self._hashed is None or self._hashed[0] is not answer:
            self._hashed = answer, listing_hash(answer)
        return self._hashed[1]


Answers = dict[str, ShardSlice]
"""disk -> what it answered about a read."""
