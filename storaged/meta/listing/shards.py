"""Settled pieces of shards: what a majority of each shard's replicas agrees on, and the rest settled through its
registers.

Theory of operation
    Each shard's rows come from one replica (the *supplier*), digests from others. When a majority has the same digest,
    the same
    ballots of the same keys lie on a majority, so every row is settled, and every key that isn't there isn't. At first
    a bare majority is asked, which is all that
    a page mostly takes; then everybody. When no majority agrees, all rows are fetched from all replicas: a key that a
    majority holds at one ballot (or that a majority never heard of) is settled, each of the others is read
    through its register, which settles it. Taking the newest instead would list an object that the next GET denies.

    Of heads, what was settled like this is remembered (``meta.listing.cache``), and asked for again with its
    digest: the supplier sends rows only when its own is another,
    and the same majority has to say the same, in this very request. The ranges that a piece is put together from are
    asked for in one go (``Span``).

    A common prefix stands for its keys when one of them is visible and settled. Where replicas differ inside of it,
    none has looked behind its own first visible
    key, so nothing is concluded about what lies behind the smallest of these: if no key up to there turns out to be
    visible, the piece ends there.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.consensus.quorums import Quorum, met_by_all
from storaged.meta.listing.cache import Held, Place, Remembered
from storaged.meta.messages import ScanReply, ScanRequest, ScanRow, ShardAsk, ShardSlice
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Registers, Replicas
from storaged.meta.storage.row_head import head_of
from storaged.meta.storage.scan import SHARDS_MAX, Want, common_prefix, decode_rows
from storaged.meta.transport.quorum import ask_one
from storaged.units import MIB

T = TypeVar("T")

ROUND_BYTES_MAX = 3 * MIB
"""All shards of a round together, below the 4 MiB that a message may have."""

SPANS_MAX = 4
"""Of one shard in a round. A page takes two or three where it is put together from what is remembered; among deleted
keys there would be no end of them, and a replica
that has to look at all of them again does nothing else meanwhile: 30,000 rows at most."""

SETTLING_MAX = 32
HEDGE_S = 0.05
"""How long a round waits for the rest once every shard has answers from a majority, and at the least for a bare
majority.
"""

PATIENCE = 4
"""A bare majority that was asked is waited for this many times longer than it usually takes: where all are busy, asking
more of them makes it worse.
"""

PATIENCE_HEDGES_MAX = 40
"""Nor is it waited for longer than so many times ``HEDGE_S`` (2 s): rounds that one of them never answered took as long
as they were given, and would make the next
ones longer."""


@dataclass(frozen=True)
class Query:
    """``visible``: the least Visibility that counts. ``settling_nonce`` of the scope's fence, if it has one. ``heads``:
    of values no more than the head of the body.
    """

    table: int
    scope: bytes
    prefix: bytes
    delimiter: bytes
    visible: int
    settling_nonce: bytes = b""
    heads: bool = False

    @property
    def rows(self) -> Want:
        """What the supplier of rows is asked for."""
        return Want.HEADS if self.heads else Want.VISIBLE


@dataclass
class Feed:
    """One shard while it is read: known up to ``through``, or to its end. ``first``: the disks of one quorum, the
    supplier among them, to be asked first.
    """

    shard: int
    quorum: Quorum
    supplier: str
    through: bytes
    first: Sequence[str] = ()
    done: bool = False

    @property
    def disks(self) -> tuple[str, ...]:
        return self.quorum.disks


class Piece(NamedTuple):
    """A settled piece of a shard: the keys of its visible rows (of common prefixes: the first) with their values, or
    heads, and up to where it goes. ``parts``:
    what is remembered of it. ``again``: it was on a page before."""

    keys: Sequence[bytes]
    held: Sequence[Value] | Sequence[bytes]
    through: bytes
    done: bool
    parts: Sequence[Held] = ()
    again: bool = False


@dataclass(slots=True)
class Span:
    """A range of a shard that is asked for in one go: ``limit`` entries behind ``after``. ``supplier`` of its rows.
    ``known``: what it was before. ``piece``: what it is,
    once that is settled. ``bounds``: the rows and bytes that it was asked for with last."""

    feed: Feed
    after: bytes
    limit: int
    known: Held | None = None
    piece: Piece | None = None
    bounds: tuple[int, int] = (0, 0)
    supplier: str = field(init=False)

    def __post_init__(self) -> None:
        self.supplier = self.feed.supplier


Answers = dict[str, ShardSlice]
"""disk -> what it answered about a span."""

Enough = Callable[[Sequence[Answers]], bool]
"""Of the answers about each span, in order."""

Wanted = Callable[[Span, str], Want | None]
"""What to ask of a disk about a span; None: nothing."""


class _Round:
    """Requests that are out together, and what came of them. ``ended`` is done when every one was answered, or
    ``enough`` says so, or it was told to.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        asked: dict[str, list[int]],
        enough: Enough,
        hedge_s: float,
        on_fenced: Callable[[bytes], None],
        *,
        hurry_s: float | None,
    ) -> None:
        """``asked``: the spans that each disk is asked about. Ends ``hedge_s`` after every span has answers from a
        majority; with ``hurry_s`` in any case so long
        after its beginning."""
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.answers: list[Answers] = [{} for _ in spans]
        self._spans = spans
        self._asked = asked
        self._left = len(asked)
        self._enough = enough
        self._hedge_s = hedge_s
        self._on_fenced = on_fenced
        self._timer = self._loop.call_later(hurry_s, self.end) if hurry_s is not None else None

    def heard(self, request: ScanRequest, answer: Any, _bulk: object = None) -> None:
        """A refusal, an error, or an answer to something else than was asked counts for nothing."""
        if self.ended.done():
            return
        self._left -= 1
        if (
            isinstance(answer, ScanReply)
            and not answer.verdict
            and [piece.shard for piece in answer.slices] == [ask.shard for ask in request.shards]
        ):
            if answer.fenced:
                self._on_fenced(request.scope)
            for at, piece in zip(self._asked[request.disk], answer.slices, strict=True):
                if not piece.unreadable:
                    self.answers[at][request.disk] = piece
        if not self._left or self._enough(self.answers):
            self.end()
        elif self._timer is None and all(
            span.feed.quorum.met(told) for span, told in zip(self._spans, self.answers, strict=True)
        ):
            self._timer = self._loop.call_later(self._hedge_s, self.end)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.ended.done():
            self.ended.set_result(None)


class ShardReader:
    """Reads shards piece by piece, several at once; a disk that holds more of them than one is asked once a round."""

    def __init__(
        self,
        layouts: Layouts,
        replicas: Replicas,
        registers: Registers,
        liveness: Liveness,
        *,
        timeout_s: float,
        hedge_s: float,
        examine_max: int,
        remembered: Remembered,
        on_fenced: Callable[[bytes], None] = lambda scope: None,
    ) -> None:
        self._layouts = layouts
        self._replicas = replicas
        self._registers = registers
        self._liveness = liveness
        self._timeout_s = timeout_s
        self._hedge_s = hedge_s
        self._examine_max = examine_max
        self._remembered = remembered
        self._on_fenced = on_fenced
        self._usual_s = 0.0

    def feed(self, query: Query, shard: int, after: bytes) -> Feed:
        disks = self._layouts.current.replicas_of(RegisterName(query.table, query.scope, shard, b"").partition)
        alive = [disk for disk in disks if self._liveness.disk_readable(disk)] or list(disks)
        first = shard % len(alive)
        order = alive[first:] + alive[:first]
        quorum = Quorum(disks)
        return Feed(shard, quorum, order[0], after, quorum.prefix(order))

    async def pieces(self, query: Query, feeds: Sequence[Feed], limit: int) -> list[Piece]:
        """What each feed holds next, about ``limit`` entries of each. Raises ServiceUnavailable when one has no
        majority.
        """
        spans_max = max(1, min(SPANS_MAX, SHARDS_MAX // len(feeds)))
        runs = [self._spans(query, feed, limit, spans_max) for feed in feeds]
        spans = [span for run in runs for span in run]
        await self._bare_majority(query, spans)
        waiting = [span for span in spans if span.piece is None]
        for _ in range(2):
            if waiting:
                waiting = await self._everybody(query, waiting)
        differing = [span for span in spans if span.piece is None]
        if differing:
            for span in differing:
                if (
                    span.known is not None
                ):  # replicas that keep on differing would have it asked for again, and never get behind it
                    self._remembered.drop(span.known)
                    span.known = None
            answers = await self.ask_all(query, differing, Want.ALL)
            for span, told in zip(differing, answers, strict=True):
                span.piece = await self._settled(query, span.feed, told)
        return [_joined(run, exactly=bool(query.delimiter)) for run in runs]

    def _spans(self, query: Query, feed: Feed, limit: int, spans_max: int) -> list[Span]:
        """What is remembered of the feed's next ``limit`` entries, and when that is less, as many that follow: whoever
        goes on behind this page finds them.
        """
        if not query.heads:
            return [Span(feed, feed.through, limit)]
        after, spans, wanting = feed.through, [], limit
        for known in self._remembered.along(_place(query, feed.shard), after, limit, spans_max):
            spans.append(Span(feed, known.after, known.limit, known))
            if known.done:
                return spans
            wanting -= known.entries_behind(after)
            after = known.through
        if wanting > 0 and len(spans) < spans_max:
            spans.append(Span(feed, after, limit))
        return spans

    async def _bare_majority(self, query: Query, spans: Sequence[Span]) -> None:
        """The common case: those who are asked first agree, and each of them is asked once."""
        rows = query.rows

        def want(span: Span, disk: str) -> Want | None:
            return rows if disk == span.supplier else Want.STAMPS if disk in span.feed.first else None

        loop = asyncio.get_running_loop()
        began = loop.time()
        hurry_s = min(max(self._hedge_s, PATIENCE * self._usual_s), PATIENCE_HEDGES_MAX * self._hedge_s)
        answers = await self._ask(query, spans, want, lambda _answers: False, hurry_s=hurry_s)
        self._usual_s += (loop.time() - began - self._usual_s) / 8
        for span, told in zip(spans, answers, strict=True):
            if span.supplier in agreeing(span.feed, told):
                span.piece = self._piece(query, span, told[span.supplier])
            elif told and span.supplier not in told:  # it does not answer, or not in time
                span.supplier = span.feed.supplier = next(iter(told))

    async def _everybody(self, query: Query, spans: Sequence[Span]) -> list[Span]:
        """The spans whose supplier lags or is away: the same once more, from one of those that agree."""
        rows, asked = query.rows, self._worth_asking([span.feed for span in spans])

        def want(span: Span, disk: str) -> Want | None:
            return None if disk not in asked else rows if disk == span.supplier else Want.STAMPS

        def enough(answers: Sequence[Answers]) -> bool:
            return all(span.supplier in agreeing(span.feed, told) for span, told in zip(spans, answers, strict=True))

        answers = await self._ask(query, spans, want, enough)
        again = []
        for span, told in zip(spans, answers, strict=True):
            agreed = agreeing(span.feed, told)
            if span.supplier in agreed:
                span.piece = self._piece(query, span, told[span.supplier])
            elif agreed:
                span.supplier = span.feed.supplier = agreed[0]
                again.append(span)
        return again

    async def ask_all(self, query: Query, spans: Sequence[Span], want: Want) -> list[Answers]:
        """Asks every replica of every span's shard for the same, and waits for all of them, though not long for the
        last ones.

        Raises ServiceUnavailable when a shard has no majority.
        """
        answers = await self._ask(query, spans, lambda _span, _disk: want, lambda _answers: False)
        for span, told in zip(spans, answers, strict=True):
            if not span.feed.quorum.met(told):
                raise ServiceUnavailable(
                    f"Only {len(told)} of {len(span.feed.disks)} replicas of an index shard answer."
                )
        return answers

    def _worth_asking(self, feeds: Sequence[Feed]) -> set[str]:
        """Disks that are thought to be away are left out while every shard has a majority without them."""
        everyone = {disk for feed in feeds for disk in feed.disks}
        alive = {disk for disk in everyone if self._liveness.disk_readable(disk)}
        return alive if met_by_all((feed.quorum for feed in feeds), alive) else everyone

    def _requests(
        self, query: Query, spans: Sequence[Span], want: Wanted
    ) -> tuple[list[ScanRequest], dict[str, list[int]]]:
        """With the spans, by their numbers, that each disk is asked about. What is known has the bounds that it had:
        mostly nothing is sent of it, and were it more than
        a message takes, the replica leaves it out (``scan_store``)."""
        new = max(1, sum(span.known is None for span in spans))
        examine_max, bytes_max = self._examine_max // new, ROUND_BYTES_MAX // new
        asks: dict[str, list[ShardAsk]] = defaultdict(list)
        asked: dict[str, list[int]] = defaultdict(list)
        for number, span in enumerate(spans):
            shard, known = span.feed.shard, span.known.digest if span.known is not None else 0
            if span.known is None:
                span.bounds = min(self._examine_max, max(2 * span.limit, examine_max)), bytes_max
            else:
                span.bounds = span.known.bounds
            for disk in span.feed.disks:
                wanted = want(span, disk)
                if wanted is not None:
                    asks[disk].append(ShardAsk(shard, span.after, span.limit, wanted, *span.bounds, known))
                    asked[disk].append(number)
        epoch = self._layouts.current.epoch
        requests = [
            ScanRequest(
                disk, epoch, query.table, query.scope, tuple(shards), query.prefix, query.delimiter, query.visible
            )
            for disk, shards in asks.items()
        ]
        return requests, asked

    async def _ask(
        self, query: Query, spans: Sequence[Span], want: Wanted, enough: Enough, *, hurry_s: float | None = None
    ) -> list[Answers]:
        """Until ``enough``, or everybody answered, or a moment passed (``_Round``)."""
        requests, disks = self._requests(query, spans, want)
        asked = _Round(spans, disks, enough, self._hedge_s, self._on_fenced, hurry_s=hurry_s)
        tasks: list[asyncio.Task[None]] = []
        try:
            for request in requests:
                self._send(request, asked, tasks)
            await asked.ended
        finally:
            asked.end()
            for task in tasks:
                task.cancel()
            failed = await asyncio.gather(*tasks, return_exceptions=True) if tasks else ()
        for result in failed:
            if isinstance(result, Exception):
                raise result
        return asked.answers

    def _send(self, request: ScanRequest, asked: _Round, tasks: list[asyncio.Task[None]]) -> None:
        """Without a task where the replica can be asked without one. Whoever can't be reached counts as away; a
        majority does without, or the caller is told.
        """
        try:
            replica = self._replicas.replica(request.disk)
        except StoragedError as error:
            asked.heard(request, error)
            return
        work = ask_one(replica, request, partial(asked.heard, request), (), self._timeout_s)
        if work is not None:
            tasks.append(asyncio.create_task(work))

    async def _settled(self, query: Query, feed: Feed, answers: Answers) -> Piece:
        through, done = common_end(answers.values())
        decoded = {disk: _decoded(answer) for disk, answer in answers.items()}
        reports = reported(decoded, through, done)
        horizons = _horizons(query, decoded.values(), through, done)
        values: dict[bytes, Value | None] = {}
        doubtful = []
        for key, rows in reports.items():
            if key > horizons.get(common_prefix(key, query.prefix, query.delimiter), key):
                continue  # not all of the answers have looked this far into the common prefix
            ballot = feed.quorum.agreed({disk: row.ballot for disk, row in rows.items() if row.ballot})
            if ballot is not None:
                values[key] = next(row.value for row in rows.values() if row.ballot == ballot)
            elif feed.quorum.met(answers.keys() - rows.keys()):
                values[key] = None
            else:
                values[key] = None
                doubtful.append(key)
        settle = [
            self._read(RegisterName(query.table, query.scope, feed.shard, key), query.settling_nonce)
            for key in doubtful
        ]
        values |= zip(doubtful, await bounded(settle, SETTLING_MAX), strict=True)
        return _assemble(query, values, horizons, through, done)

    def _piece(self, query: Query, span: Span, answer: ShardSlice) -> Piece:
        """What a supplier answered that a majority agrees with."""
        if not query.heads:
            rows = [(row.key, row.value) for row in _decoded(answer) if row.value is not None]
            return Piece([key for key, _ in rows], [value for _, value in rows], answer.through, answer.done)
        if len(answer.keys) != len(answer.heads):
            raise ServiceUnavailable(
                "A replica's answer to a scan cannot be read: its keys and heads do not belong together."
            )
        held = span.known
        if held is None or held.digest != answer.digest or held.done != answer.done:
            # Rows that are the same were not sent again, though the shard may go on behind them now, or no longer.
            its = held if held is not None and held.digest == answer.digest else answer
            place, through, done = _place(query, span.feed.shard), answer.through, answer.done
            new = Held(place, span.after, span.limit, answer.digest, its.keys, its.heads, through, done, span.bounds)
            if held is not None:
                new.listed = held.listed
            self._remembered.keep(new)
            span.known = held = new
        return Piece(held.keys, held.heads, answer.through, answer.done)

    async def _read(self, name: RegisterName, settling_nonce: bytes) -> Value | None:
        return (await self._registers.read(name, settling_nonce=settling_nonce)).value


def _place(query: Query, shard: int) -> Place:
    return Place(query.table, query.scope, shard, query.prefix, query.delimiter, query.visible)


def _joined(run: Sequence[Span], *, exactly: bool) -> Piece:
    """The pieces of a feed's spans, as far as each begins no later than the one before it ends: that may have changed
    since it was remembered. ``exactly``: nor earlier.
    With a delimiter a key stands for all behind it, also where the piece before, told later, has found that this one is
    gone."""
    reached, done = run[0].feed.through, False
    keys: list[bytes] = []
    held: list[Any] = []
    for span in run:
        piece = span.piece
        assert piece is not None
        if span.after > reached or (exactly and span.after < reached):
            break
        first = bisect_right(piece.keys, reached)
        keys += piece.keys[first:]
        held += piece.held[first:]
        reached, done = max(reached, piece.through), piece.done
        if done:
            break
    parts = [span.known for span in run if span.known is not None]
    return Piece(keys, held, reached, done, parts, bool(parts) and run[0].feed.through < parts[0].listed)


def agreeing(feed: Feed, answers: Answers) -> list[str]:
    """The disks of a quorum that answered the same, or none."""
    quorum = feed.quorum
    if not quorum.met(answers):
        return []
    if len(answers) == quorum.fewest:  # mostly: those that were asked first
        first, *others = answers.values()
        for other in others:
            if other.digest != first.digest or other.through != first.through or other.done != first.done:
                return []
        return list(answers)
    same: dict[tuple[int, bytes, bool], list[str]] = {}
    for disk, answer in answers.items():
        same.setdefault((answer.digest, answer.through, answer.done), []).append(disk)
    largest = max(same.values(), key=len)
    return largest if quorum.met(largest) else []


def common_end(answers: Iterable[ShardSlice]) -> tuple[bytes, bool]:
    """Up to where all of the answers go, and whether all go to the end."""
    ends = [answer.through for answer in answers if not answer.done]
    return (min(ends), False) if ends else (b"", True)


def reported(answers: Mapping[str, Sequence[ScanRow]], through: bytes, done: bool) -> dict[bytes, dict[str, ScanRow]]:
    """Key -> disk -> its row, in key order, up to ``through``."""
    found: dict[bytes, dict[str, ScanRow]] = {}
    for disk, rows in answers.items():
        for row in rows:
            if done or row.key <= through:
                found.setdefault(row.key, {})[disk] = row
    return dict(sorted(found.items()))


def _decoded(answer: ShardSlice) -> list[ScanRow]:
    try:
        return decode_rows(answer.rows)
    except msgspec.MsgspecError as error:
        raise ServiceUnavailable(f"A replica's answer to a scan cannot be read: {error}") from None


def _horizons(query: Query, answers: Iterable[Sequence[ScanRow]], through: bytes, done: bool) -> dict[bytes, bytes]:
    """Common prefix -> the smallest key that stands for it in one of the answers: behind it that answer tells nothing
    of the prefix.
    """
    found: dict[bytes, bytes] = {}
    if query.delimiter:
        for rows in answers:
            for row in rows:
                group = common_prefix(row.key, query.prefix, query.delimiter)
                if group and row.ballot and row.visibility >= query.visible and (done or row.key <= through):
                    found[group] = min(row.key, found.get(group, row.key))
    return found


def _assemble(
    query: Query, values: dict[bytes, Value | None], horizons: dict[bytes, bytes], through: bytes, done: bool
) -> Piece:
    keys: list[bytes] = []
    shown: set[bytes] = set()
    for key, value in values.items():
        group = common_prefix(key, query.prefix, query.delimiter)
        if value is not None and value.visibility >= query.visible:
            keys.append(key)
            shown.add(group)
        if group and group not in shown and horizons.get(group) == key:
            through, done = key, False  # what stood for the prefix turned out not to be visible: look behind it
            break
    found = [value for key in keys if (value := values[key]) is not None]
    return Piece(keys, [head_of(value.body) for value in found] if query.heads else found, through, done)


async def bounded(work: Sequence[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """The results in order, at most ``limit`` running at once; the first failure ends all of it and is raised."""
    if not work:
        return []
    gate = asyncio.Semaphore(limit)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(coroutine)) for coroutine in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        for coroutine in work:  # those that never got to start
            coroutine.close()
    return [task.result() for task in tasks]
