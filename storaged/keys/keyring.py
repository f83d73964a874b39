"""The key service of a gateway: bucket keys on demand, authentication of records, sealing of S3 secrets.

A bucket key is committed to its register, and to this gateway's own copies, before anything is sealed under it. Every
release compares its two homes (``homes.judge``): a damaged register is written again from what opens, and reported
(BUCKET_KEY_DAMAGED).

A key is released to this process by an audited read of the register and cached for ``cache_ttl_s``. An expired key is
dropped when it is requested, when any other is released, or by ``forget_expired``.

Every release asks the policy (``cluster.policy.release_refusal``), also that of a cached key. The decision is cached
with the key, for the countries that it was made for, while policy and certificate stay the same and the certificate is
valid by the wall clock. A refused key is dropped from the cache, and the refusal is audited.

A key ends with its bucket: ``end_bucket_key`` notes in the register that the bucket was found empty on its way to
Deleted; ``destroy_bucket_key`` replaces the key by a marker and removes this gateway's copy. Other gateways drop theirs
when they reconcile their copies (``reconcile_copies``), or request the key. ``upkeep`` does that.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storaged.cluster.policy import BUCKET_COUNTRIES_RULE, KeyHolder, Policy, ReleaseRefusal, release_refusal
from storaged.errors import KeyReleaseRefused, KeyringUnavailable, StoragedError
from storaged.ids import BUCKET_ID_BYTES, Entropy, system_entropy
from storaged.keys.bucketkey import FieldBox, UnwrappedBucketKey, Vault
from storaged.keys.material import KeyMaterial
from storaged.keys.ports import KeyringPorts
from storaged.keys.signing import signing_key
from storaged.keys.upkeep import EndedKey, KeyHomes, audit_fields
from storaged.sov1 import pack_context

SECRET_LABEL = b"sov.secret.v1\0"

CACHE_TTL_S = 300.0
BUCKETS_CACHED_MAX = 4096
VALIDITY_EVERY_S = 1.0
"""How often the certificate's validity is checked against the wall clock, for cached keys."""

REFUSALS_KEPT_MAX = 1024
REFUSAL_QUIET_S = 60.0
"""The same refusal is audited once in this time: clients that retry must not fill the log."""


@dataclass(frozen=True)
class KeyringStatistics:
    """``newest_epoch`` above ``backed_up_epoch``: a backup is due (KEYS_NOT_BACKED_UP). ``backed_up_ms``: when the last
    one was made; 0: unknown.
    """

    keyring_id: str
    newest_epoch: int
    backed_up_epoch: int
    buckets_cached: int
    released: int
    closed: bool
    backed_up_ms: int = 0


@dataclass
class _Cached:
    expires: float
    newest: int
    versions: Mapping[int, UnwrappedBucketKey]
    permitted: tuple[str, ...] | None = None
    """Countries of the bucket's record when the policy last allowed this key; None: it was not asked yet."""


class _Loading:
    """A read of one bucket's keys that is under way: requests that arrive meanwhile wait for it, and share its
    failure.
    """

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.failure: StoragedError | None = None


class Keyring:
    """Implements ``objects.ports.KeyService`` over an opened keyring file and the system registers."""

    def __init__(
        self,
        material: KeyMaterial,
        ports: KeyringPorts,
        *,
        policy: Policy | None,
        holder: KeyHolder | None,
        entropy: Entropy = system_entropy,
        cache_ttl_s: float = CACHE_TTL_S,
        buckets_cached_max: int = BUCKETS_CACHED_MAX,
    ) -> None:
        """``policy``: of the layout in force, None when it can't be read. ``holder``: this gateway's certificate. See
        ``set_policy``.
        """
        self._open: KeyMaterial | None = material
        self._keyring_id = material.keyring_id
        self._vault = Vault(material, entropy)
        _, self._copies, self._audit, self._clock = ports
        self._homes = KeyHomes(self._vault, ports)
        self._entropy = entropy
        self._cache_ttl_s = cache_ttl_s
        self._buckets_cached_max = buckets_cached_max
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._loading: dict[bytes, _Loading] = {}
        self._public_signer = signing_key(material.record_key).public_key().public_bytes_raw()
        self._secrets: FieldBox | None = FieldBox(material.secret_key, SECRET_LABEL, entropy)
        self._policy = policy
        self._holder = holder
        self._valid_until_s = -math.inf
        """Monotonic: the certificate need not be checked again before this time."""
        self._refusals_audited: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._released = 0
        self._last = self._backup_state(material)

    def __repr__(self) -> str:
        return f"Keyring({self._keyring_id.hex()})"

    @property
    def material(self) -> KeyMaterial:
        """For ``keyfile.backup``. Raises KeyringUnavailable when closed."""
        if self._open is None:
            raise KeyringUnavailable("The keyring is closed.")
        return self._open

    @property
    def homes(self) -> KeyHomes:
        """The upkeep of bucket keys. Raises KeyringUnavailable when closed."""
        self.material  # noqa: B018
        return self._homes

    def keyring_id(self) -> bytes:
        return self._keyring_id

    def set_policy(self, policy: Policy | None, holder: KeyHolder | None) -> None:
        """Call it when a layout came into force or a certificate was exchanged. Cached keys that the new ones refuse
        are dropped.
        """
        self._policy, self._holder, self._valid_until_s = policy, holder, -math.inf
        for bucket_id in [
            other for other, held in self._cache.items() if held.permitted is None or self.refusal(held.permitted)
        ]:
            del self._cache[bucket_id]

    def refusal(self, countries: tuple[str, ...] = ()) -> ReleaseRefusal | None:
        """Why keys of a bucket of these countries are not released here now. No countries: of a bucket that is not
        narrower than the cluster.
        """
        return release_refusal(self._policy, self._holder, countries, self._clock.wall_ms())

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        """See KeyService. Called again after an unknown outcome, it leaves the key that is there. Raises
        KeyringUnavailable when that key is not this keyring's.
        """
        if len(bucket_id) != BUCKET_ID_BYTES:
            raise ValueError(f"a bucket id has {BUCKET_ID_BYTES} bytes, not {len(bucket_id)}")
        self.material  # noqa: B018 - a closed keyring makes none
        await self._permit(bucket_id, countries)
        if not await self.homes.create(bucket_id):  # the key of an earlier attempt
            await self.bucket_key(bucket_id, countries)

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> UnwrappedBucketKey:
        """See KeyService. Raises KeyringUnavailable when the bucket has no such key or it is not under this keyring,
        KeyReleaseRefused when the policy refuses it, ServiceUnavailable without a majority."""
        cached = self._lookup(bucket_id, countries)
        if cached is None:
            await self._permit(bucket_id, countries)
            cached = self._unexpired(bucket_id) or await self._load(bucket_id)
            self._require(countries)  # the policy may have changed while the register was read
            cached.permitted = countries
        key = cached.versions.get(version or cached.newest)
        if key is None:
            raise KeyringUnavailable(
                f"Bucket {bucket_id.hex()} has no key of version {version}; its newest is {cached.newest}."
            )
        return key

    def try_bucket_key(
        self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0
    ) -> UnwrappedBucketKey | None:
        cached = self._lookup(bucket_id, countries)
        return None if cached is None else cached.versions.get(version or cached.newest)

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        self.material  # noqa: B018 - a closed keyring authenticates nothing
        return self._vault.authenticate(context, message)

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        self.material  # noqa: B018
        return self._vault.verify(context, message, tag)

    def sign_public(self, message: bytes) -> bytes:
        return signing_key(self.material.record_key).sign(message)

    def public_signer(self) -> bytes:
        self.material  # noqa: B018 - a closed keyring signs nothing
        return self._public_signer

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return self._secret_box().seal(plaintext, pack_context(b"", context))

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        """An opened secret is given out, so this raises KeyReleaseRefused where the cluster's policy would refuse a
        key.
        """
        box = self._secret_box()
        self._require(())
        return box.open(sealed, pack_context(b"", context))

    def forget(self, bucket_id: bytes) -> None:
        """Drops the cached key: another process of this gateway has destroyed it."""
        self._cache.pop(bucket_id, None)

    def forget_expired(self) -> None:
        now = self._clock.monotonic()
        for expired in [other for other, held in self._cache.items() if now >= held.expires]:
            del self._cache[expired]

    async def end_bucket_key(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        """See KeyService."""
        await self.homes.end(bucket_id, name, nonce, shards)

    async def ended_bucket_keys(self) -> list[EndedKey]:
        """See KeyService."""
        return await self.homes.ended()

    async def destroy_bucket_key(self, bucket_id: bytes, nonce: bytes) -> bool:
        """See KeyService."""
        destroyed = await self.homes.destroy(bucket_id, nonce)
        self.forget(bucket_id)
        return destroyed

    async def reconcile_copies(self, buckets: Mapping[bytes, tuple[str, ...]]) -> None:
        """See KeyService. No-op where the policy allows this gateway no keys."""
        if self.refusal() is None:
            for bucket_id in await self.homes.reconcile_copies(
                buckets, lambda countries: self.refusal(countries) is None
            ):
                self.forget(bucket_id)

    def close(self) -> None:
        """Forgets every key. All later calls raise KeyringUnavailable."""
        if self._open is not None:
            self._last = self._backup_state(self._open)
        self._open = self._secrets = None
        self._vault.close()
        self._cache.clear()

    @staticmethod
    def _backup_state(material: KeyMaterial) -> tuple[int, int, int]:
        return material.newest.epoch, material.backed_up_epoch, material.backed_up_ms

    def statistics(self) -> KeyringStatistics:
        newest, backed_up, backed_up_ms = self._last if self._open is None else self._backup_state(self._open)
        return KeyringStatistics(
            self._keyring_id.hex(),
            newest,
            backed_up,
            len(self._cache),
            self._released,
            self._open is None,
            backed_up_ms,
        )

    def _secret_box(self) -> FieldBox:
        if self._secrets is None:
            raise KeyringUnavailable("The keyring is closed.")
        return self._secrets

    def _require(self, countries: tuple[str, ...]) -> None:
        if (refusal := self.refusal(countries)) is not None:
            raise KeyReleaseRefused(
                f"The policy does not allow this gateway to have this key. Rule {refusal}.", Rule=refusal.rule
            )

    async def _permit(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        """Raises KeyReleaseRefused. Then a cached key is dropped, and the refusal is audited, once a minute per bucket
        and rule.
        """
        refusal = self.refusal(countries)
        if refusal is None:
            return
        if refusal.rule == BUCKET_COUNTRIES_RULE:
            self._cache.pop(bucket_id, None)
        else:
            self._cache.clear()
        named, now = (bucket_id, refusal.rule), self._clock.monotonic()
        if now >= self._refusals_audited.get(named, now):
            self._refusals_audited[named] = now + REFUSAL_QUIET_S
            self._refusals_audited.move_to_end(named)
            while len(self._refusals_audited) > REFUSALS_KEPT_MAX:
                self._refusals_audited.popitem(last=False)
            await self._audit(
                "key.refused",
                audit_fields(
                    self._keyring_id,
                    bucket_id,
                    outcome=f"refused {KeyReleaseRefused.code}",
                    rule=refusal.rule,
                    reason=refusal.reason,
                ),
            )
        self._require(countries)

    def _lookup(self, bucket_id: bytes, countries: tuple[str, ...]) -> _Cached | None:
        """A cached key that the policy has allowed, while the certificate is valid. Every request passes here."""
        if self._open is None:
            raise KeyringUnavailable("The keyring is closed.")
        now = self._clock.monotonic()
        if now >= self._valid_until_s and not self._is_valid(now):
            return None
        cached = self._cache.get(bucket_id)
        if (
            cached is None
            or now >= cached.expires
            or (cached.permitted is not countries and cached.permitted != countries)
        ):
            return None
        self._cache.move_to_end(bucket_id)
        return cached

    def _is_valid(self, now: float) -> bool:
        """Whether the certificate is valid by the wall clock, which is read once a second."""
        valid = self._holder is not None and self._holder.valid_at(self._clock.wall_ms())
        self._valid_until_s = now + VALIDITY_EVERY_S if valid else -math.inf
        return valid

    def _unexpired(self, bucket_id: bytes) -> _Cached | None:
        """A cached key, whatever the policy says: the caller asks the policy."""
        cached = self._cache.get(bucket_id)
        if cached is not None and self._clock.monotonic() >= cached.expires:
            del self._cache[bucket_id]
            return None
        return cached

    async def _load(self, bucket_id: bytes) -> _Cached:
        """Reads the register once for all concurrent requests."""
        while (loading := self._loading.get(bucket_id)) is not None:
            await loading.done.wait()
            if loading.failure is not None:
                raise loading.failure
            if (cached := self._unexpired(bucket_id)) is not None:
                return cached
        loading = self._loading[bucket_id] = _Loading()
        try:
            return await self._read(bucket_id)
        except StoragedError as error:
            loading.failure = error
            raise
        finally:
            del self._loading[bucket_id]
            loading.done.set()

    async def _read(self, bucket_id: bytes) -> _Cached:
        found = await self.homes.settle(bucket_id)
        if not found.keys:
            refused = KeyringUnavailable(found.refusal)
            await self._audit(
                "key.refused",
                audit_fields(self._keyring_id, bucket_id, outcome=f"refused {refused.code}", reason=refused.message),
            )
            if found.destroyed:
                await self._copies.forget([bucket_id])
            raise refused
        versions = {version: UnwrappedBucketKey(version, key, self._entropy) for version, key in found.keys.items()}
        newest = max(versions)
        await self._audit(
            "key.release",
            audit_fields(self._keyring_id, bucket_id, outcome="done", versions=",".join(map(str, versions))),
        )
        self.material  # noqa: B018 - it may have been closed meanwhile: then nothing is cached
        self._released += 1
        self.forget_expired()
        cached = self._cache[bucket_id] = _Cached(self._clock.monotonic() + self._cache_ttl_s, newest, versions)
        while len(self._cache) > self._buckets_cached_max:
            self._cache.popitem(last=False)
        return cached
