"""Quotas of buckets and of accounts: how many bytes and objects they may have, judged before a write takes anything.

Theory of operation. Nothing counts a bucket's objects as they come and go: a count is a walk over the bucket's list
(``usage``). So each process of a gateway walks the buckets that have a quota, or whose owner has one, now and then, and
adds what it has admitted itself since. The slack is this:

* A quota that was set or changed holds after ``LOOK_S``, or ``LOOK_REST`` times what it takes to read the records of
  all buckets, if that is longer.
* Writes that other processes and gateways admitted since the last walk are not counted. A bucket is walked again after
  ``COUNT_S``, or after ``REST`` times the time that the walk took, if that is longer. So while all gateways write, a
  quota is exceeded by what they write in that time.
* An overwrite counts as one more object until the next walk. Before a write is refused for what was only added since
  the walk, the bucket is walked again, if that takes less than ``SOON_S``; a larger one refuses until its next walk.
* What was deleted gives room after the next walk, which a refusal asks for in the same way.
* A write whose size is not known before it ends, a browser's form for example, counts its bytes when it has ended.
  Writes under way when a walk begins are not counted until the next one.
* After the start of a process a bucket takes writes until it was walked once, and so does one that can't be listed.

Sizes are those that clients see, of all versions. An open upload counts as an object, with the parts that it has: else
uploads that are never completed, or all at once, would exceed any quota.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog

from storaged.clock import Clock
from storaged.errors import QuotaExceeded, StoragedError
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.kinds import QUOTA
from storaged.objects.records import BucketRecord
from storaged.objects.usage import Usage

LOOK_S: Final = 30.0
COUNT_S: Final = 60.0
LOOK_REST: Final = 100.0
REST: Final = 20.0
SOON_S: Final = 2.0

log = structlog.get_logger(__name__)


class Limit(NamedTuple):
    """0: no limit."""

    bytes: int = 0
    objects: int = 0

    def __bool__(self) -> bool:
        return bool(self.bytes or self.objects)


@dataclass
class _Counted:
    """A bucket: what the last walk found, and what this process has admitted since it began."""

    record: BucketRecord
    objects: int = 0
    bytes: int = 0
    counted_s: float = -1.0
    """When the last walk began; negative: there was none."""
    walks: int = 0
    """How many walks have begun, including those that failed."""
    took_s: float = 0.0
    more_objects: int = 0
    more_bytes: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sources(NamedTuple):
    """What quotas are read from. ``accounts``: canonical ids and limits of the accounts that have one. ``usage``: of a
    piece of a bucket, after a mark. ``uploads``: how many are open in a bucket, and the bytes of their parts."""

    buckets: Callable[[], Awaitable[list[BucketRecord]]]
    configuration: Callable[[BucketRecord], Configuration]
    accounts: Callable[[], AsyncIterator[tuple[str, Limit]]]
    usage: Callable[[BucketRecord, str], Awaitable[Usage]]
    uploads: Callable[[BucketRecord], Awaitable[tuple[int, int]]]


class Quotas:
    """The quotas of all buckets, as this process knows them."""

    def __init__(self, sources: Sources, clock: Clock) -> None:
        self._sources = sources
        self._clock = clock
        self._buckets: dict[bytes, Limit] = {}
        self._accounts: dict[str, Limit] = {}
        self._counted: dict[bytes, _Counted] = {}
        self.watched = False
        """Whether any bucket or account has a quota: else writes ask nothing more."""

    async def run(self) -> None:
        """Runs for ever: learns quotas, and walks what they are of."""
        while True:
            began_s = self._clock.monotonic()
            try:
                await self._learn()
            except StoragedError as error:
                log.debug("quotas are looked at later", reason=error.message)
            pause_s = max(LOOK_S, LOOK_REST * (self._clock.monotonic() - began_s))
            await self._count()
            await asyncio.sleep(pause_s)

    async def look(self) -> None:
        """One round. Raises ServiceUnavailable, KeyringUnavailable."""
        await self._learn()
        await self._count()

    async def _learn(self) -> None:
        """Reads all quotas."""
        accounts = {user_id: limit async for user_id, limit in self._sources.accounts()}
        buckets, counted = {}, {}
        for record in await self._sources.buckets():
            limit = self._limit_of(record)
            if limit:
                buckets[record.id] = limit
            if record.state == "active" and (limit or record.owner in accounts):
                known = self._counted.get(record.id)
                counted[record.id] = known if known is not None else _Counted(record)
                counted[record.id].record = record
        self._accounts, self._buckets, self._counted = accounts, buckets, counted
        self.watched = bool(counted)

    async def _count(self) -> None:
        for bucket in list(self._counted.values()):
            if self._is_due(bucket, COUNT_S):
                await self._walk(bucket)

    def _limit_of(self, record: BucketRecord) -> Limit:
        if not record.configuration:
            return Limit()
        try:
            found = self._sources.configuration(record).get(QUOTA)
        except StoragedError:
            return self._buckets.get(record.id, Limit())
        return Limit(found.bytes, found.objects) if found is not None else Limit()

    def _is_due(self, bucket: _Counted, seconds: float) -> bool:
        age_s = self._clock.monotonic() - bucket.counted_s
        return bucket.counted_s < 0 or age_s >= max(seconds, REST * bucket.took_s)

    async def _walk(self, bucket: _Counted) -> None:
        """Counts a bucket. One that fails is counted in a later round. All callers that ask for a walk while one is
        under way share the next one: otherwise each of many refused writes would list the whole bucket."""
        walks = bucket.walks
        async with bucket.lock:
            if bucket.walks != walks:
                return  # one has begun since
            bucket.walks += 1
            began_s = self._clock.monotonic()
            before = (bucket.more_objects, bucket.more_bytes)
            after: str | None = ""
            try:
                objects, size = await self._sources.uploads(bucket.record)
                while after is not None:
                    piece = await self._sources.usage(bucket.record, after)
                    objects, size, after = objects + piece.versions, size + piece.size_bytes, piece.next_after
            except StoragedError as error:
                log.info("a bucket with a quota is counted later", bucket=bucket.record.name, reason=error.message)
                return
            bucket.objects, bucket.bytes, bucket.counted_s = objects, size, began_s
            bucket.took_s = self._clock.monotonic() - began_s
            bucket.more_objects -= before[0]
            bucket.more_bytes -= before[1]

    def limits(self, bucket: BucketRecord) -> bool:
        """Whether a quota holds for a bucket."""
        return self.watched and bucket.id in self._counted

    async def admit(self, bucket: BucketRecord, size: int | None, objects: int = 1) -> None:
        """Counts a write of ``size`` bytes (None: not known) and ``objects`` objects before it begins. Raises
        QuotaExceeded."""
        counted = self._counted.get(bucket.id)
        if counted is None:
            return
        if not self._fits(counted, size, objects):
            for each in self._of_same(counted):
                if each.took_s < SOON_S and (each.more_objects or self._is_due(each, SOON_S)):
                    await self._walk(each)
            if not self._fits(counted, size, objects):
                raise QuotaExceeded(BucketName=bucket.name)
        counted.more_objects += objects
        counted.more_bytes += size or 0

    def add(self, bucket: BucketRecord, size: int) -> None:
        """Counts the bytes of a write that was admitted without its size."""
        counted = self._counted.get(bucket.id)
        if counted is not None:
            counted.more_bytes += size

    def _of_same(self, counted: _Counted) -> list[_Counted]:
        """The buckets that share a quota with this one."""
        if counted.record.owner not in self._accounts:
            return [counted]
        return [each for each in self._counted.values() if each.record.owner == counted.record.owner]

    def _fits(self, counted: _Counted, size: int | None, objects: int) -> bool:
        own = self._buckets.get(counted.record.id, Limit())
        if not _has_room(own, [counted], size, objects):
            return False
        account = self._accounts.get(counted.record.owner, Limit())
        return _has_room(account, self._of_same(counted), size, objects) if account else True


def _has_room(limit: Limit, buckets: list[_Counted], size: int | None, objects: int) -> bool:
    """A write of unknown size fits while anything is left."""
    if (
        limit.objects
        and objects
        and sum(each.objects + each.more_objects for each in buckets) + objects > limit.objects
    ):
        return False
    if not limit.bytes:
        return True
    used = sum(each.bytes + each.more_bytes for each in buckets)
    return used < limit.bytes if size is None else used + size <= limit.bytes
