"""Lenders: buckets that were deleted while copies in other buckets use their data (``write.loans``).

Theory of operation. A loan belongs to the row of the key that has the data. When its bucket is deleted the row has to
stay, with all that looks after it: rounds that settle it, repair, moves of blocks, and the end of the loan. For these
the bucket goes on under a name that no client can use. Its own name is free at once.

    bucket/NAME   Active -> Deleting(nonce) -> Deleted
    bucket/:ID                      Lending(nonce) -> Deleted     when its last loan has ended

*No client changes a lender.* A request may have slept since the bucket was there. The bucket's fence refuses it, and
stays until the lender has ended; then it becomes final, as that of every deleted bucket. Meanwhile it lends: it lets
pass what comes with its nonce. Only what uses ``lender_registers`` gets that, from the record of the lender.

*Every replica has the fence* before the bucket is a lender, and then every replica was asked for objects. So no replica
has one, nor takes one. A majority would not do. One replica without the fence may take a create that nobody sees, and a
round that settles the row, long after, might carry it on. A disk that comes to a partition gets the fences of its
majority; what it may take before is removed (``_remove_versions``): no request was told that it is there, for a
majority has refused it.

*The order.* The record of the lender is written first, then the name becomes Deleted; that is the deletion. If it does
not come to that, because a gateway died or an object was found, the name is Active again or stays Deleting. Then the
record of the lender goes (``tend``), unless the attempt with its nonce is still under way. What uses the nonce
meanwhile does no harm: it ends loans and names places, which the bucket itself would take.

*Late attempts.* A gateway may sleep before it writes the record of the lender. Meanwhile another attempt may delete the
bucket, whose loans have ended, and another bucket may take the name. Then the fence is final: it was set when nothing
was left. The record that was written late goes by that. Where the gateway died that was to set it, ``keyends`` does;
there such a record counts for nothing.

*The key* of the bucket stays as long as the lender. So it is noted with the key, before the name becomes Deleted, that
it ends with the lender: then its record, ``bucket/:ID``, has to say Deleted, and an absent record proves nothing.

*No new loans.* A lender gets no borrower any more, so it ends when those that it has have gone. Nothing is left then
that a request could still change, and no round has to be made.
"""

from __future__ import annotations

import msgspec
import structlog

from storaged.errors import NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.meta.listing.merge import any_row
from storaged.meta.names import Change, RegisterName, Table, Value, object_name, system_name
from storaged.meta.ports import PageQuery, Row
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import ACTIVE, DELETED, DELETING, LENDING, BucketRecord
from storaged.objects.system.bucket_records import BARE, PREFIX, BucketRecords, sequence_in
from storaged.objects.system.emptying import is_doubted
from storaged.objects.write.ended_uploads import end_uploads
from storaged.objects.write.lent_copy import replicas_answer
from storaged.objects.write.loans import retire_gone
from storaged.objects.write.versioned import change_versions

log = structlog.get_logger("housekeeping")


def lender_name(bucket_id: bytes) -> str:
    """The name of a lender in ``bucket/``: no bucket of a client has a colon in its name."""
    return f":{bucket_id.hex()}"


def noted_name(bucket_id: bytes) -> str:
    """What is noted with the key of a lender in place of a bucket's name. No register has it: gateways of version 0.1.0
    would take a record that says Deleted for the proof that the bucket was deleted. A lender's says that, too, when the
    bucket was not.
    """
    return f"{lender_name(bucket_id)}:"


class LenderService:
    """Implements ``ports.Lenders``."""

    def __init__(self, plane: ObjectPlane, records: BucketRecords) -> None:
        self._plane = plane
        self._records = records
        plane.lenders = self

    async def find(self, bucket_id: bytes) -> BucketRecord | None:
        found = await self._records.read(lender_name(bucket_id))
        return found if found is not None and found.id == bucket_id and found.state == LENDING else None

    async def bucket(self, name: str, bucket_id: bytes) -> BucketRecord | None:
        found = await self._records.read(name)
        if found is not None and found.id == bucket_id and found.state == ACTIVE:
            return found
        return await self.find(bucket_id)

    def all_answer(self, bucket: BucketRecord) -> bool:
        """Whether every replica of the bucket answers, as far as is known. Else it can't become a lender: then it is
        not closed for an attempt.
        """
        names = [RegisterName(Table.OBJECT, bucket.id, shard, b"") for shard in bucket.shard_numbers]
        return all(replicas_answer(self._plane, name) for name in names)

    async def may_begin(self, bucket: BucketRecord) -> bool:
        """Whether the bucket can become a lender, after every replica has got its fence, and only loans to other
        buckets were found: then all fences lend. Not while a majority of replicas runs version 0.1.0, which knows no
        such fence: the bucket has to open again, or it would be closed until they are restarted.
        """
        if await is_doubted(self._plane, bucket, everyone=True):
            return False
        try:
            return await self._plane.fences.fence(bucket.id, bucket.shard_numbers, bucket.nonce, lends=True)
        except ServiceUnavailable:
            return False

    async def begin(self, bucket: BucketRecord) -> BucketRecord:
        """Writes the record of the lender, and notes it with the bucket's key, before the bucket is Deleted. Raises
        DataDamaged, ServiceUnavailable.
        """
        name = system_name(PREFIX + lender_name(bucket.id))
        lender = msgspec.structs.replace(
            bucket,
            name=lender_name(bucket.id),
            formerly=bucket.name,
            state=LENDING,
            tags=BARE.tags,
            configuration=BARE.configuration,
            plain=BARE.plain,
        )

        def update(value: Value | None) -> Change | None:
            before = self._records.last_in(name, value)
            if before is not None and before.nonce > bucket.nonce:
                raise ServiceUnavailable("Another request has deleted this bucket, or goes on with it.")
            if before is not None and (before.nonce, before.state) == (bucket.nonce, LENDING):
                return None
            return self._records.change(name, value, lender)

        await self._plane.registers.change(name, update)
        await self._note(lender)
        return lender

    async def _note(self, lender: BucketRecord) -> None:
        """The key ends with the lender. An attempt before may have noted that it ends with the bucket: then a record of
        the lender that replicas hide would have it destroyed, and the fence made final.
        """
        await self._plane.keys.end_bucket_key(lender.id, noted_name(lender.id), lender.nonce, lender.shard_numbers)

    async def is_over(self, bucket_id: bytes, nonce: bytes) -> bool:
        """Whether authentic records prove that a bucket was deleted, and that the lender with this nonce, which it
        became or nearly became, has ended. Raises DataDamaged, ServiceUnavailable.
        """
        last = await self._records.last(lender_name(bucket_id))
        if last is None or (last[1].state, last[1].nonce) != (DELETED, nonce):
            return False
        return await self._records.is_deleted(last[1].formerly, bucket_id, nonce)

    async def drop(self, bucket_id: bytes, nonce: bytes) -> None:
        """Removes the record of a lender that an attempt before that of ``nonce`` has left. Raises DataDamaged,
        ServiceUnavailable.
        """
        found = await self.find(bucket_id)
        if found is not None and found.nonce < nonce:
            await self._records.step(found, msgspec.structs.replace(found, state=DELETED))

    # --- upkeep

    async def tend(self, lender: BucketRecord) -> BucketRecord | None:
        """Looks after a lender: ends it when it lends nothing any more, or if its bucket was not deleted. Returns None
        when it has ended. Raises DataDamaged, ServiceUnavailable.
        """
        last = await self._records.last(lender.formerly)
        if last is None or last[0] <= sequence_in(lender.nonce):
            return lender  # from before the deletion began: it proves nothing
        _, record = last
        if record.id == lender.id and (record.state, record.nonce) != (DELETED, lender.nonce):
            if (record.state, record.nonce) == (DELETING, lender.nonce):
                return lender  # the deletion goes on
            await self._records.step(lender, msgspec.structs.replace(lender, state=DELETED))
            return None
        if await self._has_ended(lender):
            await self._records.step(lender, msgspec.structs.replace(lender, state=DELETED))
            return None
        # A disk that has come since may have a plain fence, if another one lied about it.
        await self._plane.fences.fence(lender.id, lender.shard_numbers, lender.nonce, lends=True)
        await end_uploads(self._plane.for_lenders(lender), lender)
        while (row := await self._any_row(lender)) is not None:
            if not (decode_record(row.value).versions and await self._remove_versions(lender, row.key)):
                return lender
        return None if await self._end(lender) else lender

    async def _has_ended(self, lender: BucketRecord) -> bool:
        """Whether the bucket's fence is final: any key tells. Raises ServiceUnavailable."""
        name = object_name(lender.id, lender.shard_numbers, b"any")
        try:
            await self._plane.registers.settle(name)  # without the nonce: its fence refuses it in any case
        except NoSuchBucket as error:
            return bool(error.details.get("final"))
        return False

    async def try_tend(self, lender: BucketRecord) -> None:
        """As ``tend``, in the background."""
        try:
            await self.tend(lender)
        except StoragedError:
            return  # housekeeping does it again

    async def _any_row(self, lender: BucketRecord) -> Row | None:
        scope, shards, nonce = lender.id, lender.shard_numbers, lender.nonce
        wanted = PageQuery(Table.OBJECT, scope, shards, hidden=True, settling_nonce=nonce, after_fence=True)
        return await any_row(self._plane.scanner, wanted)

    async def _remove_versions(self, lender: BucketRecord, key: bytes) -> bool:
        """Of a request that every majority has refused. Whether there were some. Raises ServiceUnavailable."""
        plane, name = self._plane.for_lenders(lender), object_name(lender.id, lender.shard_numbers, key)

        def edit(draft: Draft, _ordinal: int) -> bool:
            entries = list(draft.inline)
            for entry in entries:
                draft.remove(entry)
            return bool(entries)

        _, gone = await change_versions(plane, BucketKeys(plane, lender), name, edit)
        retire_gone(plane, lender, name, gone)
        log.info("a version of a deleted bucket is removed: its request was refused", bucket=lender.formerly)
        return bool(gone.versions)

    async def _end(self, lender: BucketRecord) -> bool:
        plane = self._plane
        await self._note(lender)
        if await self._records.step(lender, msgspec.structs.replace(lender, state=DELETED)) is None:
            return False
        await plane.fences.fence(lender.id, lender.shard_numbers, lender.nonce, final=True)
        log.info("a deleted bucket lends nothing any more", bucket=lender.formerly, id=lender.id.hex())
        return True
