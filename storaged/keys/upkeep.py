"""Upkeep of both homes of every bucket's key: compares the ring's registers and this gateway's copies, repairs, ends
and lists them. Releases no key.

States of a key: active; ended (its register notes that the bucket was found empty on its way to Deleted); destroyed (a
marker in the key's place). ``end`` and ``destroy`` are the steps. Both are compare-and-set on an authentic register, so
that any gateway can take them, also repeatedly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import structlog

from storaged.errors import KeyringUnavailable, ServiceUnavailable
from storaged.ids import BUCKET_ID_BYTES
from storaged.keys.bucketkey import ACTIVE, DESTROYED, BucketEnd, BucketKeyRecord, KeyCopy, Vault, Versions, register_of
from storaged.keys.homes import Judged, judge
from storaged.keys.ports import KeyChange, KeyringPorts, StoredRegister
from storaged.wire import decode, encode

REGISTERS: Final = "key/"
"""The path of the registers of all bucket keys: see ``register_of``."""

log = structlog.get_logger("keys")


class EndedKey(NamedTuple):
    """The key of a bucket that has ended, to be destroyed once nothing of the bucket is left."""

    bucket_id: bytes
    end: BucketEnd


class Inventory(NamedTuple):
    """All bucket keys of the cluster, for a backup. ``lost``: ids of buckets whose key opens in neither home."""

    copies: list[KeyCopy]
    lost: list[bytes]


def audit_fields(keyring_id: bytes, bucket_id: bytes, **more: str) -> dict[str, str]:
    """Fields of an audit entry: ``outcome`` and ``target`` are the entry's own (``cluster.audit.format.Event``)."""
    return {"target": f"bucket-id:{bucket_id.hex()}", "keyring": keyring_id.hex(), "bucket": bucket_id.hex(), **more}


class KeyHomes:
    """See the module. All methods may raise KeyringUnavailable and ServiceUnavailable; those that write registers
    OutcomeUnknown too.
    """

    def __init__(
        self,
        vault: Vault,
        ports: KeyringPorts,
    ) -> None:
        self._vault = vault
        self._registers, self._copies, self._audit, self._clock = ports

    async def create(self, bucket_id: bytes) -> bool:
        """Makes version 1, in both homes when this returns. False: the register has a value already, and is left
        unchanged. The audit entry is written before the key.
        """
        made = BucketKeyRecord(bucket_id, (self._vault.wrap_new(bucket_id, 1, self._clock.wall_ms()),))
        epoch = str(self._vault.newest_epoch)
        await self._audit("key.create", self._fields(bucket_id, outcome="intent", version="1", epoch=epoch))
        mine = False

        def update(before: StoredRegister | None) -> KeyChange | None:
            nonlocal mine
            mine = before is None or not before.body
            return self._signed(made, before) if mine else None

        await self._registers.change(register_of(bucket_id), update)
        if mine:
            await self._copies.keep(bucket_id, encode(KeyCopy(bucket_id, made.versions)))
        return mine

    async def end(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        """Notes in the register that the bucket of this name was found empty after the final fence ``nonce`` of its
        ``shards``. Idempotent. A request that slept takes no note of a later attempt away: the fence of an earlier one
        can't be made final any more. Repairs a damaged register first; when no key opens it notes nothing.
        """
        found = await self.settle(bucket_id, keep=False)
        if not found.keys:
            return
        end = BucketEnd(name, self._clock.wall_ms(), nonce, tuple(shards))
        ended, done = BucketKeyRecord(bucket_id, found.versions, ended=end), False

        def update(before: StoredRegister | None) -> KeyChange | None:
            nonlocal done
            now = judge(self._vault, bucket_id, before, ())
            noted = now.ended is not None and now.ended.nonce >= nonce
            done = noted or (not now.damage and now.versions == found.versions)
            return None if noted or not done else self._signed(ended, before)

        await self._registers.change(register_of(bucket_id), update)
        if not done:
            raise ServiceUnavailable(f"The key record of bucket {bucket_id.hex()} is changed by another gateway.")

    async def ended(self) -> list[EndedKey]:
        """All keys of buckets that have ended and are not destroyed yet, according to authentic registers."""
        found = []
        async for path, kept in self._registers.scan(REGISTERS):
            record = self._authentic(path, kept)
            if record is not None and record.state == ACTIVE and record.ended is not None:
                found.append(EndedKey(record.bucket_id, record.ended))
        return found

    async def destroy(self, bucket_id: bytes, nonce: bytes) -> bool:
        """Replaces the key by a marker, and removes this gateway's copy. True when this call did. ``nonce``: of the end
        that the caller verified; a register with another one stays unchanged. The audit entry is written before the
        marker.
        """
        done = False

        def update(before: StoredRegister | None) -> KeyChange | None:
            nonlocal done
            record = None if before is None else self._authentic(register_of(bucket_id), before)
            end = record.ended if record is not None and record.state == ACTIVE else None
            done = end is not None and end.nonce == nonce
            return self._signed(BucketKeyRecord(bucket_id, (), DESTROYED, end), before, gone=True) if done else None

        await self._audit("key.destroy", self._fields(bucket_id, outcome="intent"))
        await self._registers.change(register_of(bucket_id), update)
        if done:
            await self._copies.forget([bucket_id])
            await self._audit("key.destroy", self._fields(bucket_id, outcome="done"))
        return done

    async def reconcile_copies(
        self,
        buckets: Mapping[bytes, tuple[str, ...]],
        allowed: Callable[[tuple[str, ...]], bool],
    ) -> list[bytes]:
        """Compares the homes of all keys of which this gateway has copies, and makes copies of those of ``buckets`` (id
        -> countries) that the policy allows here (``allowed``). Removes copies of destroyed keys and returns the ids of
        their buckets.
        """
        copies = await self._copies.every()
        left = set(copies)
        async for path, kept in self._registers.scan(REGISTERS):
            bucket_id, record = _bucket_of(path), self._authentic(path, kept)
            copy = copies.get(bucket_id)
            if record is not None and copy is not None and _versions_of(copy) == record.versions:
                left.discard(bucket_id)
                self._copies.report(bucket_id, "", True)
            elif bucket_id in buckets and allowed(buckets[bucket_id]):
                left.add(bucket_id)
        gone = []
        for bucket_id in sorted(left):
            found = await self.settle(bucket_id)
            if found.destroyed:
                gone.append(bucket_id)
        await self._copies.forget(gone)
        return gone

    async def import_copies(self, copies: Mapping[bytes, bytes]) -> int:
        """Imports copies from a backup: keeps what opens and is missing here, and repairs the ring with it. Returns how
        many buckets gained something.
        """
        taken = 0
        for bucket_id, copy in copies.items():
            mine = await self._copies.get(bucket_id)
            found = await self.settle(bucket_id, _versions_of(copy))
            taken += (bool(found.damage) and found.repair_ring) or mine is None
        return taken

    async def inventory(self) -> Inventory:
        """Every bucket key made so far, from both homes."""
        copies = await self._copies.every()
        found: list[KeyCopy] = []
        lost: list[bytes] = []
        seen: set[bytes] = set()
        async for path, kept in self._registers.scan(REGISTERS):
            bucket_id = _bucket_of(path)
            if not bucket_id:
                continue
            seen.add(bucket_id)
            judged = judge(self._vault, bucket_id, kept, _versions_of(copies.get(bucket_id)))
            if judged.versions:
                found.append(KeyCopy(bucket_id, judged.versions))
            elif not judged.destroyed:
                lost.append(bucket_id)
                self._copies.report(bucket_id, judged.damage or judged.refusal, False)
        for bucket_id in sorted(copies.keys() - seen):
            kept_now = await self._registers.read(register_of(bucket_id))
            judged = judge(self._vault, bucket_id, kept_now, _versions_of(copies[bucket_id]))
            if judged.versions:
                found.append(KeyCopy(bucket_id, judged.versions))
        return Inventory(found, lost)

    async def settle(self, bucket_id: bytes, more: Versions = (), *, keep: bool = True) -> Judged:
        """Compares both homes of a key and repairs each from the other where possible. ``more``: versions from a
        backup, which count as a copy where this gateway has none. ``keep``: make a copy when there is none. Damage is
        reported and audited.
        """
        path = register_of(bucket_id)
        copy = _versions_of(await self._copies.get(bucket_id))
        known = {entry.version for entry in copy}
        merged = (*copy, *(entry for entry in more if entry.version not in known))
        merged = tuple(sorted(merged, key=lambda entry: entry.version))
        kept = await self._registers.read(path)
        found = judge(self._vault, bucket_id, kept, merged)
        if found.damage:
            log.error(
                "the register of a bucket's key is damaged",
                bucket=bucket_id.hex(),
                reason=found.damage,
                copy=bool(found.keys),
            )
        repaired = not found.damage
        if found.repair_ring:
            repaired = await self._repair(bucket_id, kept, found)
        self._copies.report(bucket_id, found.damage, repaired)
        if keep and found.versions and found.versions != copy and (found.repair_copy or more):
            try:
                await self._copies.keep(bucket_id, encode(KeyCopy(bucket_id, found.versions)))
            except KeyringUnavailable as error:  # the ring has the key: what is stored can be read
                log.warning("a bucket's key has no copy here", bucket=bucket_id.hex(), reason=error.message)
        return found

    async def _repair(self, bucket_id: bytes, kept: StoredRegister | None, found: Judged) -> bool:
        """Writes the register from what opens; False when that was not possible now. This also gives an old record its
        authenticator.
        """
        record, done = BucketKeyRecord(bucket_id, found.versions, ended=found.ended), False

        def update(before: StoredRegister | None) -> KeyChange | None:
            nonlocal done
            done = before == kept
            return self._signed(record, before) if done else None

        try:
            if found.damage:
                await self._audit("key.restore", self._fields(bucket_id, outcome="intent", reason=found.damage))
            await self._registers.change(register_of(bucket_id), update)
        except ServiceUnavailable as error:
            log.warning("a bucket's key could not be mended now", bucket=bucket_id.hex(), reason=error.message)
            return False
        if not done:  # another gateway has written it
            now = await self._registers.read(register_of(bucket_id))
            return not judge(self._vault, bucket_id, now, found.versions).damage
        if found.damage:
            await self._audit("key.restore", self._fields(bucket_id, outcome="done", reason=found.damage))
        return True

    def _signed(self, record: BucketKeyRecord, before: StoredRegister | None, *, gone: bool = False) -> KeyChange:
        """The change that follows ``before`` in the register."""
        return KeyChange(encode(self._vault.sign(record, (before.sequence if before is not None else 0) + 1)), gone)

    def _authentic(self, path: str, kept: StoredRegister) -> BucketKeyRecord | None:
        """The record, when it proves that a gateway of this keyring wrote it there; otherwise None, also for old
        records.
        """
        try:
            record = decode(kept.body, BucketKeyRecord)
        except msgspec.MsgspecError:
            return None
        here = register_of(record.bucket_id) == path
        return record if here and self._vault.authentic(record, kept.sequence) else None

    def _fields(self, bucket_id: bytes, **more: str) -> dict[str, str]:
        return audit_fields(self._vault.keyring_id, bucket_id, **more)


def _bucket_of(path: str) -> bytes:
    """The bucket's id in a register's path; empty for a path that no gateway made."""
    try:
        bucket_id = bytes.fromhex(path.removeprefix(REGISTERS))
    except ValueError:
        return b""
    return bucket_id if len(bucket_id) == BUCKET_ID_BYTES else b""


def _versions_of(copy: bytes | None) -> Versions:
    """The versions of an encoded KeyCopy; empty for None."""
    return () if copy is None else decode(copy, KeyCopy).versions
