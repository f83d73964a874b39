"""Both homes of every bucket's key, looked after: the ring's registers and this gateway's copies are compared,
mended, ended and listed. Releases no key.

States of a key: active; ended (its register notes that the bucket was found empty on its way to Deleted); destroyed
(a marker in the key's place). ``end`` and ``destroy`` are the steps; both are compare-and-set on an authentic
register, so that any gateway can take them, again too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import structlog

from storaged.clock import Clock
from storaged.errors import KeyringUnavailable, ServiceUnavailable
from storaged.ids import BUCKET_ID_BYTES
from storaged.keys.bucketkey import ACTIVE, DESTROYED, BucketEnd, BucketKeys, KeyCopy, Vault, Versions, register_of
from storaged.keys.homes import Judged, judge
from storaged.keys.ports import Audit, Kept, KeyChange, KeyCopies, SystemRegisters
from storaged.wire import decode, encode

REGISTERS: Final = "key/"
"""Where the registers of all bucket keys are: see ``register_of``."""

log = structlog.get_logger("keys")


class EndedKey(NamedTuple):
    """The key of a bucket that has ended, to be destroyed once nothing of the bucket is left."""

    bucket_id: bytes
    end: BucketEnd


class Inventory(NamedTuple):
    """All bucket keys of the cluster, as a backup has them. ``lost``: ids of buckets whose key opens in neither
    home."""

    copies: list[KeyCopy]
    lost: list[bytes]


def facts_of(keyring_id: bytes, bucket_id: bytes, **more: str) -> dict[str, str]:
    """Of an audit entry: ``outcome`` and ``target`` are the entry's own (``cluster.audit.format.Event``); the rest
    are its fields."""
    return {"target": f"bucket-id:{bucket_id.hex()}", "keyring": keyring_id.hex(), "bucket": bucket_id.hex(), **more}


class KeyHomes:
    """See the module. Everything here may raise KeyringUnavailable and ServiceUnavailable, what writes registers
    OutcomeUnknown too."""

    def __init__(
        self,
        vault: Vault,
        registers: SystemRegisters,
        copies: KeyCopies,
        *,
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._vault = vault
        self._registers = registers
        self._copies = copies
        self._audit = audit
        self._clock = clock

    async def create(self, bucket_id: bytes) -> bool:
        """Makes version 1, in both homes when this returns. False: the register has something already, which is left
        as it is. Audited before it is done."""
        made = BucketKeys(bucket_id, (self._vault.wrap_new(bucket_id, 1, self._clock.wall_ms()),))
        epoch = str(self._vault.newest_epoch)
        await self._audit("key.create", self._facts(bucket_id, outcome="intent", version="1", epoch=epoch))
        mine = False

        def update(before: Kept | None) -> KeyChange | None:
            nonlocal mine
            mine = before is None or not before.body
            return self._signed(made, before) if mine else None

        await self._registers.change(register_of(bucket_id), update)
        if mine:
            await self._copies.keep(bucket_id, encode(KeyCopy(bucket_id, made.versions)))
        return mine

    async def end(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        """Notes in the register that the bucket of this name was found empty behind the final fence ``nonce`` of its
        ``shards``. Idempotent. A register that is damaged is mended first; where no key opens nothing is noted."""
        found = await self.settle(bucket_id, keep=False)
        if not found.keys or (found.ended is not None and found.ended.nonce == nonce):
            return
        end = BucketEnd(name, self._clock.wall_ms(), nonce, tuple(shards))
        ended, done = BucketKeys(bucket_id, found.versions, ended=end), False

        def update(before: Kept | None) -> KeyChange | None:
            nonlocal done
            now = judge(self._vault, bucket_id, before, ())
            done = not now.damage and now.versions == found.versions
            return self._signed(ended, before) if done else None

        await self._registers.change(register_of(bucket_id), update)
        if not done:
            raise ServiceUnavailable(f"The key record of bucket {bucket_id.hex()} is changed by another gateway.")

    async def ended(self) -> list[EndedKey]:
        """All keys of buckets that have ended and are not destroyed yet, as authentic registers say."""
        found = []
        async for path, kept in self._registers.scan(REGISTERS):
            record = self._authentic(path, kept)
            if record is not None and record.state == ACTIVE and record.ended is not None:
                found.append(EndedKey(record.bucket_id, record.ended))
        return found

    async def destroy(self, bucket_id: bytes, nonce: bytes) -> bool:
        """Replaces the key by a marker, and removes this gateway's copy; True when this call did. ``nonce``: of the
        end that the caller verified; a register that says another changes nothing. Audited before it is done."""
        done = False

        def update(before: Kept | None) -> KeyChange | None:
            nonlocal done
            record = None if before is None else self._authentic(register_of(bucket_id), before)
            end = record.ended if record is not None and record.state == ACTIVE else None
            done = end is not None and end.nonce == nonce
            return self._signed(BucketKeys(bucket_id, (), DESTROYED, end), before, gone=True) if done else None

        await self._audit("key.destroy", self._facts(bucket_id, outcome="intent"))
        await self._registers.change(register_of(bucket_id), update)
        if done:
            await self._copies.forget([bucket_id])
            await self._audit("key.destroy", self._facts(bucket_id, outcome="done"))
        return done

    async def look_after(
        self,
        buckets: Mapping[bytes, tuple[str, ...]],
        allowed: Callable[[tuple[str, ...]], bool],
    ) -> list[bytes]:
        """Compares the homes of all keys that this gateway has copies of, and makes copies of those of ``buckets``
        (id -> countries) that the policy allows here (``allowed``). Copies of keys that were destroyed are removed:
        returns the ids of their buckets."""
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

    async def take_copies(self, copies: Mapping[bytes, bytes]) -> int:
        """Takes copies from a backup: what opens and lacks here is kept, and mends the ring where that is damaged.
        Returns how many buckets gained something."""
        taken = 0
        for bucket_id, copy in copies.items():
            mine = await self._copies.get(bucket_id)
            found = await self.settle(bucket_id, _versions_of(copy))
            taken += (bool(found.damage) and found.mend_ring) or mine is None
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
        """Both homes of a key as they are, each mended from the other where that is possible. ``more``: versions from
        a backup, which count as a copy where this gateway has none. ``keep``: make a copy where there is none. Damage
        is reported and audited."""
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
        mended = not found.damage
        if found.mend_ring:
            mended = await self._mend(bucket_id, kept, found)
        self._copies.report(bucket_id, found.damage, mended)
        if keep and found.versions and found.versions != copy and (found.mend_copy or more):
            try:
                await self._copies.keep(bucket_id, encode(KeyCopy(bucket_id, found.versions)))
            except KeyringUnavailable as error:  # the ring has the key: what is stored can be read
                log.warning("a bucket's key has no copy here", bucket=bucket_id.hex(), reason=error.message)
        return found

    async def _mend(self, bucket_id: bytes, kept: Kept | None, found: Judged) -> bool:
        """Writes the register from what opens; False when that could not be done now. A record of old gets its
        authenticator so."""
        record, done = BucketKeys(bucket_id, found.versions, ended=found.ended), False

        def update(before: Kept | None) -> KeyChange | None:
            nonlocal done
            done = before == kept
            return self._signed(record, before) if done else None

        try:
            if found.damage:
                await self._audit("key.restore", self._facts(bucket_id, outcome="intent", reason=found.damage))
            await self._registers.change(register_of(bucket_id), update)
        except ServiceUnavailable as error:
            log.warning("a bucket's key could not be mended now", bucket=bucket_id.hex(), reason=error.message)
            return False
        if not done:  # another gateway has written it
            now = await self._registers.read(register_of(bucket_id))
            return not judge(self._vault, bucket_id, now, found.versions).damage
        if found.damage:
            await self._audit("key.restore", self._facts(bucket_id, outcome="done", reason=found.damage))
        return True

    def _signed(self, record: BucketKeys, before: Kept | None, *, gone: bool = False) -> KeyChange:
        """What follows ``before`` in the register."""
        return KeyChange(encode(self._vault.sign(record, (before.sequence if before is not None else 0) + 1)), gone)

    def _authentic(self, path: str, kept: Kept) -> BucketKeys | None:
        """The record, when it proves that this keyring's gateways wrote it there; None for every other, records of
        old among them."""
        try:
            record = decode(kept.body, BucketKeys)
        except msgspec.MsgspecError:
            return None
        here = register_of(record.bucket_id) == path
        return record if here and self._vault.authentic(record, kept.sequence) else None

    def _facts(self, bucket_id: bytes, **more: str) -> dict[str, str]:
        return facts_of(self._vault.keyring_id, bucket_id, **more)


def _bucket_of(path: str) -> bytes:
    """The bucket's id that a register's path names; empty for a path that no gateway made."""
    try:
        bucket_id = bytes.fromhex(path.removeprefix(REGISTERS))
    except ValueError:
        return b""
    return bucket_id if len(bucket_id) == BUCKET_ID_BYTES else b""


def _versions_of(copy: bytes | None) -> Versions:
    """Of an encoded KeyCopy; none for none."""
    return () if copy is None else decode(copy, KeyCopy).versions
