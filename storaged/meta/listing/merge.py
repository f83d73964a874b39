"""Lists a bucket: pages of settled rows in key order, from shards that each have several replicas.

Theory of operation
    A bucket's keys are spread by hash over its shards. A page asks each shard for its share of the page and a little
    more, and asks again the shards that turn out to have more of it. A shard is known up to ``Feed.through``, and the
    page can only have keys up to which all shards are known. Every shard may report the same common prefix, which is
    one entry.

    There is no snapshot across keys. A page has everything acknowledged before the call; pages never go back.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.listing.cache import CachedPiece, PieceCache
from storaged.meta.listing.comparing import CatchUp, Comparison, alike, rows_anywhere
from storaged.meta.listing.query import Feed, Piece, Query
from storaged.meta.listing.round import OnFenced, ScanRounds, ScanSettings
from storaged.meta.listing.shards import SETTLING_MAX, ShardReader
from storaged.meta.names import RegisterName, Visibility
from storaged.meta.ports import HeadPage, ListPage, PageQuery, Registers, Replicas, Row, Scanner
from storaged.meta.storage.scan import LIMIT_MAX, common_prefix, list_after_prefix
from storaged.tasks import gather_bounded

PAGE_ROWS_MAX = LIMIT_MAX - 1
ROUNDS_MAX = 64
"""A page that is not full after this many rounds is returned as it is: 64 rounds are half a million deleted keys."""

Filled = tuple[list[bytes], list[Any], tuple[bytes, ...], bytes | None]
"""Keys, their values or heads, common prefixes, where the next page begins."""

ROWS_A_PAGE = 1_000
REFRESH_S = 3.0
"""How long a page waits to learn where partitions are now."""

Refresh = Callable[[int], Awaitable[None]]
"""``await refresh(partition)`` learns where it is now. It may raise StoragedError."""


async def nothing_newer(_partition: int) -> None:
    """A ``Refresh`` where partitions do not move."""


class RingScanner:
    """``Scanner`` over the replicas. ``registers`` settles the rows on which they do not agree."""

    def __init__(
        self,
        layouts: Layouts,
        replicas: Replicas,
        registers: Registers,
        liveness: Liveness,
        settings: ScanSettings | None = None,
        on_fenced: OnFenced = lambda scope: None,
        refresh: Refresh = nothing_newer,
    ) -> None:
        settings = settings or ScanSettings()
        self._registers = registers
        self._liveness = liveness
        self._refresh = refresh
        self._share = settings.share
        self._cache = PieceCache(settings.cache_bytes_max)
        rounds = ScanRounds(layouts, replicas, settings, on_fenced)
        self._reader = ShardReader(layouts, registers, liveness, rounds, self._cache, settings)

    async def list_page(self, wanted: PageQuery) -> ListPage:
        """As the port says. ``limit`` up to 4,095; 0 gives an empty last page. A page may be short, even empty, with
        ``next_after`` set, when very many deleted keys lie in between.
        """
        visible = Visibility.HIDDEN if wanted.hidden else Visibility.LIVE
        query = Query(
            wanted.table,
            wanted.scope,
            wanted.prefix,
            wanted.delimiter,
            visible,
            settling_nonce=wanted.settling_nonce,
            after_fence=wanted.after_fence,
        )
        (keys, held, prefixes, next_after), _ = await self._filled(query, wanted.shards, wanted.after, wanted.limit)
        return ListPage(tuple(map(Row, keys, held)), prefixes, next_after)

    async def list_heads(self, wanted: PageQuery) -> HeadPage:
        """As the port says; limits as for ``list_page``."""
        query = Query(wanted.table, wanted.scope, wanted.prefix, wanted.delimiter, Visibility.LIVE, heads=True)
        filled, again = await self._filled(query, wanted.shards, wanted.after, wanted.limit)
        return HeadPage(*filled, again)

    def rows_anywhere(self, wanted: PageQuery, *, everyone: bool = True) -> AsyncIterator[Row]:
        """As the port says."""
        visible = Visibility.HIDDEN if wanted.hidden else Visibility.LIVE
        query = Query(wanted.table, wanted.scope, wanted.prefix, b"", visible)
        (shard,) = wanted.shards
        return rows_anywhere(self._reader, self._liveness, query, shard, everyone=everyone)

    def forget(self, scope: bytes) -> None:
        """As the port says."""
        self._cache.forget(scope)

    async def _filled(self, query: Query, shards: Sequence[int], after: bytes, limit: int) -> tuple[Filled, bool]:
        """The page, and whether most of it was listed before."""
        if not 0 <= limit <= PAGE_ROWS_MAX:
            raise ValueError(f"a page has 0 to {PAGE_ROWS_MAX} entries, not {limit}")
        if limit == 0:
            return ([], [], (), None), False
        feeds = [self._reader.feed(query, shard, after) for shard in shards]
        try:
            return await self._filled_from(query, feeds, limit)
        except ServiceUnavailable:
            if not await self._have_moved(query, feeds):
                raise
            return await self._filled_from(query, [self._reader.feed(query, shard, after) for shard in shards], limit)

    async def _have_moved(self, query: Query, feeds: Sequence[Feed]) -> bool:
        """Whether some shard's replicas are others by now. Learns where those are that a replica says have moved."""
        places = {feed.shard: RegisterName(query.table, query.scope, feed.shard, b"").partition for feed in feeds}
        partitions = {places[feed.shard] for feed in feeds if feed.moved}
        with contextlib.suppress(StoragedError, TimeoutError):
            async with asyncio.timeout(REFRESH_S):
                await gather_bounded([self._refreshed(partition) for partition in partitions], SETTLING_MAX)
        return any(self._reader.feed(query, feed.shard, b"").view != feed.view for feed in feeds)

    async def _refreshed(self, partition: int) -> None:
        await self._refresh(partition)

    async def _filled_from(self, query: Query, feeds: list[Feed], limit: int) -> tuple[Filled, bool]:
        page = _Page(query, feeds, limit)
        for turn in range(ROUNDS_MAX):
            asked = page.incomplete()
            if not asked:
                return page.whole(), page.again
            share = min(limit + 1, self._share(page.wanting(), len(asked), turn))
            for feed, piece in zip(asked, await self._reader.pieces(query, asked, share), strict=True):
                page.add(feed, piece)
        return page.cut_short(), page.again

    async def catch_up(
        self,
        table: int,
        scope: bytes,
        shard: int,
        *,
        settling_nonce: bytes = b"",
        bring_up: Callable[[RegisterName], Awaitable[object]] | None = None,
        quick: bool = False,
        patience: float = 1.0,
    ) -> CatchUp:
        """Brings the replicas of one shard to the same rows: compares all that answer, and settles each key that one of
        them lacks, has damaged, or has at another ballot, by a round that is sent to all of them; or by ``bring_up``,
        which raises as ``Registers.settle``.

        ``quick``: a tenth of the work (``meta.listing.comparing``). Then damage is found only beside a difference.
        ``patience``: so many times PATIENCE_S it waits for a replica that is thought to answer, once.

        A key that can't be settled, since a majority of its rows is damaged, does not stop the others: its error is
        raised at the end. Raises ServiceUnavailable without a majority, and as ``Registers.settle`` does.
        """
        query = Query(table, scope, b"", b"", Visibility.TOMBSTONE, settling_nonce)
        settle = bring_up or partial(self._registers.settle, settling_nonce=settling_nonce)
        comparison = Comparison(self._reader, self._liveness, query, shard, settle, patience)
        return await comparison.run(quick=quick)

    async def alike(self, table: int, scope: bytes, shards: Sequence[int]) -> set[int]:
        """The shards of which all replicas that are thought to answer, and a majority, have the same rows, by the sums
        that they keep (``meta.storage.sums``). So none of them looks at its rows. Up to ``SHARDS_MAX``.
        """
        query = Query(table, scope, b"", b"", Visibility.TOMBSTONE)
        return await alike(self._reader, self._liveness, query, shards)


async def any_row(scanner: Scanner, wanted: PageQuery) -> Row | None:
    """The first row, or None. A page may be empty and not the last: the scan of very many tombstones continues in the
    next one. Raises as ``list_page``.
    """
    start: bytes | None = wanted.after
    while start is not None:
        page = await scanner.list_page(wanted._replace(after=start, limit=1))
        if page.rows:
            return page.rows[0]
        start = page.next_after
    return None


async def every_row(scanner: Scanner, wanted: PageQuery) -> AsyncIterator[Row]:
    """The rows of ``Scanner.list_page``, page by page: nothing is held open between rows. Raises as
    ``list_page``.
    """
    start: bytes | None = wanted.after
    while start is not None:
        page = await scanner.list_page(wanted._replace(after=start, limit=ROWS_A_PAGE))
        for row in page.rows:
            yield row
        start = page.next_after


class _Page:
    """A page while it is filled. ``whole`` and ``cut_short`` return the keys, their values or heads, the common
    prefixes, and where the next page begins.
    """

    def __init__(self, query: Query, feeds: list[Feed], limit: int) -> None:
        self._query = query
        self._feeds = feeds
        self._limit = limit
        self._need = limit + 1  # the one more shows whether there is a next page
        self._entries: dict[bytes, Any] = {}
        """Key -> its value, or head; common prefix -> None."""
        self._names: list[bytes] = []
        """The keys of ``_entries`` in order."""
        self._parts: list[CachedPiece] = []
        self._pieces = self._again = 0

    @property
    def again(self) -> bool:
        """Whether most of it was listed before."""
        return 2 * self._again > self._pieces

    def incomplete(self) -> list[Feed]:
        """The feeds that may still have entries for this page."""
        self._names = sorted(self._entries)
        if len(self._names) < self._need:
            return [feed for feed in self._feeds if not feed.done]
        last = self._names[self._need - 1]
        return [feed for feed in self._feeds if not feed.done and feed.through < last]

    def wanting(self) -> int:
        """How many entries are missing. Counts only entries before which no unknown key can lie."""
        known = min((feed.through for feed in self._feeds if not feed.done), default=b"")
        return max(1, self._need - bisect_right(self._names, known))

    def add(self, feed: Feed, piece: Piece) -> None:
        if self._query.delimiter:
            for key, held in zip(piece.keys, piece.held, strict=True):
                group = common_prefix(key, self._query.prefix, self._query.delimiter)
                self._entries[group or key] = None if group else held
        else:
            self._entries.update(zip(piece.keys, piece.held, strict=True))
        feed.through, feed.done = self._jumped(piece.through), piece.done
        self._parts += piece.parts
        self._pieces += 1
        self._again += piece.again

    def _jumped(self, through: bytes) -> bytes:
        """The end of the common prefix that ``through`` lies in, when the page has it already."""
        group = common_prefix(through, self._query.prefix, self._query.delimiter)
        return list_after_prefix(group) if group and group in self._entries else through

    def whole(self) -> Filled:
        return self._filled(self._names[: self._limit], len(self._names) > self._limit)

    def cut_short(self) -> Filled:
        """The entries that are certain, and where to go on."""
        if not self.incomplete():
            return self.whole()
        known = self._jumped(min(feed.through for feed in self._feeds if not feed.done))
        names = self._names[: bisect_right(self._names, known)]
        if len(names) > self._limit:
            return self._filled(names[: self._limit], True)
        keys, held, prefixes, _ = self._filled(names, False)
        return keys, held, prefixes, known

    def _filled(self, names: list[bytes], more: bool) -> Filled:
        for part in self._parts:
            part.listed = max(part.listed, names[-1] if names else b"")
        held = [self._entries[name] for name in names]
        next_after = None
        if more:
            next_after = list_after_prefix(names[-1]) if held[-1] is None else names[-1]
        if not self._query.delimiter:
            return names, held, (), next_after
        prefixes = tuple(name for name, entry in zip(names, held, strict=True) if entry is None)
        keys = [name for name, entry in zip(names, held, strict=True) if entry is not None]
        return keys, [entry for entry in held if entry is not None], prefixes, next_after
