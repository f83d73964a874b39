"""The key service of a gateway: bucket keys on demand, authentication of records, sealing of S3 secrets.

    keyring file (keyfile)  epoch keys, record key, secret key
    register key/BUCKET_ID  versions of the bucket's key, each wrapped under an epoch key          BucketKeys

A bucket key is committed to its register before anything is sealed under it, and so a backup of the keyring file covers buckets that were created after it.
Keys are released to this process by an audited read of the register and kept for ``cache_ttl_s``. One that expired is forgotten when it is asked for, or when any
other is released.

Every release asks the policy (``cluster.policy.release_refusal``), that of a kept key too: its decision is kept with the key, for the countries that it was made for,
as long as neither policy nor certificate changes and the certificate is valid by the wall clock. What is refused is forgotten, and audited.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.clock import Clock
from storaged.cluster.policy import BUCKET_COUNTRIES_RULE, KeyHolder, Policy, ReleaseRefusal, release_refusal
from storaged.errors import KeyReleaseRefused, KeyringUnavailable, StoragedError
from storaged.ids import BUCKET_ID_BYTES, Entropy, system_entropy
from storaged.keys.bucketkey import BUCKET_KEY_LABEL, BucketKeys, FieldBox, UnwrappedBucketKey, WrappedBucketKey
from storaged.keys.keyfile import KeyMaterial
from storaged.keys.ports import AlreadyThere, Audit, SystemRegisters
from storaged.sov1 import KEY_BYTES, SALT_BYTES, SealBroken, open_message, pack_context, seal_message
from storaged.wire import decode, encode

RECORD_LABEL = b"sov.record.v1\0"
SIGN_LABEL = b"sov.sign.v1\0"
SECRET_LABEL = b"sov.secret.v1\0"

CACHE_TTL_S = 300.0
BUCKETS_CACHED_MAX = 4096
REFUSALS_TOLD_MAX = 1024
REFUSAL_QUIET_S = 60.0
"""The same refusal is not audited again for so long: clients that try again must not fill the log."""


@dataclass(frozen=True)
class KeyringStatistics:
    """``newest_epoch`` above ``backed_up_epoch``: a backup is due (KEYS_NOT_BACKED_UP)."""

    keyring_id: str
    newest_epoch: int
    backed_up_epoch: int
    buckets_cached: int
    released: int
    closed: bool


@dataclass
class _Cached:
    expires: float
    newest: int
    versions: Mapping[int, UnwrappedBucketKey]
    permitted: tuple[str, ...] | None = None
    """Countries of the bucket's record when the policy last allowed this key; None: it has not been asked."""


class _Loading:
    """A read of one bucket's keys under way: those who come meanwhile wait for it, and share its failure."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.failure: StoragedError | None = None


class Keyring:
    """Implements ``objects.ports.KeyService`` over an opened keyring file and the system registers."""

    def __init__(
        self,
        material: KeyMaterial,
        registers: SystemRegisters,
        *,
        audit: Audit,
        clock: Clock,
        policy: Policy | None,
        holder: KeyHolder | None,
        entropy: Entropy = system_entropy,
        cache_ttl_s: float = CACHE_TTL_S,
        buckets_cached_max: int = BUCKETS_CACHED_MAX,
    ) -> None:
        """``policy``: of the layout in force, None when it can't be read. ``holder``: this gateway's certificate. See ``judge_by``."""
        self._open: KeyMaterial | None = material
        self._keyring_id = material.keyring_id
        self._registers = registers
        self._audit = audit
        self._clock = clock
        self._entropy = entropy
        self._cache_ttl_s = cache_ttl_s
        self._buckets_cached_max = buckets_cached_max
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._loading: dict[bytes, _Loading] = {}
        self._secrets: FieldBox | None = FieldBox(material.secret_key, SECRET_LABEL, entropy)
        self._policy = policy
        self._holder = holder
        self._refusals_told: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._released = 0
        self._last = (material.newest.epoch, material.backed_up_epoch)

    def __repr__(self) -> str:
        return f"Keyring({self._keyring_id.hex()})"

    @property
    def material(self) -> KeyMaterial:
        """For ``keyfile.backup``. Raises KeyringUnavailable when closed."""
        if self._open is None:
            raise KeyringUnavailable("The keyring is closed.")
        return self._open

    def judge_by(self, policy: Policy | None, holder: KeyHolder | None) -> None:
        """A layout came into force, or a certificate was exchanged. Kept keys that the new ones refuse are forgotten."""
        self._policy, self._holder = policy, holder
        for bucket_id in [other for other, held in self._cache.items() if held.permitted is None or self.refusal(held.permitted)]:
            del self._cache[bucket_id]

    def refusal(self, countries: tuple[str, ...] = ()) -> ReleaseRefusal | None:
        """Why keys of a bucket of these countries are not released here now; none named: of a bucket that is no narrower than the cluster."""
        return release_refusal(self._policy, self._holder, countries, self._clock.wall_ms())

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        """See KeyService. Asked again after an unknown outcome, it keeps the key that is there. Raises KeyringUnavailable when that is not this keyring's."""
        if len(bucket_id) != BUCKET_ID_BYTES:
            raise ValueError(f"a bucket id has {BUCKET_ID_BYTES} bytes, not {len(bucket_id)}")
        epoch = self.material.newest
        await self._permit(bucket_id, countries)
        context = self._wrap_context(bucket_id, 1, epoch.epoch)
        wrapped = seal_message(epoch.key, BUCKET_KEY_LABEL, context, self._entropy(KEY_BYTES), self._entropy(SALT_BYTES))
        record = BucketKeys(bucket_id, (WrappedBucketKey(1, epoch.epoch, self._clock.wall_ms(), wrapped),))
        await self._audit("key.create", self._facts(bucket_id, outcome="intent", version="1", epoch=str(epoch.epoch)))
        try:
            await self._registers.create(self._path(bucket_id), encode(record))
        except AlreadyThere:
            await self.bucket_key(bucket_id, countries)

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> UnwrappedBucketKey:
        """See KeyService. Raises KeyringUnavailable when the bucket has no such key or it is not under this keyring, KeyReleaseRefused when the policy refuses it,
        ServiceUnavailable without a majority."""
        cached = self._lookup(bucket_id, countries)
        if cached is None:
            await self._permit(bucket_id, countries)
            cached = self._kept(bucket_id) or await self._load(bucket_id)
            self._require(countries)  # the policy may have changed while the register was read
            cached.permitted = countries
        key = cached.versions.get(version or cached.newest)
        if key is None:
            raise KeyringUnavailable(f"Bucket {bucket_id.hex()} has no key of version {version}; its newest is {cached.newest}.")
        return key

    def bucket_key_at_hand(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> UnwrappedBucketKey | None:
        cached = self._lookup(bucket_id, countries)
        return None if cached is None else cached.versions.get(version or cached.newest)

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        return hmac.digest(self.material.record_key, pack_context(RECORD_LABEL, [*context, message]), "sha256")

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return hmac.compare_digest(self.authenticate(context, message), tag)

    def sign_public(self, message: bytes) -> bytes:
        return self._signing_key().sign(message)

    def public_signer(self) -> bytes:
        return self._signing_key().public_key().public_bytes_raw()

    def _signing_key(self) -> Ed25519PrivateKey:
        seed = HKDFExpand(SHA512(), KEY_BYTES, SIGN_LABEL).derive(self.material.record_key)
        return Ed25519PrivateKey.from_private_bytes(seed)

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return self._secret_box().seal(plaintext, pack_context(b"", context))

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        """What it opens is a secret that it gives out: raises KeyReleaseRefused where the cluster's policy would refuse a key."""
        box = self._secret_box()
        self._require(())
        return box.open(sealed, pack_context(b"", context))

    def close(self) -> None:
        """Forgets every key. Everything that is asked afterwards raises KeyringUnavailable."""
        if self._open is not None:
            self._last = (self._open.newest.epoch, self._open.backed_up_epoch)
        self._open = self._secrets = None
        self._cache.clear()

    def statistics(self) -> KeyringStatistics:
        newest, backed_up = self._last if self._open is None else (self._open.newest.epoch, self._open.backed_up_epoch)
        return KeyringStatistics(self._keyring_id.hex(), newest, backed_up, len(self._cache), self._released, self._open is None)

    def _secret_box(self) -> FieldBox:
        if self._secrets is None:
            raise KeyringUnavailable("The keyring is closed.")
        return self._secrets

    def _require(self, countries: tuple[str, ...]) -> None:
        if (refusal := self.refusal(countries)) is not None:
            raise KeyReleaseRefused(f"The policy does not allow this gateway to have this key. Rule {refusal}.", Rule=refusal.rule)

    async def _permit(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        """Raises KeyReleaseRefused; a key that was kept is forgotten then, and the refusal is audited, once a minute for a bucket and rule."""
        refusal = self.refusal(countries)
        if refusal is None:
            return
        if refusal.rule == BUCKET_COUNTRIES_RULE:
            self._cache.pop(bucket_id, None)
        else:
            self._cache.clear()
        told, now = (bucket_id, refusal.rule), self._clock.monotonic()
        if now >= self._refusals_told.get(told, now):
            self._refusals_told[told] = now + REFUSAL_QUIET_S
            self._refusals_told.move_to_end(told)
            while len(self._refusals_told) > REFUSALS_TOLD_MAX:
                self._refusals_told.popitem(last=False)
            await self._audit(
                "key.refused", self._facts(bucket_id, outcome=f"refused {KeyReleaseRefused.code}", rule=refusal.rule, reason=refusal.reason)
            )
        self._require(countries)

    def _lookup(self, bucket_id: bytes, countries: tuple[str, ...]) -> _Cached | None:
        """A kept key that the policy has allowed, while the certificate is valid. No allocation: every request comes through here."""
        if self._open is None:
            raise KeyringUnavailable("The keyring is closed.")
        cached = self._cache.get(bucket_id)
        if cached is None or (cached.permitted is not countries and cached.permitted != countries):
            return None
        holder = self._holder
        if holder is None or not holder.valid_from_ms <= self._clock.wall_ms() < holder.valid_until_ms:
            return None
        return self._kept(bucket_id)

    def _kept(self, bucket_id: bytes) -> _Cached | None:
        """Whatever the policy says: the caller asks it."""
        cached = self._cache.get(bucket_id)
        if cached is None:
            return None
        if self._clock.monotonic() >= cached.expires:
            del self._cache[bucket_id]
            return None
        self._cache.move_to_end(bucket_id)
        return cached

    async def _load(self, bucket_id: bytes) -> _Cached:
        """Reads the register once, however many ask at the same time."""
        while (loading := self._loading.get(bucket_id)) is not None:
            await loading.done.wait()
            if loading.failure is not None:
                raise loading.failure
            if (cached := self._kept(bucket_id)) is not None:
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
        body = await self._registers.read(self._path(bucket_id))
        try:
            versions = self._unwrap(bucket_id, body)
        except KeyringUnavailable as refused:
            await self._audit("key.refused", self._facts(bucket_id, outcome=f"refused {refused.code}", reason=refused.message))
            raise
        newest = max(versions)
        await self._audit("key.release", self._facts(bucket_id, outcome="done", versions=",".join(map(str, versions))))
        self.material  # noqa: B018 - it may have been closed meanwhile: then nothing is kept
        self._released += 1
        now = self._clock.monotonic()
        for expired in [other for other, held in self._cache.items() if now >= held.expires]:
            del self._cache[expired]
        cached = self._cache[bucket_id] = _Cached(now + self._cache_ttl_s, newest, versions)
        while len(self._cache) > self._buckets_cached_max:
            self._cache.popitem(last=False)
        return cached

    def _unwrap(self, bucket_id: bytes, body: bytes | None) -> dict[int, UnwrappedBucketKey]:
        name = bucket_id.hex()
        if not body:
            raise KeyringUnavailable(f"No key is kept for bucket {name}.")
        try:
            record = decode(body, BucketKeys)
        except msgspec.MsgspecError:
            raise KeyringUnavailable(f"The key record of bucket {name} cannot be read.") from None
        material = self.material
        found: dict[int, UnwrappedBucketKey] = {}
        for entry in record.versions:
            epoch = material.epochs.get(entry.epoch)
            if epoch is None:
                raise KeyringUnavailable(
                    f"The key of bucket {name} is wrapped under epoch {entry.epoch}; keyring {self._keyring_id.hex()} has epochs up to {material.newest.epoch}."
                )
            context = self._wrap_context(bucket_id, entry.version, entry.epoch)
            try:
                key = open_message(epoch.key, BUCKET_KEY_LABEL, context, entry.wrapped)
            except SealBroken:
                raise KeyringUnavailable(f"The key of bucket {name} does not open under keyring {self._keyring_id.hex()}.") from None
            found[entry.version] = UnwrappedBucketKey(entry.version, key, self._entropy)
        if not found:
            raise KeyringUnavailable(f"No key is kept for bucket {name}.")
        return found

    def _wrap_context(self, bucket_id: bytes, version: int, epoch: int) -> bytes:
        return pack_context(b"", [self._keyring_id, bucket_id, version.to_bytes(4, "big"), epoch.to_bytes(4, "big")])

    def _facts(self, bucket_id: bytes, **more: str) -> dict[str, str]:
        """``outcome`` and ``target`` are the entry's own (``cluster.audit_format.Event``); the rest are its fields."""
        return {"target": f"bucket-id:{bucket_id.hex()}", "keyring": self._keyring_id.hex(), "bucket": bucket_id.hex(), **more}

    @staticmethod
    def _path(bucket_id: bytes) -> str:
        return "key/" + bucket_id.hex()
