"""Reads settled pieces of shards: what a majority of each shard's replicas agrees on, the rest through registers.

Theory of operation
    Each shard's rows come from one replica (the *supplier*), digests from others. When a majority has the same digest,
    it has the same ballots of the same keys, so every row is settled, and so is the absence of every other key. The
    others also hash what they would have sent. A supplier that sends something else does not agree with them. At
    first only a bare majority is asked, which is mostly enough for a page; then all replicas. When no majority agrees,
    all replicas send all rows: a key that a majority has at one ballot (or that a majority does not have) is settled,
    and each other key is read through its register, which settles it. Taking the newest row instead would list an
    object that the next GET denies.

    Whether a bucket that is being deleted is empty, two replicas of three must not decide: one may lie and the other
    lag, while the third one has an object. So after a fence all replicas are asked, and each key of which one has an
    object, while those that answer do not agree, is settled through its register.

    Settled pieces of heads are cached (``meta.listing.cache``), and asked for again with their digest: the supplier
    sends rows only when its own digest differs, and the same majority has to confirm the digest in this very request.
    The ranges that a piece is put together from are asked for in one round (``PieceRead``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import ServiceUnavailable
from storaged.meta.consensus.quorums import met_by_all
from storaged.meta.listing.agreement import agreeing, assemble, decoded_rows, join, settle_by_majority
from storaged.meta.listing.cache import CachedPiece, PieceCache
from storaged.meta.listing.query import Answers, Feed, Piece, PieceRead, Query
from storaged.meta.listing.round import ScanRounds, ScanSettings
from storaged.meta.messages import ShardSlice
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Registers
from storaged.meta.storage.scan import SHARDS_MAX, Want
from storaged.meta.views import Views
from storaged.tasks import gather_bounded

READS_MAX = 4
"""Reads of one shard in a round. A page from the cache takes two or three; among deleted keys their number would be
unbounded, and a replica that has to scan all of them again, 30,000 rows at most, does nothing else meanwhile.
"""

SETTLING_MAX = 32

PATIENCE_S = 3.0
"""How long callers that want all replicas wait for one that is thought to answer: a comparison once for each shard.
What such a replica has missed stays so for as long as it is not compared, and callers that need all begin again.
"""

WAIT_FACTOR = 4
"""A round with a bare majority waits this many times longer than such rounds usually take: when all disks are busy,
asking more of them makes it worse.
"""

WAIT_HEDGES_MAX = 40
"""Upper bound of that wait in units of ``hedge_s`` (2 s): a round with a disk that never answers takes the whole wait,
and would make the next waits longer.
"""


class ShardReader:
    """Reads shards piece by piece, several at once."""

    def __init__(
        self,
        layouts: Layouts,
        registers: Registers,
        liveness: Liveness,
        rounds: ScanRounds,
        cache: PieceCache,
        settings: ScanSettings,
    ) -> None:
        self._view = Views(layouts).of
        self._registers = registers
        self._liveness = liveness
        self._rounds = rounds
        self._cache = cache
        self._hedge_s = settings.hedge_s
        self._usual_s = 0.0

    def feed(self, query: Query, shard: int, after: bytes) -> Feed:
        view = self._view(RegisterName(query.table, query.scope, shard, b""))
        quorum = view.quorum
        disks = quorum.sets[0]
        alive = [disk for disk in disks if self._liveness.disk_prompt(disk)] or list(disks)
        first = shard % len(alive)
        order = alive[first:] + alive[:first]
        if not quorum.single:  # the disk that comes lags
            order += [disk for disk in quorum.disks if disk not in disks]
        return Feed(shard, view, order[0], after, quorum.prefix(order))

    async def pieces(self, query: Query, feeds: Sequence[Feed], limit: int) -> list[Piece]:
        """The next piece of each feed, about ``limit`` entries long. Raises ServiceUnavailable when a shard has no
        majority.
        """
        reads_max = max(1, min(READS_MAX, SHARDS_MAX // len(feeds)))
        runs = [self._reads(query, feed, limit, reads_max) for feed in feeds]
        reads = [read for run in runs for read in run]
        if query.after_fence:
            await self._ask_until_silent(query, reads)
        else:
            await self._ask_bare_majority(query, reads)
            waiting = [read for read in reads if read.piece is None]
            for _ in range(2):
                if waiting:
                    waiting = await self._ask_everybody(query, waiting)
        await self._settle(query, [read for read in reads if read.piece is None])
        return [join(run, exactly=bool(query.delimiter)) for run in runs]

    async def ask_all(
        self, query: Query, reads: Sequence[PieceRead], want: Want, *, hedge_s: float | None = None
    ) -> list[Answers]:
        """Asks every replica of every read's shard for the same. Waits for all, though not long for the last ones, or
        for ``hedge_s``.

        Raises ServiceUnavailable when a shard has no majority.
        """
        answers = await self._rounds.ask(
            query, reads, lambda _read, _disk: want, lambda _answers: False, hedge_s=hedge_s
        )
        for read, found in zip(reads, answers, strict=True):
            if not read.feed.quorum.met(found):
                raise ServiceUnavailable(
                    f"Only {len(found)} of {len(read.feed.disks)} replicas of an index shard answer."
                )
        return answers

    def _reads(self, query: Query, feed: Feed, limit: int, reads_max: int) -> list[PieceRead]:
        """The cached pieces of the feed's next ``limit`` entries. When these have fewer entries, one more read of
        ``limit`` entries follows: the next page finds it in the cache.
        """
        if not query.heads:
            return [PieceRead(feed, feed.through, limit)]
        after, reads, wanting = feed.through, [], limit
        for known in self._cache.pieces_after(query.listed_shard(feed.shard), after, limit, reads_max):
            reads.append(PieceRead(feed, known.after, known.limit, known))
            if known.done:
                return reads
            wanting -= known.entries_after(after)
            after = known.through
        if wanting > 0 and len(reads) < reads_max:
            reads.append(PieceRead(feed, after, limit))
        return reads

    async def _ask_bare_majority(self, query: Query, reads: Sequence[PieceRead]) -> None:
        """The common case: the disks that are asked first agree, and each of them is asked once."""

        def want(read: PieceRead, disk: str) -> Want | None:
            return query.rows if disk == read.supplier else query.hashed if disk in read.feed.first else None

        loop = asyncio.get_running_loop()
        began = loop.time()
        hurry_s = min(max(self._hedge_s, WAIT_FACTOR * self._usual_s), WAIT_HEDGES_MAX * self._hedge_s)
        answers = await self._rounds.ask(query, reads, want, lambda _answers: False, hurry_s=hurry_s)
        self._usual_s += (loop.time() - began - self._usual_s) / 8
        for read, found in zip(reads, answers, strict=True):
            if read.supplier in agreeing(read, found):
                read.piece = self._piece(query, read, found[read.supplier])
            elif found and read.supplier not in found:  # it does not answer, or not in time
                read.supplier = read.feed.supplier = next(iter(found))

    async def _ask_until_silent(self, query: Query, reads: Sequence[PieceRead]) -> None:
        """Asks all replicas, and waits for those that are slow. A piece is settled only where all answers agree."""

        def want(read: PieceRead, disk: str) -> Want:
            return query.rows if disk == read.supplier else query.hashed

        answers = await self._rounds.ask(query, reads, want, lambda _answers: False, hedge_s=PATIENCE_S)
        for read, found in zip(reads, answers, strict=True):
            if read.supplier in found and len(agreeing(read, found)) == len(found):
                read.piece = self._piece(query, read, found[read.supplier])

    async def _ask_everybody(self, query: Query, reads: Sequence[PieceRead]) -> list[PieceRead]:
        """Returns the reads whose supplier lags or is away, with a supplier that agrees: they are to be asked about
        once more.
        """
        asked = self._worth_asking([read.feed for read in reads])

        def want(read: PieceRead, disk: str) -> Want | None:
            return None if disk not in asked else query.rows if disk == read.supplier else query.hashed

        def enough(answers: Sequence[Answers]) -> bool:
            return all(read.supplier in agreeing(read, found) for read, found in zip(reads, answers, strict=True))

        answers = await self._rounds.ask(query, reads, want, enough)
        again = []
        for read, found in zip(reads, answers, strict=True):
            agreed = agreeing(read, found)
            if read.supplier in agreed:
                read.piece = self._piece(query, read, found[read.supplier])
            elif agreed:
                read.supplier = read.feed.supplier = agreed[0]
                again.append(read)
        return again

    async def _settle(self, query: Query, reads: Sequence[PieceRead]) -> None:
        """Reads the rows of all replicas where no majority agrees, and settles each doubtful key through its
        register.
        """
        if not reads:
            return
        for read in reads:
            if read.known is not None:  # with replicas that keep differing no read would ever get past this piece
                self._cache.drop(read.known)
                read.known = None
        answers = await self.ask_all(query, reads, Want.ALL, hedge_s=PATIENCE_S if query.after_fence else None)
        for read, found in zip(reads, answers, strict=True):
            settled = settle_by_majority(query, read.feed, found)
            settling = [
                self._read(query, RegisterName(query.table, query.scope, read.feed.shard, key))
                for key in settled.doubtful
            ]
            settled.values.update(zip(settled.doubtful, await gather_bounded(settling, SETTLING_MAX), strict=True))
            read.piece = assemble(query, settled)

    def _worth_asking(self, feeds: Sequence[Feed]) -> set[str]:
        """All disks but those that seem to be away or slow, when every shard has a majority without these."""
        everyone = {disk for feed in feeds for disk in feed.disks}
        alive = {disk for disk in everyone if self._liveness.disk_prompt(disk)}
        return alive if met_by_all((feed.quorum for feed in feeds), alive) else everyone

    def _piece(self, query: Query, read: PieceRead, answer: ShardSlice) -> Piece:
        """A supplier's answer that a majority agrees with."""
        if not query.heads:
            rows = [(row.key, row.value) for row in decoded_rows(answer) if row.value is not None]
            return Piece([key for key, _ in rows], [value for _, value in rows], answer.through, answer.done)
        if len(answer.keys) != len(answer.heads):
            raise ServiceUnavailable(
                "A replica's answer to a scan cannot be read: its keys and heads do not belong together."
            )
        held = read.known
        if held is None or held.digest != answer.digest or held.done != answer.done:
            # Rows of the same digest were not sent again, though the shard may have more rows after them now, or none.
            its = held if held is not None and held.digest == answer.digest else answer
            place, through, done = query.listed_shard(read.feed.shard), answer.through, answer.done
            new = CachedPiece(
                place, read.after, read.limit, answer.digest, its.keys, its.heads, through, done, read.bounds
            )
            if held is not None:
                new.listed = held.listed
            self._cache.put(new)
            read.known = held = new
        return Piece(held.keys, held.heads, answer.through, answer.done)

    async def _read(self, query: Query, name: RegisterName) -> Value | None:
        """A read counts replicas without the fence, too; a settling round refuses what these have not judged yet."""
        if query.after_fence:
            return await self._registers.settle(name, settling_nonce=query.settling_nonce)
        return (await self._registers.read(name, settling_nonce=query.settling_nonce)).value
