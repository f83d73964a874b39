"""Settled pieces of shards: what a majority of each shard's replicas agrees on, and the rest settled through its registers.

Theory of operation
    In one round each shard's rows come from one replica (the *supplier*), digests from the others. When a majority has the same digest, the same
    ballots of the same keys lie on a majority, so every row is settled, and every key that isn't there isn't. Otherwise all rows are fetched from
    all replicas: a key that a majority holds at one ballot (or that a majority never heard of) is settled, each of the others is read
    through its register, which settles it. Taking the newest instead would list an object that the next GET denies.

    A common prefix stands for its keys when one of them is visible and settled. Where replicas differ inside of it, none has looked behind its own first visible
    key, so nothing is concluded about what lies behind the smallest of these: if no key up to there turns out to be visible, the piece ends there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Registers, Replicas, Row
from storaged.meta.scan import ScanReply, ScanRequest, ScanRow, ShardAsk, ShardSlice, Want, common_prefix, decode_rows
from storaged.units import MIB

T = TypeVar("T")

ROUND_BYTES_MAX = 3 * MIB
"""All shards of a round together, below the 4 MiB that a message may have."""

SETTLING_MAX = 32
HEDGE_S = 0.05
"""How long a round waits for the rest once every shard has answers from a majority."""


@dataclass(frozen=True)
class Query:
    """``visible``: the least Visibility that counts. ``settling_nonce`` of the scope's fence, if it has one."""

    table: int
    scope: bytes
    prefix: bytes
    delimiter: bytes
    visible: int
    settling_nonce: bytes = b""


@dataclass
class Feed:
    """One shard while it is read: known up to ``through``, or to its end."""

    shard: int
    disks: tuple[str, ...]
    supplier: str
    through: bytes
    done: bool = False

    @property
    def majority(self) -> int:
        return len(self.disks) // 2 + 1


class Piece(NamedTuple):
    """A settled piece of a shard: its visible rows (of common prefixes: the first), and up to where it goes."""

    rows: Sequence[Row]
    through: bytes
    done: bool


Answers = dict[int, dict[str, ShardSlice]]
"""shard -> disk -> what it answered."""

Enough = Callable[[Answers], bool]


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
    ) -> None:
        self._layouts = layouts
        self._replicas = replicas
        self._registers = registers
        self._liveness = liveness
        self._timeout_s = timeout_s
        self._hedge_s = hedge_s
        self._examine_max = examine_max

    def feed(self, query: Query, shard: int, after: bytes) -> Feed:
        disks = self._layouts.current.replicas_of(RegisterName(query.table, query.scope, shard, b"").partition)
        alive = [disk for disk in disks if self._liveness.disk_readable(disk)] or list(disks)
        return Feed(shard, disks, alive[shard % len(alive)], after)

    async def pieces(self, query: Query, feeds: Sequence[Feed], limit: int) -> list[Piece]:
        """What each feed holds next, about ``limit`` entries of each. Raises ServiceUnavailable when one has no majority."""
        found: dict[int, Piece] = {}
        waiting = list(feeds)
        for _ in range(2):
            answers = await self._ask_for_agreement(query, waiting, limit)
            again = []
            for feed in waiting:
                agreed = agreeing(feed, answers[feed.shard])
                if feed.supplier in agreed:
                    answer = answers[feed.shard][feed.supplier]
                    rows = [Row(row.key, row.value) for row in _decoded(answer) if row.value is not None]
                    found[feed.shard] = Piece(rows, answer.through, answer.done)
                elif agreed:  # the supplier lags or is away: the same once more, from one of those that agree
                    feed.supplier = agreed[0]
                    again.append(feed)
            waiting = again
            if not waiting:
                break
        differing = [feed for feed in feeds if feed.shard not in found]
        if differing:
            answers = await self.ask_all(query, differing, limit, Want.ALL)
            for feed in differing:
                found[feed.shard] = await self._settled(query, feed, list(answers[feed.shard].values()))
        return [found[feed.shard] for feed in feeds]

    async def ask_all(self, query: Query, feeds: Sequence[Feed], limit: int, want: Want) -> Answers:
        """Asks every replica of every feed for the same, and waits for all of them, though not long for the last ones.

        Raises ServiceUnavailable when a feed has no majority.
        """
        everyone = {disk for feed in feeds for disk in feed.disks}
        answers = await self._ask(query, feeds, limit, lambda _feed, _disk: want, everyone, lambda _answers: False)
        for feed in feeds:
            if len(answers[feed.shard]) < feed.majority:
                raise ServiceUnavailable(f"Only {len(answers[feed.shard])} of {len(feed.disks)} replicas of an index shard answer.")
        return answers

    async def _ask_for_agreement(self, query: Query, feeds: Sequence[Feed], limit: int) -> Answers:
        def want(feed: Feed, disk: str) -> Want:
            return Want.VISIBLE if disk == feed.supplier else Want.DIGEST

        def enough(answers: Answers) -> bool:
            return all(feed.supplier in agreeing(feed, answers[feed.shard]) for feed in feeds)

        return await self._ask(query, feeds, limit, want, self._worth_asking(feeds), enough)

    def _worth_asking(self, feeds: Sequence[Feed]) -> set[str]:
        """Disks that are thought to be away are left out while every shard has a majority without them."""
        everyone = {disk for feed in feeds for disk in feed.disks}
        alive = {disk for disk in everyone if self._liveness.disk_readable(disk)}
        return alive if all(sum(disk in alive for disk in feed.disks) >= feed.majority for feed in feeds) else everyone

    def _requests(
        self, query: Query, feeds: Sequence[Feed], limit: int, want: Callable[[Feed, str], Want], disks: set[str]
    ) -> list[ScanRequest]:
        examine_max = min(self._examine_max, max(2 * limit, self._examine_max // len(feeds)))
        bytes_max = ROUND_BYTES_MAX // len(feeds)
        asks: dict[str, list[ShardAsk]] = {}
        for feed in feeds:
            for disk in feed.disks:
                if disk in disks:
                    ask = ShardAsk(feed.shard, feed.through, limit, want(feed, disk), examine_max, bytes_max)
                    asks.setdefault(disk, []).append(ask)
        epoch = self._layouts.current.epoch
        return [
            ScanRequest(disk, epoch, query.table, query.scope, tuple(shards), query.prefix, query.delimiter, query.visible)
            for disk, shards in asks.items()
        ]

    async def _ask(
        self,
        query: Query,
        feeds: Sequence[Feed],
        limit: int,
        want: Callable[[Feed, str], Want],
        disks: set[str],
        enough: Enough,
    ) -> Answers:
        """Until ``enough``, or everybody answered, or a moment after every feed has a majority of answers."""
        answers: Answers = {feed.shard: {} for feed in feeds}
        arrived: asyncio.Queue[tuple[ScanRequest, ScanReply | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._ask_one(request, arrived)) for request in self._requests(query, feeds, limit, want, disks)]
        give_up_at: float | None = None
        try:
            for _ in tasks:
                async with asyncio.timeout_at(give_up_at):
                    request, reply = await arrived.get()
                _note_reply(answers, request, reply)
                if enough(answers):
                    break
                if give_up_at is None and all(len(answers[feed.shard]) >= feed.majority for feed in feeds):
                    give_up_at = asyncio.get_running_loop().time() + self._hedge_s
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result
        return answers

    async def _ask_one(self, request: ScanRequest, arrived: asyncio.Queue[tuple[ScanRequest, ScanReply | None]]) -> None:
        reply = None
        try:
            reply = await self._replicas.replica(request.disk).scan(request, timeout_s=self._timeout_s)
        except StoragedError:
            pass  # it counts as away; a majority does without it, or the caller is told
        finally:
            arrived.put_nowait((request, reply))

    async def _settled(self, query: Query, feed: Feed, answers: list[ShardSlice]) -> Piece:
        through, done = common_end(answers)
        decoded = [_decoded(answer) for answer in answers]
        reports = reported(decoded, through, done)
        horizons = _horizons(query, decoded, through, done)
        values: dict[bytes, Value | None] = {}
        doubtful = []
        for key, rows in reports.items():
            if key > horizons.get(common_prefix(key, query.prefix, query.delimiter), key):
                continue  # not all of the answers have looked this far into the common prefix
            ballot, count = _commonest(rows)
            if ballot and count >= feed.majority:
                values[key] = next(row.value for row in rows if row.ballot == ballot)
            elif len(answers) - len(rows) >= feed.majority:
                values[key] = None
            else:
                values[key] = None
                doubtful.append(key)
        settle = [self._read(RegisterName(query.table, query.scope, feed.shard, key), query.settling_nonce) for key in doubtful]
        values |= zip(doubtful, await bounded(settle, SETTLING_MAX), strict=True)
        return _assemble(query, values, horizons, through, done)

    async def _read(self, name: RegisterName, settling_nonce: bytes) -> Value | None:
        return (await self._registers.read(name, settling_nonce=settling_nonce)).value


def agreeing(feed: Feed, answers: dict[str, ShardSlice]) -> list[str]:
    """The disks of a majority that answered the same, or none."""
    if len(answers) < feed.majority:
        return []
    same: dict[tuple[int, bytes, bool], list[str]] = {}
    for disk, answer in answers.items():
        same.setdefault((answer.digest, answer.through, answer.done), []).append(disk)
    largest = max(same.values(), key=len)
    return largest if len(largest) >= feed.majority else []


def common_end(answers: Iterable[ShardSlice]) -> tuple[bytes, bool]:
    """Up to where all of the answers go, and whether all go to the end."""
    ends = [answer.through for answer in answers if not answer.done]
    return (min(ends), False) if ends else (b"", True)


def reported(answers: Iterable[list[ScanRow]], through: bytes, done: bool) -> dict[bytes, list[ScanRow]]:
    """Key -> the rows of all answers, in key order, up to ``through``."""
    found: dict[bytes, list[ScanRow]] = {}
    for rows in answers:
        for row in rows:
            if done or row.key <= through:
                found.setdefault(row.key, []).append(row)
    return dict(sorted(found.items()))


def _note_reply(answers: Answers, request: ScanRequest, reply: ScanReply | None) -> None:
    """A refusal, or an answer to something else than was asked, counts for nothing."""
    if reply is None or reply.verdict or [piece.shard for piece in reply.slices] != [ask.shard for ask in request.shards]:
        return
    for piece in reply.slices:
        if not piece.unreadable:
            answers[piece.shard][request.disk] = piece


def _decoded(answer: ShardSlice) -> list[ScanRow]:
    try:
        return decode_rows(answer.rows)
    except msgspec.MsgspecError as error:
        raise ServiceUnavailable(f"A replica's answer to a scan cannot be read: {error}") from None


def _commonest(rows: list[ScanRow]) -> tuple[bytes, int]:
    """The ballot that most of the rows carry, damaged ones apart."""
    ballots = Counter(row.ballot for row in rows if row.ballot)
    return ballots.most_common(1)[0] if ballots else (b"", 0)


def _horizons(query: Query, answers: list[list[ScanRow]], through: bytes, done: bool) -> dict[bytes, bytes]:
    """Common prefix -> the smallest key that stands for it in one of the answers: behind it that answer tells nothing of the prefix."""
    found: dict[bytes, bytes] = {}
    if query.delimiter:
        for rows in answers:
            for row in rows:
                group = common_prefix(row.key, query.prefix, query.delimiter)
                if group and row.ballot and row.visibility >= query.visible and (done or row.key <= through):
                    found[group] = min(row.key, found.get(group, row.key))
    return found


def _assemble(query: Query, values: dict[bytes, Value | None], horizons: dict[bytes, bytes], through: bytes, done: bool) -> Piece:
    rows: list[Row] = []
    shown: set[bytes] = set()
    for key, value in values.items():
        group = common_prefix(key, query.prefix, query.delimiter)
        if value is not None and value.visibility >= query.visible:
            rows.append(Row(key, value))
            shown.add(group)
        if group and group not in shown and horizons.get(group) == key:
            return Piece(rows, key, False)  # what stood for the prefix turned out not to be visible: look behind it
    return Piece(rows, through, done)


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
