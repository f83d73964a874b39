"""The records of buckets: decoded, verified, and changed with a signature and an authenticator."""

from __future__ import annotations

from typing import Any

import msgspec

from storaged.cluster.signers import signer_id
from storaged.errors import DataDamaged
from storaged.meta.names import Change, RegisterName, Value, Visibility, system_name
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import DELETED, BucketRecord
from storaged.objects.system import rows
from storaged.objects.system.public import public_bytes
from storaged.wire import decode, encode

PREFIX = "bucket/"
NONCE_SEQUENCE_BYTES = 8

BARE = BucketRecord("", b"", "", 0, "", 0, "")
"""What a deleted bucket, or a lender, keeps of its configuration."""


def sequence_in(nonce: bytes) -> int:
    """The sequence number of the record that the attempt with this nonce found when it began to delete the bucket."""
    return int.from_bytes(nonce[:NONCE_SEQUENCE_BYTES], "big")


_AUTHENTICATOR_AT = BucketRecord.__struct_fields__.index("authenticator")


def authenticated_bytes(body: bytes) -> bytes:
    """The bytes that the authenticator of a bucket's record covers: the record in ``body`` with an empty authenticator,
    and with as many fields as when it was written (old records have fewer). Empty for a record that ends before its
    authenticator.
    """
    fields = decode(body, list[Any])
    if len(fields) <= _AUTHENTICATOR_AT:
        return b""
    fields[_AUTHENTICATOR_AT] = b""
    return encode(fields)


class BucketRecords:
    """Reads and changes the registers ``bucket/NAME``."""

    def __init__(self, plane: ObjectPlane) -> None:
        self._plane = plane

    def decode(self, name: RegisterName, value: Value | None) -> BucketRecord | None:
        """None when there is none, or it was deleted. Raises DataDamaged for a record that no gateway of this cluster
        wrote.
        """
        record = decode_bucket(value)
        if record is None or value is None:
            return None
        return self.verified(name, value, record)

    def verified(self, name: RegisterName, value: Value, record: BucketRecord) -> BucketRecord:
        """Raises DataDamaged."""
        covered = authenticated_bytes(value.body)
        if not covered or not self._plane.keys.verify(
            rows.context_of(name, value.sequence), covered, record.authenticator
        ):
            raise DataDamaged("The record of this bucket is not authentic.")
        return record

    def require_authentic(self, name: RegisterName, value: Value) -> None:
        """Raises DataDamaged for a value that no gateway of this cluster wrote, also for a deletion, which leaves the
        record and notes it there.
        """
        record = self.verified(name, value, record_in(value.body))
        if (value.visibility == Visibility.TOMBSTONE) != (record.state == DELETED):
            raise DataDamaged("The record of this bucket says otherwise than its row.")

    async def read(self, name: str) -> BucketRecord | None:
        """The current record of a name, healed if possible. Raises DataDamaged, ServiceUnavailable."""
        plane, register = self._plane, system_name(PREFIX + name)

        def rewrite(value: Value, record: BucketRecord) -> Change:
            return self.change(register, value, record)

        return await rows.read(plane.registers, plane.bad_rows, self.decode, rewrite, PREFIX + name)

    async def last(self, name: str) -> tuple[int, BucketRecord] | None:
        """The sequence and the record of the last change of a name, also of a deletion; None: it was never used. Raises
        DataDamaged, ServiceUnavailable.
        """
        register = system_name(PREFIX + name)
        value = (await self._plane.registers.read(register)).value
        record = self.last_in(register, value)
        return None if value is None or record is None else (value.sequence, record)

    def last_in(self, name: RegisterName, value: Value | None) -> BucketRecord | None:
        """As ``decode``, also of a bucket that was deleted. Raises DataDamaged."""
        return None if value is None or not value.body else self.verified(name, value, record_in(value.body))

    async def is_deleted(self, name: str, bucket_id: bytes, nonce: bytes) -> bool:
        """Whether an authentic record proves that this bucket was deleted by the attempt of this nonce: its own record,
        or that of a later bucket of the same name. Raises as ``last``.
        """
        found = await self.last(name)
        if found is None:
            return False
        sequence, record = found
        if record.id == bucket_id:
            return record.state == DELETED
        return sequence > sequence_in(nonce)

    async def step(self, record: BucketRecord, after: BucketRecord, *, draw: bytes = b"") -> BucketRecord | None:
        """Compare-and-set from exactly ``record`` (by id, state and nonce). ``draw``: random bytes; the new record then
        gets a nonce above all before it. None when the register has another record by now.
        """
        name = system_name(PREFIX + record.name)
        done = False

        def update(value: Value | None) -> Change | None:
            nonlocal done, after
            found = self.decode(name, value)
            done = found is not None and (found.id, found.state, found.nonce) == (record.id, record.state, record.nonce)
            if not done or found is None or value is None:
                return None
            if draw:
                after = msgspec.structs.replace(
                    after, nonce=value.sequence.to_bytes(NONCE_SEQUENCE_BYTES, "big") + draw
                )
            kept = found if after.state != DELETED else BARE
            after = msgspec.structs.replace(
                after, tags=kept.tags, configuration=kept.configuration, plain=kept.plain, object_lock=found.object_lock
            )
            return self.change(name, value, after)

        await self._plane.registers.change(name, update)
        return after if done else None

    def change(self, name: RegisterName, before: Value | None, record: BucketRecord) -> Change:
        """Signs the record for nodes without keys, and authenticates it. Both cover the sequence number too, so that an
        older record can't be replayed under a newer number.
        """
        keys, sequence = self._plane.keys, rows.sequence_after(before)
        signature = keys.sign_public(public_bytes(self._plane.layouts.current.cluster, sequence, record))
        signed = msgspec.structs.replace(record, signer=signer_id(keys.public_signer()), signature=signature)
        visibility = Visibility.TOMBSTONE if record.state == DELETED else Visibility.LIVE
        return rows.authenticated_change(keys, name, before, signed)._replace(visibility=visibility)


def decode_bucket(value: Value | None) -> BucketRecord | None:
    """None when there is none, or it was deleted. Not verified. Raises DataDamaged."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    return record_in(value.body)


def record_in(body: bytes) -> BucketRecord:
    """Not verified. Raises DataDamaged."""
    try:
        return decode(body, BucketRecord)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of this bucket cannot be read: {error}") from None
