"""Compares the rows of a shard's replicas, and has those settled that differ.

Theory of operation
    Two ways find out which rows differ. Both cost about as much as the replicas have rows, and then as much as differs.
    *   By digests of slices of verified rows: it finds damage too. A slice that differs is sent whole.
    *   *Quickly*, by pieces of rows that are not verified (``meta.storage.pieces``), a tenth of the work. Only the rows
        of the pieces that differ are sent, many pieces in a message.

    A shard is read from its first row to its last. Nothing is held open between two messages: a row that is written
    meanwhile is compared as it is then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from storaged.cluster.ports import Liveness
from storaged.errors import ServiceUnavailable
from storaged.meta.listing.agreement import common_end, reported, rows_after
from storaged.meta.listing.differences import Span, checked_pieces, differences, knows_pieces
from storaged.meta.listing.query import Answers, PieceRead, Query
from storaged.meta.listing.shards import PATIENCE_S, SETTLING_MAX, ShardReader
from storaged.meta.messages import ScanRow
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Row
from storaged.meta.storage.scan import Want
from storaged.tasks import gather_bounded
from storaged.units import MIB

log = structlog.get_logger(__name__)

WALK_ROWS = 500
PIECED_ROWS = 1_000
"""Of a message about pieces: a millisecond of a replica."""

SPAN_ROWS_MAX = 500
SPANS_A_ROUND = 16
ROUND_BYTES_MAX = 2 * MIB
"""Where the rows of all spans together may have more, one span is asked for at a time: a message has a bound."""

ROUNDS_MAX = 64
"""Of ``rows_anywhere``, those in which a replica has rows: one that lies could name rows without end."""
SHOWN_A_ROUND = 32
"""So many rows that two replicas show are worth another round: they are there, and a bucket whose data copies use may
have millions. An answer has fewer only where they have 96 KiB each.
"""
EMPTY_ROUNDS_MAX = 1_024
"""Of ``rows_anywhere``, all others. In each of them replicas look at 8,192 rows of deleted keys. A bucket that was
emptied has millions of such rows in a shard, for a day.
"""
UNSETTLED_MAX = 32
"""A comparison ends when it fails to settle more keys: then it is more than a few damaged rows, and each key costs a
time-out.
"""

SUM_TRIES = 2
"""Sums differ, too, while a write is on its way."""

Settle = Callable[[RegisterName], Awaitable[object]]
Rows = dict[str, list[ScanRow]]


@dataclass
class CatchUp:
    """``rows`` looked at; ``settled``: rows that differed, and of which a round was committed; ``away``: disks that did
    not answer. A replica that has promised more may have refused such a round: only a comparison that settles nothing
    shows that all have the same rows.
    """

    rows: int = 0
    settled: int = 0
    away: set[str] = field(default_factory=set)


class Comparison:
    """Of one shard, once. ``settle``, ``patience`` and what ``run`` raises: as for ``RingScanner.catch_up``."""

    def __init__(
        self, reader: ShardReader, liveness: Liveness, query: Query, shard: int, settle: Settle, patience: float
    ) -> None:
        self._reader = reader
        self._liveness = liveness
        self._query = query
        self._feed = reader.feed(query, shard, b"")
        self._settle = settle
        self._patience_s = patience * PATIENCE_S
        self._found = CatchUp()
        self._unsettled: list[ServiceUnavailable] = []

    async def run(self, *, quick: bool) -> CatchUp:
        feed = self._feed
        while not feed.done and len(self._unsettled) <= UNSETTLED_MAX:
            if quick:
                quick = await self._compare_pieces()
            else:
                await self._compare_slice()
        if self._unsettled:
            raise self._unsettled[0]
        return self._found

    async def _compare_slice(self) -> None:
        feed = self._feed
        wanted = Span(feed.through, None, WALK_ROWS)
        [(answers, _)] = await self._ask([wanted], Want.DIGEST)
        if len({(answer.digest, answer.through, answer.done) for answer in answers.values()}) > 1:
            [(answers, rows)] = await self._ask([wanted], Want.ALL)
            await self._settle_all(self._differing(answers, rows, None))
        feed.through, feed.done = common_end(answers.values())
        self._found.rows += max(answer.looked_at for answer in answers.values())

    async def _compare_pieces(self) -> bool:
        """False when a replica has no pieces: then nothing was compared."""
        feed = self._feed
        [(answers, _)] = await self._ask([Span(feed.through, None, PIECED_ROWS)], Want.PIECES)
        if not all(map(knows_pieces, answers.values())):
            return False
        found = differences(feed.through, answers)
        at_once = SPANS_A_ROUND if found.row_bytes <= ROUND_BYTES_MAX else 1
        left = found.spans
        while left and len(self._unsettled) <= UNSETTLED_MAX:
            some, left = left[:at_once], left[at_once:]
            left = await self._settle_spans(some) + left
        feed.through, feed.done = found.through, found.done
        self._found.rows += found.rows
        return True

    async def _settle_spans(self, spans: Sequence[Span]) -> list[Span]:
        """Returns what is left of them: an answer has bounds."""
        left: list[Span] = []
        names: list[RegisterName] = []
        wanted = [span._replace(rows=min(span.rows, SPAN_ROWS_MAX)) for span in spans]
        for span, (answers, rows) in zip(spans, await self._ask(wanted, Want.ALL), strict=True):
            names += self._differing(answers, rows, span.through)
            through, done = common_end(answers.values())
            if not done and (span.through is None or through < span.through):
                left.append(span._replace(after=through))
        await self._settle_all(names)
        return left

    def _differing(self, answers: Answers, rows: Rows, through: bytes | None) -> list[RegisterName]:
        """The registers, up to ``through`` and to where all answers go."""
        query, feed = self._query, self._feed
        same = _identical if query.table == Table.SYSTEM else _unanimous
        return [
            RegisterName(query.table, query.scope, feed.shard, key)
            for key, seen in reported(rows, *common_end(answers.values())).items()
            if (through is None or key <= through) and not same(list(seen.values()), len(answers))
        ]

    async def _ask(self, spans: Sequence[Span], want: Want) -> list[tuple[Answers, Rows]]:
        """What the replicas answer of each span, and their rows. One that says nothing that can be compared counts as
        away, also if it differed and answers no more: a single disk must not stop the callers, or keep them for ever.
        """
        feed, found = self._feed, self._found
        reads = [PieceRead(feed, span.after, min(max(span.rows, 1), PIECED_ROWS)) for span in spans]
        patient = not found.away and all(map(self._liveness.disk_readable, feed.disks))
        asked = await self._reader.ask_all(self._query, reads, want, hedge_s=self._patience_s if patient else None)
        compared = []
        for span, answers in zip(spans, asked, strict=True):
            rows: Rows = {}
            for disk, answer in answers.items():
                try:
                    rows[disk] = rows_after(span.after, answer)
                    if want == Want.PIECES and knows_pieces(answer):
                        checked_pieces(span.after, answer)
                except ServiceUnavailable as error:
                    rows.pop(disk, None)
                    log.error("what a disk answers to a scan is none", disk=disk, reason=error.message)
            found.away |= set(feed.disks) - set(rows)
            if not feed.quorum.met(rows):
                raise ServiceUnavailable(
                    f"Only {len(rows)} of {len(feed.disks)} replicas of an index shard can be compared."
                )
            compared.append(({disk: answers[disk] for disk in rows}, rows))
        return compared

    async def _settle_all(self, names: Sequence[RegisterName]) -> None:
        failures = await gather_bounded([self._try_settle(name) for name in names], SETTLING_MAX)
        self._found.settled += failures.count(None)
        self._unsettled += [failure for failure in failures if failure is not None]

    async def _try_settle(self, name: RegisterName) -> ServiceUnavailable | None:
        """Returns the error when it could not."""
        try:
            await self._settle(name)
        except ServiceUnavailable as error:
            return error
        return None


async def alike(reader: ShardReader, liveness: Liveness, query: Query, shards: Sequence[int]) -> set[int]:
    """As ``RingScanner.alike``."""
    found: set[int] = set()
    for _ in range(SUM_TRIES):
        reads = [PieceRead(reader.feed(query, shard, b""), b"", 0) for shard in shards if shard not in found]
        if not reads:
            break
        try:
            answers = await reader.ask_all(query, reads, Want.SUM, hedge_s=PATIENCE_S)
        except ServiceUnavailable:  # of some of them, and nothing is known of the others
            break
        for read, its in zip(reads, answers, strict=True):
            silent = [disk for disk in read.feed.disks if disk not in its]
            sums = {answer.digest if answer.done else None for answer in its.values()}
            if len(sums) == 1 and None not in sums and not any(map(liveness.disk_readable, silent)):
                found.add(read.feed.shard)
    return found


async def rows_anywhere(
    reader: ShardReader, liveness: Liveness, query: Query, shard: int, *, everyone: bool
) -> AsyncIterator[Row]:
    """As ``RingScanner.rows_anywhere``."""
    feed = reader.feed(query, shard, b"")
    patience_s = PATIENCE_S if all(map(liveness.disk_readable, feed.disks)) else None
    named = empty = shown = 0
    while named < ROUNDS_MAX + shown // SHOWN_A_ROUND and empty < EMPTY_ROUNDS_MAX:
        read = PieceRead(feed, feed.through, WALK_ROWS)
        [answers] = await reader.ask_all(query, [read], query.rows, hedge_s=patience_s)
        silent = set(feed.disks) - set(answers)
        if silent and everyone:
            raise ServiceUnavailable(f"Disk {min(silent)} does not say which rows it has.")
        patience_s = None if silent else patience_s  # one that hangs is waited for once
        rows = {disk: rows_after(feed.through, answer) for disk, answer in answers.items()}
        through, done = common_end(answers.values())
        found = reported(rows, through, done)
        named, empty = (named + 1, empty) if found else (named, empty + 1)
        shown += sum(len(seen) >= min(2, len(feed.disks)) for seen in found.values())
        for key, seen in found.items():
            for value in dict.fromkeys(row.value for row in seen.values()):
                if value is None:
                    raise ServiceUnavailable("A row is damaged at one of its replicas.")
                yield Row(key, value)
        if done:
            return
        feed.through = through
    raise ServiceUnavailable("A shard has too many rows, or a replica says so.")


def _identical(rows: list[ScanRow], replicas: int) -> bool:
    """``_unanimous``, and with one value. For system rows only: a settling round can tell which of theirs is right."""
    return _unanimous(rows, replicas) and all(row.value == rows[0].value for row in rows)


def _unanimous(rows: list[ScanRow], replicas: int) -> bool:
    """Every replica has the row, intact, at one ballot."""
    return len(rows) == replicas and bool(rows[0].ballot) and all(row.ballot == rows[0].ballot for row in rows)
