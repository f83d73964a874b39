"""The bucket directory as a node without keys sees it: every bucket's record, and whether a gateway signed its public
part.

A record that does not decode, or has impossible contents, is *unreadable*: its bucket isn't known. One that decodes but
whose signature does not verify is *unverified*: the replicas of its registers are still brought to one state, but its
countries are not believed, so nothing of the bucket is judged, rebuilt, moved or deleted.
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
"""Buckets that are named with the reason. Of further ones only the number is known."""

VERIFIED_A_TURN = 20
"""Signatures verified before others get the event loop: about 3 ms."""

UNKNOWN_SIGNERS_MAX = 8
"""Unknown signers that are looked up in one refresh: a forger may name another one in every record."""


class BucketUnverified(KeyError):
    """The bucket's record is not known to be a gateway's: nothing of the bucket may be placed."""


class Buckets:
    """``by_id``: bucket id -> record, those of unverified records included. Read from the ring."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, BucketRecord] = {}
        self.unreadable = 0
        self.refused: dict[str, str] = {}
        """Register name -> why its record is unreadable or unverified, of up to ``REFUSED_NAMED_MAX``."""
        self._verified: dict[bytes, tuple[int, bytes]] = {}
        """Bucket id -> the sequence number and signature that were verified."""
        self._newest: dict[bytes, int] = {}
        """Row key -> the highest sequence number that was verified: an older record is not accepted again."""

    @property
    def complete(self) -> bool:
        """Every record is verified: a bucket that is not in ``by_id`` does not exist."""
        return not self.unreadable and len(self._verified) == len(self.by_id)

    async def refresh(self, context: MaintainContext) -> None:
        """Raises ServiceUnavailable when the system partition has no majority."""
        verified: dict[bytes, tuple[int, bytes]] = {}
        found: dict[bytes, BucketRecord] = {}
        unverified: dict[bytes, BucketRecord] = {}
        refused: dict[str, str] = {}
        unknown: dict[bytes, str] = {}
        unreadable = verifications = 0
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
            if self._verified.get(record.id) == proof and self.by_id.get(record.id) == record:
                found[record.id], verified[record.id] = record, proof
                continue
            reason = await self._verify(context, row.key, record, row.value, unknown)
            if reason:
                unverified[record.id] = record
                self._refuse(context, refused, row.key, reason)
            else:
                found[record.id], verified[record.id] = record, proof
                self._newest[row.key] = row.value.sequence
            verifications += 1
            if verifications % VERIFIED_A_TURN == 0:
                await asyncio.sleep(0)
        self.by_id, self._verified = {**unverified, **found}, verified
        self.unreadable, self.refused = unreadable, refused

    async def _verify(
        self, context: MaintainContext, key: bytes, record: BucketRecord, value: Value, unknown: dict[bytes, str]
    ) -> str:
        """Why the public part of a record is not believed; empty when it is. ``unknown``: the
        signers that this refresh could not verify, with the reason.
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

    def is_verified(self, scope: bytes) -> bool:
        return scope in self._verified

    def countries_of(self, scope: bytes) -> tuple[str, ...]:
        """The bucket's countries, for placement. Raises KeyError for a bucket that is not in the directory (any more,
        or yet), BucketUnverified for one whose record is not verified.
        """
        record = self.by_id[scope]
        if scope not in self._verified:
            raise BucketUnverified(f"the record of bucket {record.name!r} is not known to be a gateway's")
        return record.countries


def problem_of(record: BucketRecord, name: bytes) -> str:
    """What is impossible in a record that decodes; empty when nothing is."""
    if len(record.id) != BUCKET_ID_BYTES:
        return f"cannot be: its id has {len(record.id)} bytes"
    if not 1 <= record.shards <= SHARDS_MAX:
        return f"cannot be: it has {record.shards} shards"
    if record.shard_list and len(set(record.shard_list)) != record.shards:
        return f"cannot be: it lists {len(set(record.shard_list))} of {record.shards} shards"
    return "" if record.name.encode("utf-8", "surrogatepass") == name else "cannot be: it is of another bucket"
