"""A round of scans: requests to several disks at once, each about several shards, and the answers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from typing import Any

from storaged.cluster.ports import Layouts
from storaged.errors import StoragedError
from storaged.meta.consensus.register import Verdict
from storaged.meta.listing.cache import CACHE_BYTES_MAX
from storaged.meta.listing.query import Answers, PieceRead, Query
from storaged.meta.messages import ScanReply, ScanRequest, ShardAsk
from storaged.meta.ports import Replicas
from storaged.meta.storage.scan import EXAMINE_MAX, Want
from storaged.meta.transport.calls import ask_one
from storaged.units import MIB

ROUND_BYTES_MAX = 3 * MIB
"""All shards of a round together, below the 4 MiB that a message may have."""

HEDGE_S = 0.05
"""How long a round waits for the remaining answers once every shard has answers from a majority, and at the least for a
bare majority.
"""

SHARE_ROWS_MIN = 8

_MOVED = (Verdict.EPOCH, Verdict.NEWER)


def share_of(entries: int, feeds: int, turn: int) -> int:
    """Keys fall into shards like coins: a share is 2.5 standard deviations above the mean, so that one round is mostly
    enough. It doubles with every turn, for common prefixes that all shards have and for ranges full of deleted keys.
    """
    mean = entries / feeds
    return max(SHARE_ROWS_MIN, ceil(mean + 2.5 * sqrt(mean)) << turn)


@dataclass(frozen=True)
class ScanSettings:
    timeout_s: float = 10.0
    hedge_s: float = HEDGE_S
    share: Callable[[int, int, int], int] = share_of
    """``share(entries, feeds, turn)``: how many entries to ask of each feed."""
    examine_max: int = EXAMINE_MAX
    """Rows that a replica looks at for one of them."""
    cache_bytes_max: int = CACHE_BYTES_MAX


Enough = Callable[[Sequence[Answers]], bool]
"""Of the answers about each read, in order."""

Wanted = Callable[[PieceRead, str], Want | None]
"""What to ask of a disk about a read; None: nothing."""

OnFenced = Callable[[bytes], None]
"""``on_fenced(scope)``: a replica calls the scope fenced."""


class ScanRounds:
    """Asks disks about reads. A disk that has several shards of a round gets one request."""

    def __init__(self, layouts: Layouts, replicas: Replicas, settings: ScanSettings, on_fenced: OnFenced) -> None:
        self._layouts = layouts
        self._replicas = replicas
        self._settings = settings
        self._on_fenced = on_fenced

    async def ask(
        self,
        query: Query,
        reads: Sequence[PieceRead],
        want: Wanted,
        enough: Enough,
        *,
        hurry_s: float | None = None,
        hedge_s: float | None = None,
    ) -> list[Answers]:
        """Waits until ``enough``, or every disk has answered, or for a while (``_Round``; ``hedge_s``: another one than
        in the settings).
        """
        requests, reads_of = self._requests(query, reads, want)
        hedge_s = self._settings.hedge_s if hedge_s is None else hedge_s
        asked = _Round(reads, reads_of, enough, hedge_s, self._on_fenced, hurry_s=hurry_s)
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

    def _requests(
        self, query: Query, reads: Sequence[PieceRead], want: Wanted
    ) -> tuple[list[ScanRequest], dict[str, list[int]]]:
        """The requests, and the indices of the reads that each disk is asked about. Cached reads keep the bounds that
        they had: mostly no rows are sent of them, and the replica leaves out what a message does not take
        (``scan_store``).
        """
        examine_max = self._settings.examine_max
        new = max(1, sum(read.known is None for read in reads))
        asks: dict[str, list[ShardAsk]] = defaultdict(list)
        reads_of: dict[str, list[int]] = defaultdict(list)
        for number, read in enumerate(reads):
            shard, known = read.feed.shard, read.known.digest if read.known is not None else 0
            if read.known is None:
                read.bounds = min(examine_max, max(1, 2 * read.limit, examine_max // new)), ROUND_BYTES_MAX // new
            else:
                read.bounds = read.known.bounds
            for disk in read.feed.disks:
                wanted = want(read, disk)
                if wanted is not None:
                    epoch = read.feed.view.epoch
                    asks[disk].append(ShardAsk(shard, read.after, read.limit, wanted, *read.bounds, known, epoch))
                    reads_of[disk].append(number)
        epoch = self._layouts.current.epoch
        what = query.prefix, query.delimiter, query.visible, query.settling_nonce if query.after_fence else b""
        requests = [
            ScanRequest(disk, epoch, query.table, query.scope, tuple(shards), *what) for disk, shards in asks.items()
        ]
        return requests, reads_of

    def _send(self, request: ScanRequest, asked: _Round, tasks: list[asyncio.Task[None]]) -> None:
        """Without a task where the replica supports that. A disk that can't be reached counts as away: a majority does
        without it, or the caller raises.
        """
        try:
            replica = self._replicas.replica(request.disk)
        except StoragedError as error:
            asked.on_reply(request, error)
            return
        work = ask_one(replica, request, partial(asked.on_reply, request), (), self._settings.timeout_s)
        if work is not None:
            tasks.append(asyncio.create_task(work))


class _Round:
    """Requests that are out together, and their answers. ``ended`` is done when every disk has answered, ``enough``
    holds, or ``end`` is called.
    """

    def __init__(
        self,
        reads: Sequence[PieceRead],
        reads_of: dict[str, list[int]],
        enough: Enough,
        hedge_s: float,
        on_fenced: OnFenced,
        *,
        hurry_s: float | None,
    ) -> None:
        """``reads_of``: the reads that each disk is asked about. Ends ``hedge_s`` after every read has answers from a
        majority; with ``hurry_s`` in any case that long after its beginning.
        """
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.answers: list[Answers] = [{} for _ in reads]
        self._reads = reads
        self._reads_of = reads_of
        self._left = len(reads_of)
        self._enough = enough
        self._hedge_s = hedge_s
        self._on_fenced = on_fenced
        self._timer = self._loop.call_later(hurry_s, self.end) if hurry_s is not None else None

    def on_reply(self, request: ScanRequest, answer: Any, _bulk: object = None) -> None:
        """Ignores a refusal, an error, and an answer to anything other than the request."""
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
            for at, piece in zip(self._reads_of[request.disk], answer.slices, strict=True):
                if not piece.unreadable:
                    self.answers[at][request.disk] = piece
        elif isinstance(answer, ScanReply) and answer.verdict in _MOVED:
            for at in self._reads_of[request.disk]:
                self._reads[at].feed.moved = True
        if not self._left or self._enough(self.answers):
            self.end()
        elif self._timer is None and all(
            read.feed.quorum.met(answers) for read, answers in zip(self._reads, self.answers, strict=True)
        ):
            self._timer = self._loop.call_later(self._hedge_s, self.end)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.ended.done():
            self.ended.set_result(None)
