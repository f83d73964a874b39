"""The key service without a keyring: keys that follow from their version, in the clear."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storaged.cluster.signers import signer_id
from storaged.errors import CertificateRefused, KeyringUnavailable
from storaged.keys.bucketkey import BucketEnd
from storaged.keys.upkeep import EndedKey
from storaged.objects.ports import WRAPPED_KEY_BYTES, SealBroken, pack_context

NONCE_BYTES, TAG_BYTES = 12, 16
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(b"s" * 32)


@dataclass
class Uses:
    """Data keys that were unwrapped, and fields that ``open_lists`` has opened."""

    unwraps: int = 0
    fields_opened: int = 0


class PlainBucketKey:
    """A ``BucketKey``. All buckets share the key of one version."""

    def __init__(self, version: int, uses: Uses | None = None, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._version = version
        self._entropy = entropy
        self._uses = uses or Uses()
        self._key = AESGCM(hashlib.sha256(b"bucket key %d" % version).digest())

    @property
    def version(self) -> int:
        return self._version

    def wrap(self, dek: bytes, context: bytes) -> bytes:
        return self.seal_list(dek, context).ljust(WRAPPED_KEY_BYTES, b"\0")

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        self._uses.unwraps += 1
        return self.open_list(wrapped[: NONCE_BYTES + 32 + TAG_BYTES], context)

    def seal_list(self, plaintext: bytes, context: bytes) -> bytes:
        nonce = self._entropy(NONCE_BYTES)
        return nonce + self._key.encrypt(nonce, plaintext, context)

    def open_list(self, sealed: bytes, context: bytes) -> bytes:
        try:
            return self._key.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
        except (InvalidTag, ValueError):
            raise SealBroken("wrong key or context") from None

    def open_lists(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        self._uses.fields_opened += len(sealed)
        return [self.open_list(field, context) for field, context in zip(sealed, contexts, strict=True)]


class MemoryKeys:
    """A ``KeyService``. ``late``: no key is in memory, so that every caller has to wait for it. ``entropy``: for the
    nonces of what it seals."""

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy
        self.newest: dict[bytes, int] = {}
        """Bucket id -> version."""
        self.late = False
        self.now_ms: Callable[[], int] = lambda: 0
        self.ended: dict[bytes, BucketEnd] = {}
        self.looked_after: list[dict[bytes, tuple[str, ...]]] = []
        self.uses = Uses()
        self._keys: dict[int, PlainBucketKey] = {}

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        self.newest.setdefault(bucket_id, 1)

    async def end_bucket_key(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        ended = self.ended.get(bucket_id)
        if bucket_id in self.newest and (ended is None or ended.nonce < nonce):
            self.ended[bucket_id] = BucketEnd(name, self.now_ms(), nonce, tuple(shards))

    async def ended_bucket_keys(self) -> list[EndedKey]:
        return [EndedKey(bucket_id, end) for bucket_id, end in self.ended.items()]

    async def destroy_bucket_key(self, bucket_id: bytes, nonce: bytes) -> bool:
        if bucket_id not in self.ended or self.ended[bucket_id].nonce != nonce:
            return False
        del self.ended[bucket_id], self.newest[bucket_id]
        return True

    async def reconcile_copies(self, buckets: Mapping[bytes, tuple[str, ...]]) -> None:
        self.looked_after.append(dict(buckets))

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> PlainBucketKey:
        newest = self.newest.get(bucket_id, 0)
        if not newest or version > newest:
            raise KeyringUnavailable
        return self.key(version or newest)

    def try_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> PlainBucketKey | None:
        if self.late or bucket_id not in self.newest:
            return None
        return self._keys.get(version or self.newest[bucket_id])

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        return hmac.digest(b"record key", pack_context(message, context), "sha256")

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return hmac.compare_digest(self.authenticate(context, message), tag)

    def keyring_id(self) -> bytes:
        return b"a keyring's id.."

    def sign_public(self, message: bytes) -> bytes:
        return SIGNING_KEY.sign(message)

    def public_signer(self) -> bytes:
        return SIGNING_KEY.public_key().public_bytes_raw()

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return PlainBucketKey(99, entropy=self._entropy).seal_list(plaintext, pack_context(b"", context))

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        return PlainBucketKey(99).open_list(sealed, pack_context(b"", context))

    # --- what tests do to it ------------------------------------------------------------------------------------------

    def key(self, version: int = 1) -> PlainBucketKey:
        """As it is in memory; released if it was not."""
        return self._keys.setdefault(version, PlainBucketKey(version, self.uses, self._entropy))

    def forget(self, *versions: int) -> None:
        """Keys of these versions are not in memory any more; of all, when none is named."""
        for version in versions or list(self._keys):
            del self._keys[version]


class MemorySigners:
    """A ``SignerKeys`` that knows the key of MemoryKeys."""

    async def key(self, signer: bytes) -> Ed25519PublicKey:
        if signer != signer_id(SIGNING_KEY.public_key().public_bytes_raw()):
            raise CertificateRefused("no such signer")
        return SIGNING_KEY.public_key()
