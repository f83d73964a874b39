"""Delivers the events in the outboxes of keys, and removes them there (``write.outbox`` has the theory).

A process delivers the events of its own changes as soon as they are committed (``soon``). What it could not deliver, or
another process left when it ended, one gateway finds by the pointers of all buckets (``sweep``), every half minute.

Of one key, a destination gets an event only after it has acknowledged the ones before: events of a key that fail, or
whose destination the operator has not configured here, keep the later ones of that destination waiting. A destination
that does not answer is not asked again for ten seconds. Events whose bucket names the destination no more are given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from storaged.errors import DataDamaged, NoSuchBucket, StoragedError
from storaged.meta.listing.merge import every_row
from storaged.meta.names import RegisterName, Table, event_name, object_name
from storaged.meta.ports import PageQuery
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft
from storaged.objects.code.versions import Place, decode_record
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.notification import NOTIFICATION
from storaged.objects.destinations import DeliveryFailed, Destinations
from storaged.objects.event_document import document
from storaged.objects.pending_events import PendingEvent
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import ACTIVE, BucketRecord
from storaged.objects.system.buckets import BucketService
from storaged.objects.write.outbox import decode_keys, forget, open_event, stamped_ms
from storaged.objects.write.versioned import change_versions

WAITING_MAX = 8192
"""Keys that wait for their turn in this process. Further ones are left to the sweep."""
AT_ONCE = 16
DOWN_S = 10.0
SWEEP_S = 30.0
FRESH_MS = 10_000
"""A key that was noted so recently is left to the process that noted it."""

log = structlog.get_logger("notifications")


@dataclass
class EventCounts:
    """Since the start. ``given_up``: their bucket does not name the destination any more. ``left``: keys with events
    that the last sweep could not deliver.
    """

    delivered: int = 0
    failed: int = 0
    given_up: int = 0
    left: int = 0


class EventDelivery:
    """Of one process. ``run`` and ``run_sweep`` are its tasks."""

    def __init__(self, plane: ObjectPlane, buckets: BucketService, destinations: Destinations, region: str) -> None:
        self._plane = plane
        self._buckets = buckets
        self._destinations = destinations
        self._region = region
        self._waiting: dict[RegisterName, BucketRecord] = {}
        self._active: set[RegisterName] = set()
        self._something = asyncio.Event()
        self._down: dict[str, float] = {}
        """ARN -> until when it is not asked."""
        self.down_s = DOWN_S
        self.counts = EventCounts()

    def soon(self, bucket: BucketRecord, name: RegisterName) -> None:
        """The key has got events."""
        if len(self._waiting) < WAITING_MAX or name in self._waiting:
            self._waiting[name] = bucket
            self._something.set()

    async def run(self) -> None:
        """Runs for ever: delivers the events of the keys that ``soon`` got."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            name = next((one for one in self._waiting if one not in self._active), None)
            if name is None:
                self._something.clear()
                await self._something.wait()
                continue
            bucket = self._waiting.pop(name)
            await self._try_deliver(bucket, name)

    async def _try_deliver(self, bucket: BucketRecord, name: RegisterName) -> bool:
        """Returns whether the key has no events any more."""
        self._active.add(name)
        try:
            return await self.deliver(bucket, name)
        except NoSuchBucket:
            return True
        except StoragedError as error:
            log.info("events of a key wait", bucket=bucket.name, reason=error.message)
            return False
        except Exception:
            log.exception("events of a key can't be delivered", bucket=bucket.name)
            return False
        finally:
            self._active.discard(name)
            self._something.set()

    async def deliver(self, bucket: BucketRecord, name: RegisterName) -> bool:
        """Delivers what the key's outbox has, in order. Returns whether it is empty now. Raises StoragedError."""
        pointer = event_name(name)
        while True:
            stamp = decode_keys((await self._plane.registers.read(pointer)).value).stamps.get(name.key)
            record = decode_record((await self._plane.registers.read(name)).value)
            outbox = record.history.outbox if record.history is not None else ()
            if not outbox:
                return stamp is None or await forget(self._plane, name, stamp)
            done = await self._send_all(bucket, name, outbox)
            if not done:
                return False
            await self._remove(bucket, name, done)

    async def _send_all(self, bucket: BucketRecord, name: RegisterName, outbox: tuple[PendingEvent, ...]) -> set[bytes]:
        """The ids of the events that may go: they were acknowledged, or nobody wants them."""
        keys, place = BucketKeys(self._plane, bucket), Place(bucket.id, name.key)
        wanted = await self._wanted(bucket)
        if not wanted and not await self._wanted_now(bucket):  # events that can't be opened go, too
            self.counts.given_up += len(outbox)
            return {event.id for event in outbox}
        done: set[bytes] = set()
        stuck: set[str] = set()
        for event in outbox:
            facts = open_event(place, event, await keys.load(event.bucket_key))
            if facts.destination in stuck:
                continue
            if facts.destination not in wanted and facts.destination not in await self._wanted_now(bucket):
                self.counts.given_up += 1
                done.add(event.id)
            elif await self._send(facts.destination, document(bucket, name.key, facts, self._region)):
                self.counts.delivered += 1
                done.add(event.id)
            else:
                self.counts.failed += 1
                stuck.add(facts.destination)
        return done

    async def _wanted(self, bucket: BucketRecord) -> set[str]:
        """The destinations that the bucket named a moment ago. Raises NoSuchBucket."""
        record = await self._buckets.get(bucket.name)
        if record.id != bucket.id:
            raise NoSuchBucket(BucketName=bucket.name)
        return _destinations_in(self._buckets.configuration_of(record))

    async def _wanted_now(self, bucket: BucketRecord) -> set[str]:
        """As of now: an event is given up only for this. Raises NoSuchBucket."""
        return _destinations_in(await self._buckets.configuration(bucket))

    async def _send(self, arn: str, body: bytes) -> bool:
        if self._down.get(arn, 0.0) > self._plane.clock.monotonic():
            return False
        try:
            if not self._destinations.knows(arn):
                raise DeliveryFailed("[[notifications]] of this gateway does not have it")
            await self._destinations.send(arn, body)
        except DeliveryFailed as error:
            self._down[arn] = self._plane.clock.monotonic() + self.down_s
            log.warning("a destination of notifications does not take events", destination=arn, reason=str(error))
            return False
        return True

    async def _remove(self, bucket: BucketRecord, name: RegisterName, ids: set[bytes]) -> None:
        def edit(draft: Draft, _ordinal: int) -> bool:
            left = tuple(event for event in draft.outbox if event.id not in ids)
            changed = len(left) != len(draft.outbox)
            draft.outbox = left
            return changed

        await change_versions(self._plane, BucketKeys(self._plane, bucket), name, edit)

    # --- what other processes left

    async def run_sweep(self, is_mine: Callable[[], bool], interval_s: float = SWEEP_S) -> None:
        """Runs for ever. ``is_mine``: whether this gateway sweeps now, and no other."""
        while True:
            await asyncio.sleep(interval_s)
            if is_mine():
                try:
                    await self.sweep()
                except StoragedError as error:
                    log.info("pointers of events are looked at later", reason=error.message)

    async def sweep(self, fresh_ms: int = FRESH_MS) -> int:
        """Looks at all pointers once, and delivers. Returns how many keys still have events. Raises StoragedError."""
        left = 0
        for bucket in await self._buckets.every_bucket():
            if bucket.state != ACTIVE or not bucket.configuration:
                continue
            try:
                if self._buckets.configuration_of(bucket).get(NOTIFICATION) is not None:
                    left += await self._sweep_bucket(bucket, fresh_ms)
            except (NoSuchBucket, StoragedError) as error:
                log.info("events of a bucket wait", bucket=bucket.name, reason=error.message)
        self.counts.left = left
        return left

    async def _sweep_bucket(self, bucket: BucketRecord, fresh_ms: int) -> int:
        left, now_ms = 0, self._plane.clock.wall_ms()
        for shard in bucket.shard_numbers:
            async for row in every_row(self._plane.scanner, PageQuery(Table.EVENT, bucket.id, [shard])):
                try:
                    stamps = decode_keys(row.value).stamps
                except DataDamaged as error:
                    log.warning("the keys of a pointer are not known", bucket=bucket.name, reason=error.message)
                    continue
                for key, stamp in stamps.items():
                    if 0 <= now_ms - stamped_ms(stamp) < fresh_ms:
                        continue
                    name = object_name(bucket.id, bucket.shard_numbers, key)
                    if name not in self._active and not await self._try_deliver(bucket, name):
                        left += 1
        return left


def _destinations_in(configuration: Configuration) -> set[str]:
    found = configuration.get(NOTIFICATION)
    return {rule.destination for rule in found.rules} if found is not None else set()
