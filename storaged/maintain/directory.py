"""The bucket directory as a node without keys sees it: every bucket's record, and whether its public part is a
gateway's.

A record that does not decode, or can't be, is *unreadable*: whose bucket it is isn't known. One that decodes but whose
signature does not verify is
*doubted*: its registers are still brought together, but its countries are not believed, so nothing of it is judged,
rebuilt, moved or deleted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from storaged.cluster.signers import is_signed
from storaged.errors import CertificateRefused
from storaged.ids import BUCKET_ID_BYTES
from storaged.meta.listing.merge import every_row
from storaged.meta.names import SYSTEM_SCOPE, Table, Value, system_name
from storaged.meta.ports import PageQuery
from storaged.objects.records import BucketRecord
from storaged.objects.system.public import public_bytes
from storaged.wire import decode

if TYPE_CHECKING:
    from storaged.maintain.context import MaintainContext

BUCKETS = "bucket/"
SHARDS_MAX = 256
"""A shard's number is one byte."""

REFUSED_NAMED_MAX = 100
"""Buckets that are named with the reason; of more only the number is known."""

VERIFIED_A_TURN = 20
"""Signatures verified before others get the event loop: about 3 ms."""

UNKNOWN_SIGNERS_MAX = 8
"""Signers without a good statement that are looked up in one refresh: a forger may name as many as
there are records.
"""


class BucketDoubted(KeyError):
    """The bucket's record is not known to be a gateway's: nothing of it may be placed."""


class Buckets:
    """Bucket id -> its record. Read from the ring."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, BucketRecord] = {}
        self.unreadable = 0
        self.refused: dict[str, str] = {}
        """Register name -> why its record is unreadable or doubted, of up to ``REFUSED_NAMED_MAX``."""
        self._trusted: dict[bytes, tuple[int, bytes]] = {}
        """Bucket id -> sequence number and signature that were verified."""
        self._newest: dict[bytes, int] = {}
        """Row key -> the highest sequence number that was verified: an older record does not come back."""

    @property
    def whole(self) -> bool:
        """Every record is believed: so what is not in ``by_id`` is not there."""
        return not self.unreadable and len(self._trusted) == len(self.by_id)

    async def refresh(self, context: MaintainContext) -> None:
        """Raises ServiceUnavailable when the system partition has no majority."""
        trusted: dict[bytes, tuple[int, bytes]] = {}
        found: dict[bytes, BucketRecord] = {}
        doubted: dict[bytes, BucketRecord] = {}
        refused: dict[str, str] = {}
        unknown: dict[bytes, str] = {}
        unreadable = verified = 0
        prefix = system_name(BUCKETS).key
        async for row in every_row(
            context.scanner, PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=prefix, hidden=True)
        ):
            try:
                record = decode(row.value.body, BucketRecord)
                reason = problem_of(record, row.key.removeprefix(prefix))
            except msgspec.MsgspecError as error:
                record, reason = None, f"cannot be read: {error}"
            if record is None or reason:
                unreadable += 1
                self._refuse(context, refused, row.key, reason)
                continue
            proof = (row.value.sequence, record.signature)
            if self._trusted.get(record.id) == proof and self.by_id.get(record.id) == record:
                found[record.id], trusted[record.id] = record, proof
                continue
            reason = await self._doubt(context, row.key, record, row.value, unknown)
            if reason:
                doubted[record.id] = record
                self._refuse(context, refused, row.key, reason)
            else:
                found[record.id], trusted[record.id] = record, proof
                self._newest[row.key] = row.value.sequence
            verified += 1
            if verified % VERIFIED_A_TURN == 0:
                await asyncio.sleep(0)
        self.by_id, self._trusted, self.unreadable, self.refused = {**doubted, **found}, trusted, unreadable, refused

    async def _doubt(
        self, context: MaintainContext, key: bytes, record: BucketRecord, value: Value, unknown: dict[bytes, str]
    ) -> str:
        """Why the public part of a record is not believed; empty when it is. ``unknown``: signers that were found to be
        none in this refresh.
        """
        if not record.signature:
            return "is not signed: a gateway signs it when it looks at it next"
        if value.sequence < self._newest.get(key, 0):
            return "is older than one that was seen here before"
        if record.signer not in unknown and len(unknown) < UNKNOWN_SIGNERS_MAX:
            try:
                signer = await context.signers.key(record.signer)
            except CertificateRefused as error:
                unknown[record.signer] = error.message
            else:
                message = public_bytes(context.layouts.current.cluster, value.sequence, record)
                return "" if is_signed(signer, message, record.signature) else "is not what its signer signed"
        return f"is signed by none of this cluster: {unknown.get(record.signer, 'too many signers are unknown')}"

    def _refuse(self, context: MaintainContext, refused: dict[str, str], key: bytes, reason: str) -> None:
        name = key[:128].decode("utf-8", "backslashreplace")
        if self.refused.get(name) != reason:
            context.log(f"the record {name!r} {reason}; nothing of this bucket is repaired or moved")
        if len(refused) < REFUSED_NAMED_MAX:
            refused[name] = reason

    def is_trusted(self, scope: bytes) -> bool:
        return scope in self._trusted

    def countries_of(self, scope: bytes) -> tuple[str, ...]:
        """What placement goes by. Raises KeyError for a bucket that is not there (any more, or not yet), BucketDoubted
        for one whose record is not believed.
        """
        record = self.by_id[scope]
        if scope not in self._trusted:
            raise BucketDoubted(f"the record of bucket {record.name!r} is not known to be a gateway's")
        return record.countries


def problem_of(record: BucketRecord, name: bytes) -> str:
    """Why a record that decodes can't be; empty when it can."""
    if len(record.id) != BUCKET_ID_BYTES:
        return f"cannot be: its id has {len(record.id)} bytes"
    if not 1 <= record.shards <= SHARDS_MAX:
        return f"cannot be: it has {record.shards} shards"
    if record.shard_list and len(set(record.shard_list)) != record.shards:
        return f"cannot be: it lists {len(set(record.shard_list))} of {record.shards} shards"
    return "" if record.name.encode("utf-8", "surrogatepass") == name else "cannot be: it is of another bucket"
