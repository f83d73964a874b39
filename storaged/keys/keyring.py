"""The key service of a gateway: bucket keys on demand, authentication of records, sealing of S3 secrets.

    keyring file (keyfile)  epoch keys, record key, secret key
    register key/BUCKET_ID  versions of the bucket's key, each wrapped under an epoch key          BucketKeys
    record of an object     its data key, wrapped under a bucket key version                       BucketKey.wrap
    HKDF of a bucket key    the list key, for what a listing prints                                BucketKey.seal_list

A bucket key is committed to its register before anything is sealed under it, and so a backup of the keyring file covers buckets that were created after it.
Keys are released to this process by an audited read of the register and kept for ``cache_ttl_s``; cached use asks nobody. One that expired is forgotten when it is
asked for, or when any other is released.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.clock import Clock
from storaged.errors import KeyringUnavailable, StoragedError
from storaged.ids import BUCKET_ID_BYTES, Entropy, system_entropy
from storaged.keys.keyfile import KeyMaterial
from storaged.keys.ports import AlreadyThere, Audit, SystemRegisters
from storaged.sov1 import (
    CHUNK_BYTES_MIN,
    HEADER_BYTES,
    KEY_BYTES,
    SALT_BYTES,
    SealBroken,
    open_message,
    open_one,
    pack_context,
    seal_message,
    seal_one,
    sealed_size,
)
from storaged.wire import Message, decode, encode

WRAP_LABEL = "sov.key.v1"
BUCKET_KEY_LABEL = "sov.bucketkey.v1"
LIST_LABEL = b"sov.list.v1\0"
RECORD_LABEL = b"sov.record.v1\0"
SECRET_LABEL = b"sov.secret.v1\0"

WRAPPED_KEY_BYTES = sealed_size(KEY_BYTES, CHUNK_BYTES_MIN)
assert WRAPPED_KEY_BYTES == 112

NONCE_BYTES = 12
CACHE_TTL_S = 300.0
BUCKETS_CACHED_MAX = 4096


class WrappedBucketKey(Message, frozen=True):
    """One version: 112 bytes under the key of ``epoch``, bound to (keyring id, bucket id, version, epoch)."""

    version: int
    epoch: int
    created_ms: int
    wrapped: bytes


class BucketKeys(Message, frozen=True):
    """The register ``key/BUCKET_ID`` (hex): versions in ascending order."""

    bucket_id: bytes
    versions: tuple[WrappedBucketKey, ...]


class _Box:
    """AES-256-GCM under one key with random 96-bit nonces: nonce || ciphertext || tag; the label and the packed context are the associated data."""

    def __init__(self, key: bytes, label: bytes, entropy: Entropy) -> None:
        self._cipher = AESGCM(key)
        self._label = label
        self._entropy = entropy

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        nonce = self._entropy(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, self._label + context)

    def open_all(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        """Each with its context. Raises SealBroken when one does not open, or is too short to hold anything."""
        decrypt, label = self._cipher.decrypt, self._label
        try:
            return [
                decrypt(field[:NONCE_BYTES], field[NONCE_BYTES:], label + context) for field, context in zip(sealed, contexts, strict=True)
            ]
        except (InvalidTag, ValueError):
            raise SealBroken("does not open under this key and its context") from None

    def open(self, sealed: bytes, context: bytes) -> bytes:
        return self.open_all((sealed,), (context,))[0]


class UnwrappedBucketKey:
    """``objects.ports.BucketKey``: one version of a bucket's key in the clear, in memory only."""

    def __init__(self, version: int, key: bytes, entropy: Entropy) -> None:
        self._version = version
        self._key = key
        self._entropy = entropy
        self._list = _Box(HKDFExpand(SHA512(), KEY_BYTES, LIST_LABEL).derive(key), LIST_LABEL, entropy)

    def __repr__(self) -> str:
        return f"UnwrappedBucketKey(version={self._version})"

    @property
    def version(self) -> int:
        return self._version

    def wrap(self, dek: bytes, context: bytes) -> bytes:
        if len(dek) != KEY_BYTES:
            raise ValueError(f"a data key has {KEY_BYTES} bytes, not {len(dek)}")
        header, chunk = seal_one(self._key, WRAP_LABEL, context, CHUNK_BYTES_MIN, dek, self._entropy(SALT_BYTES))
        return header + chunk

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        if len(wrapped) != WRAPPED_KEY_BYTES:
            raise SealBroken(f"a wrapped key has {WRAPPED_KEY_BYTES} bytes, not {len(wrapped)}")
        return open_one(self._key, WRAP_LABEL, context, wrapped[:HEADER_BYTES], wrapped[HEADER_BYTES:])

    def seal_list(self, plaintext: bytes, context: bytes) -> bytes:
        return self._list.seal(plaintext, context)

    def open_list(self, sealed: bytes, context: bytes) -> bytes:
        return self._list.open(sealed, context)

    def open_lists(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        return self._list.open_all(sealed, contexts)


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
        entropy: Entropy = system_entropy,
        cache_ttl_s: float = CACHE_TTL_S,
        buckets_cached_max: int = BUCKETS_CACHED_MAX,
    ) -> None:
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
        self._secrets: _Box | None = _Box(material.secret_key, SECRET_LABEL, entropy)
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

    async def create_bucket_key(self, bucket_id: bytes) -> None:
        """See KeyService. Asked again after an unknown outcome, it keeps the key that is there. Raises KeyringUnavailable when that is not this keyring's."""
        if len(bucket_id) != BUCKET_ID_BYTES:
            raise ValueError(f"a bucket id has {BUCKET_ID_BYTES} bytes, not {len(bucket_id)}")
        epoch = self.material.newest
        context = self._wrap_context(bucket_id, 1, epoch.epoch)
        wrapped = seal_message(epoch.key, BUCKET_KEY_LABEL, context, self._entropy(KEY_BYTES), self._entropy(SALT_BYTES))
        record = BucketKeys(bucket_id, (WrappedBucketKey(1, epoch.epoch, self._clock.wall_ms(), wrapped),))
        await self._audit("key.create", self._facts(bucket_id, version="1", epoch=str(epoch.epoch)))
        try:
            await self._registers.create(self._path(bucket_id), encode(record))
        except AlreadyThere:
            await self.bucket_key(bucket_id)

    async def bucket_key(self, bucket_id: bytes, version: int = 0) -> UnwrappedBucketKey:
        """See KeyService. Raises KeyringUnavailable when the bucket has no such key or it is not under this keyring, ServiceUnavailable without a majority."""
        cached = self._lookup(bucket_id) or await self._load(bucket_id)
        key = cached.versions.get(version or cached.newest)
        if key is None:
            raise KeyringUnavailable(f"Bucket {bucket_id.hex()} has no key of version {version}; its newest is {cached.newest}.")
        return key

    def bucket_key_at_hand(self, bucket_id: bytes, version: int = 0) -> UnwrappedBucketKey | None:
        cached = self._lookup(bucket_id)
        return None if cached is None else cached.versions.get(version or cached.newest)

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        return hmac.digest(self.material.record_key, pack_context(RECORD_LABEL, [*context, message]), "sha256")

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return hmac.compare_digest(self.authenticate(context, message), tag)

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return self._secret_box().seal(plaintext, pack_context(b"", context))

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        return self._secret_box().open(sealed, pack_context(b"", context))

    def close(self) -> None:
        """Forgets every key. Everything that is asked afterwards raises KeyringUnavailable."""
        if self._open is not None:
            self._last = (self._open.newest.epoch, self._open.backed_up_epoch)
        self._open = self._secrets = None
        self._cache.clear()

    def statistics(self) -> KeyringStatistics:
        newest, backed_up = self._last if self._open is None else (self._open.newest.epoch, self._open.backed_up_epoch)
        return KeyringStatistics(self._keyring_id.hex(), newest, backed_up, len(self._cache), self._released, self._open is None)

    def _secret_box(self) -> _Box:
        if self._secrets is None:
            raise KeyringUnavailable("The keyring is closed.")
        return self._secrets

    def _lookup(self, bucket_id: bytes) -> _Cached | None:
        self.material  # noqa: B018 - a closed keyring has nothing, cached or not
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
            if (cached := self._lookup(bucket_id)) is not None:
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
            await self._audit("key.refused", self._facts(bucket_id, reason=refused.message))
            raise
        newest = max(versions)
        await self._audit("key.release", self._facts(bucket_id, versions=",".join(map(str, versions))))
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
        return {"keyring": self._keyring_id.hex(), "bucket": bucket_id.hex(), **more}

    @staticmethod
    def _path(bucket_id: bytes) -> str:
        return "key/" + bucket_id.hex()
