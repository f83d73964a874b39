"""Buckets: registers ``bucket/NAME``, authenticated by the keyring, created and deleted by compare-and-set.

    Active -> Deleting(nonce) -> Deleted                      empty: the fence of its id stays for ever
                              -> Active(nonce) -> Active      not empty: the fence is lifted, then the nonce cleared

A bucket whose only rows lend data to other buckets counts as empty, and becomes a lender (``system.lenders``).

Deleting a bucket closes it first: a durable fence on every index shard refuses all changes to its rows. Only then can
the check whether it is empty be trusted, and only what replicas with the fence answer counts: one that has no fence yet
may take a change after its answer. One of a majority may lie, and another one lag. So a bucket of which any replica
that answers has an object is not empty, unless a majority has something newer in its place. Every step is a
compare-and-set with the nonce of the attempt, so any gateway can continue where another stopped (``resume``): a record
that is Deleting, or Active with a nonce, owes a step. A fence is lifted only after its record left Deleting, so a
gateway that checks a fenced bucket can rely on the fence until its own step. A nonce begins with the record's sequence
number, so that the nonces of a bucket grow, and replicas refuse a fence that arrives late.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
import structlog

from storaged.cluster.layout import Layout
from storaged.cluster.policy import policy_of
from storaged.cluster.signers import signer_id
from storaged.errors import (
    BucketAlreadyExists,
    BucketAlreadyOwnedByYou,
    BucketNotEmpty,
    CopyUnreadable,
    DataDamaged,
    InvalidArgument,
    NoSuchBucket,
    ServiceUnavailable,
    SlowDown,
    TooManyBuckets,
)
from storaged.ids import BUCKET_ID_BYTES
from storaged.meta.listing.merge import any_row
from storaged.meta.names import Change, RegisterName, Table, Value, system_name
from storaged.meta.ports import PageQuery
from storaged.objects.api import ConfigurationChange, Principal
from storaged.objects.cache.ttl import TtlCache
from storaged.objects.configuration.document import NOTHING, Configuration, Kind
from storaged.objects.inventory.rows import drop_all_but
from storaged.objects.lifecycle.index import drop_index
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import ACTIVE, DELETED, DELETING, LENDING, BucketRecord
from storaged.objects.system import rows
from storaged.objects.system.bucket_records import PREFIX, BucketRecords, decode_bucket
from storaged.objects.system.emptying import (
    DOUBTED,
    REPLICA_AWAY,
    Left,
    end_remains,
    has_versions,
    is_doubted,
    left_under_fence,
)
from storaged.objects.system.fenced import FencedBuckets
from storaged.objects.system.lenders import LenderService, noted_name
from storaged.objects.system.shards import draw
from storaged.objects.write.ended_uploads import retire_uploads
from storaged.wire import Message

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Message)

NONCE_BYTES = 8
"""Random, after the sequence number."""
EMPTYING_ROUNDS_MAX = 8

OWNED_S = 10.0
OWNERS_MAX = 1024
"""How long, and for how many users, the number of their buckets is cached."""


class BucketService:
    """Implements ``api.Buckets``."""

    def __init__(self, plane: ObjectPlane) -> None:
        self._plane = plane
        limits = plane.limits
        self._cache: TtlCache[str, BucketRecord] = TtlCache(
            plane.clock, limits.bucket_cache_s, limits.cache_entries_max, self._load, plane.background.spawn
        )
        self.try_get = self._cache.try_get
        self._owned: dict[str, tuple[float, int]] = {}
        """User id -> when the count expires, and how many buckets the user has."""
        self._records = BucketRecords(plane)
        self._lenders = LenderService(plane, self._records)
        self._fenced = FencedBuckets(plane.clock, limits.bucket_cache_s)

    async def _step(self, record: BucketRecord, after: BucketRecord, *, draw: bytes = b"") -> BucketRecord | None:
        """See ``BucketRecords.step``."""
        self._cache.forget(record.name)
        try:
            return await self._records.step(record, after, draw=draw)
        finally:
            await self._changed(record.name)

    async def _changed(self, name: str) -> None:
        self._cache.forget(name)
        await self._plane.on_changed("bucket", name)

    def forget(self, name: str) -> None:
        """Drops the cached record: another process of this gateway has changed it."""
        self._cache.forget(name)

    async def create(
        self,
        who: Principal,
        name: str,
        *,
        region: str,
        countries: tuple[str, ...] = (),
        object_lock: bool = False,
        configuration: Configuration = NOTHING,
    ) -> BucketRecord:
        """Creates and commits the bucket's key before it takes the name. Raises InvalidArgument for a country that the
        cluster's policy does not allow, BucketAlreadyOwnedByYou, BucketAlreadyExists, TooManyBuckets, and
        ServiceUnavailable when no partition of the ring lies inside the countries.
        """
        layout = self._plane.layouts.current
        _require_allowed(layout, countries)
        register = system_name(PREFIX + name)
        self._plane.room.check(register, countries)
        existing = await self._records.read(name)
        if existing is not None and (existing.state == DELETING or existing.nonce):
            existing = await self.resume(existing)
        self._refuse_existing(who, existing)
        await self._require_room(who)
        drawn = draw(self._plane.layouts, countries, lambda: self._plane.entropy(BUCKET_ID_BYTES))
        record = BucketRecord(
            name,
            drawn.bucket_id,
            who.user_id,
            self._plane.clock.wall_ms(),
            ACTIVE,
            drawn.shards,
            region,
            countries,
            layout.profile,
            object_lock=object_lock,
            shard_list=drawn.shard_list,
        )
        record = self._plane.configurations.put(record, configuration)
        await self._plane.keys.create_bucket_key(record.id, record.countries)

        def update(value: Value | None) -> Change:
            self._refuse_existing(who, self._records.decode(register, value))
            return self._records.change(register, value, record)

        try:
            outcome = await self._plane.registers.change(register, update)
        finally:
            await self._changed(name)
        made = self._records.decode(register, outcome.after)
        assert made is not None
        self._count_one_more(who)
        return made

    async def _require_room(self, who: Principal) -> None:
        """Raises TooManyBuckets. A count reads the rows of all buckets of the cluster, so it is cached for ``OWNED_S``;
        a cached count refuses no request. When several processes create buckets of one user at once, the limit may be
        exceeded by what they create in that time.
        """
        limit, now = self._plane.limits.buckets_per_user_max, self._plane.clock.monotonic()
        kept_until, count = self._owned.get(who.user_id, (now, 0))
        if now < kept_until and count < limit:
            return
        owned, _ = await self.list_buckets(who, limit=limit)
        if len(owned) >= limit:
            raise TooManyBuckets
        if len(self._owned) >= OWNERS_MAX:
            self._owned.clear()
        self._owned[who.user_id] = now + OWNED_S, len(owned)

    def _count_one_more(self, who: Principal) -> None:
        kept = self._owned.get(who.user_id)
        if kept is not None:
            self._owned[who.user_id] = kept[0], kept[1] + 1

    @staticmethod
    def _refuse_existing(who: Principal, existing: BucketRecord | None) -> None:
        if existing is not None:
            raise BucketAlreadyOwnedByYou if existing.owner == who.user_id else BucketAlreadyExists

    async def get(self, name: str) -> BucketRecord:
        """Raises NoSuchBucket (also while it is being deleted), DataDamaged."""
        return await self._cache.get(name)

    def fenced(self, bucket_id: bytes) -> None:
        """A replica has reported the bucket as fenced."""
        if self._fenced.note_fenced(bucket_id):
            self._cache.forget_where(lambda record: record.id == bucket_id)

    def fences_seen(self) -> int:
        return self._fenced.count

    def gone(self, bucket: BucketRecord) -> bool:
        return self._fenced.is_fenced(bucket.id)

    async def renewed(self, name: str) -> BucketRecord:
        self._cache.forget(name)
        return await self._cache.get(name)

    async def _load(self, name: str) -> BucketRecord:
        since = self._fenced.count
        record = await self._records.read(name)
        if record is not None and record.state == ACTIVE and record.nonce:
            record = await self.resume(record)
        if record is None or record.state != ACTIVE:
            raise NoSuchBucket(BucketName=name)
        self._fenced.note_active(record.id, since, lingers=bool(record.nonce))
        return record

    async def list_buckets(
        self, who: Principal, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[BucketRecord], str | None]:
        """The principal's own, by name. A row that can't be used, of any owner, is skipped (``system.rows``).

        Reads the rows of all principals, and verifies only the principal's own.
        """

        def own(name: RegisterName, value: Value | None) -> BucketRecord | None:
            record = decode_bucket(value)
            return self._records.decode(name, value) if record is not None and record.owner == who.user_id else None

        plane, found = self._plane, list[BucketRecord]()
        begins, beyond = (PREFIX + prefix).encode(), (PREFIX + after).encode()
        async for record in rows.scan(plane.scanner, plane.bad_rows, own, begins, after=beyond):
            if record.state == ACTIVE:
                if len(found) >= limit:
                    return found, found[-1].name if found else after
                found.append(record)
        return found, None

    async def every_bucket(self) -> list[BucketRecord]:
        """All buckets of the cluster that are not deleted, in any state: for maintenance. Rows that can't be used are
        healed or named in ``plane.bad_rows``.
        """
        plane = self._plane
        return await rows.scan_healed(plane.scanner, plane.bad_rows, self._records.decode, PREFIX, self._records.read)

    async def sign_unsigned(self, records: Iterable[BucketRecord]) -> int:
        """Signs again the records without a signature of the cluster's current signing key: records from before there
        were signatures, or from before the keyring was exchanged.

        Returns how many. An authentic record was written by a gateway, signature included, so only the signer is
        compared. Raises KeyringUnavailable.
        """
        signer, signed = signer_id(self._plane.keys.public_signer()), 0
        for record in records:
            if record.signer == signer:
                continue
            name = system_name(PREFIX + record.name)

            def update(value: Value | None, name: RegisterName = name) -> Change | None:
                found = self._records.decode(name, value)
                return (
                    self._records.change(name, value, found) if found is not None and found.signer != signer else None
                )

            try:
                outcome = await self._plane.registers.change(name, update)
            except ServiceUnavailable as error:  # only this one failed; the next call tries it again
                log.info("the record of a bucket is signed later", bucket=record.name, reason=error.message)
                continue
            signed += outcome.before != outcome.after
            await self._changed(record.name)
        return signed

    async def is_deleted(self, name: str, bucket_id: bytes, nonce: bytes) -> bool:
        """Whether authentic records prove that this bucket was deleted by the attempt of this nonce, and that it lends
        nothing. ``name``: the bucket's, or ``noted_name``. A missing record proves nothing. The record of a lender with
        a lower nonce was written late: it waits for the final fence, which the caller of this sets. Raises DataDamaged
        for a record that is not authentic, ServiceUnavailable.
        """
        if name == noted_name(bucket_id):
            return await self._lenders.is_over(bucket_id, nonce)
        if not await self._records.is_deleted(name, bucket_id, nonce):
            return False
        lender = await self._lenders.find(bucket_id)
        return lender is None or lender.nonce < nonce

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        """Raises BucketNotEmpty, NoSuchBucket, ServiceUnavailable, and SlowDown when nothing but events that are not
        delivered yet is left, or only one replica knows of an object, or copies in other buckets use data and a replica
        is away; then nothing of the bucket has changed. Its open uploads end with it.
        """
        listed: Left | None = None
        hidden = PageQuery(Table.OBJECT, bucket.id, bucket.shard_numbers, hidden=True)
        for _ in range(EMPTYING_ROUNDS_MAX):
            row = await any_row(self._plane.scanner, hidden)
            left = Left.NOTHING
            if row is not None:
                left = Left.OBJECTS if has_versions(row) else await end_remains(self._plane, bucket)
            if left is Left.OBJECTS:
                break
            if left is Left.LOANS and not self._lenders.all_answer(bucket):
                raise SlowDown(REPLICA_AWAY)
            if row is None and listed is Left.NOTHING:
                raise SlowDown(DOUBTED)
            if left is listed is Left.LOANS:
                raise SlowDown(REPLICA_AWAY)
            listed = left
            deleting = await self._step(
                bucket, msgspec.structs.replace(bucket, state=DELETING), draw=self._plane.entropy(NONCE_BYTES)
            )
            if deleting is None:
                raise NoSuchBucket(BucketName=bucket.name)
            found = await self.resume(deleting)
            if found is None:
                return
            if found.state != ACTIVE:
                raise ServiceUnavailable("Another request is deleting this bucket.")
            bucket = found
        raise BucketNotEmpty(BucketName=bucket.name)

    async def resume(self, record: BucketRecord) -> BucketRecord | None:
        """Takes the steps that a record owes. Returns the bucket afterwards, None when it is deleted. Idempotent;
        several gateways may call it at once.
        """
        plane = self._plane
        if record.state == LENDING:
            return await self._lenders.tend(record)
        if record.state == DELETING:
            left = await self._left_in(record)
            if left is Left.OBJECTS:
                await self._step(record, msgspec.structs.replace(record, state=ACTIVE))
            elif await self._end(record, left):
                return None
            current = await self._current(record)
            if current is None:
                return None
            record = current
        if record.state == ACTIVE and record.nonce:
            if not await plane.fences.unfence(record.id, record.shard_numbers, record.nonce):
                return record  # the nonce stays until the last replica, which is away now, has lifted its fence too
            opened = msgspec.structs.replace(record, nonce=b"")
            return await self._step(record, opened) or await self._current(record)
        return record

    async def _current(self, record: BucketRecord) -> BucketRecord | None:
        """The current record of the same bucket; None when that bucket is deleted."""
        found = await self._records.read(record.name)
        return found if found is not None and found.id == record.id else None

    async def _end(self, record: BucketRecord, left: Left) -> bool:
        """Makes the record of an empty bucket Deleted. False: another request has taken the step, or another one."""
        plane, lender = self._plane, None
        if left is Left.LOANS:
            lender = await self._lenders.begin(record)
        else:
            await self._lenders.drop(record.id, record.nonce)
            # Before the record is Deleted: afterwards nothing leads to the key any more, since another bucket may take
            # the name.
            await plane.keys.end_bucket_key(record.id, record.name, record.nonce, record.shard_numbers)
        if await self._step(record, msgspec.structs.replace(record, state=DELETED)) is None:
            return False
        if lender is not None:
            plane.background.spawn(self._lenders.try_tend(lender))
            return True
        await plane.fences.fence(record.id, record.shard_numbers, record.nonce, final=True)
        plane.background.spawn(retire_uploads(plane, record))
        return True

    async def _left_in(self, bucket: BucketRecord) -> Left:
        """Fences the bucket and returns what it still has. Open uploads do not count. They stay until the bucket is
        Deleted, for it may turn out that an object is there. A Complete that is under way has its object by now, or
        never gets it. ``LOANS`` only where the bucket can become a lender: then its fences lend.
        """
        plane = self._plane
        with contextlib.suppress(NoSuchBucket):  # it is fenced already
            await drop_index(plane, bucket)
            await drop_all_but(plane, bucket)
        everywhere = await plane.fences.fence(bucket.id, bucket.shard_numbers, bucket.nonce)
        try:
            # In this order: to settle a key of which one replica alone has the object may be its end.
            if await is_doubted(plane, bucket):
                return Left.OBJECTS
            left = await left_under_fence(plane, bucket)
            if left is Left.LOANS and not (everywhere and await self._lenders.may_begin(bucket)):
                return Left.OBJECTS
        except (
            CopyUnreadable,
            DataDamaged,
        ):  # there may be an object: the bucket would stay closed until the disk is back
            return Left.OBJECTS
        return left

    async def set_owner(self, bucket: BucketRecord, owner: str) -> None:
        """Transfers a bucket to another user id. Its objects keep their owner. Raises NoSuchBucket."""
        await self._amend(bucket, lambda found: msgspec.structs.replace(found, owner=owner))

    async def _amend(self, bucket: BucketRecord, amended: Callable[[BucketRecord], BucketRecord]) -> None:
        """Changes the record of an active bucket; not when ``amended`` returns what it got. Raises NoSuchBucket when
        the name now belongs to another bucket, or the bucket is being deleted.
        """
        name = system_name(PREFIX + bucket.name)

        def update(value: Value | None) -> Change | None:
            found = self._records.decode(name, value)
            if found is None or found.id != bucket.id or found.state != ACTIVE:
                raise NoSuchBucket(BucketName=bucket.name)
            after = amended(found)
            return None if after is found else self._records.change(name, value, after)

        try:
            await self._plane.registers.change(name, update)
        finally:
            await self._changed(bucket.name)

    async def known_everywhere(self) -> None:
        """No gateway uses a record that it read longer ago. The rates of clocks may differ a little."""
        await asyncio.sleep(self._plane.limits.bucket_cache_s * 1.1)

    def configuration_of(self, record: BucketRecord) -> Configuration:
        """The configuration in this record. Raises DataDamaged, ServiceUnavailable."""
        return self._plane.configurations.of(record)

    async def configuration(self, bucket: BucketRecord) -> Configuration:
        """As of now, not of when ``bucket`` was read. Raises NoSuchBucket, DataDamaged, ServiceUnavailable."""
        found = await self._records.read(bucket.name)
        if found is None or found.id != bucket.id:
            raise NoSuchBucket(BucketName=bucket.name)
        return self._plane.configurations.of(found)

    async def configure(
        self, bucket: BucketRecord, kind: Kind[T], change: ConfigurationChange[T], *, who: Principal | None = None
    ) -> None:
        """Changes one kind of configuration by compare-and-set. ``who``: for the audit log. Raises NoSuchBucket,
        InvalidRequest (too much), and what ``change`` raises.
        """
        configurations = self._plane.configurations

        def amended(found: BucketRecord) -> BucketRecord:
            before = configurations.of(found)
            after = before.having(kind, change(before))
            return found if after == before else configurations.put(found, after)

        await self._amend(bucket, amended)


def _require_allowed(layout: Layout, countries: tuple[str, ...]) -> None:
    """Raises InvalidArgument for a country that the cluster's policy does not allow."""
    policy = policy_of(layout)
    for country in countries:
        if reason := policy.refusal(country):
            raise InvalidArgument(f"A bucket's countries are some of those that the cluster allows: {reason}.")
