"""Bucket keys: the record ``key/BUCKET_ID``, and a version of a key in the clear. Pure except for the randomness that
is passed in.

register key/BUCKET_ID  versions of the bucket's key, each wrapped under an epoch key    BucketKeyRecord
record of an object     its data key, wrapped under a bucket key version                 UnwrappedBucketKey.wrap
HKDF of a bucket key    the list key, for the fields that a listing prints               UnwrappedBucketKey.seal_list
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.ids import Entropy
from storaged.keys.material import KeyMaterial
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
from storaged.wire import Message, encode

WRAP_LABEL = "sov.key.v1"
BUCKET_KEY_LABEL = "sov.bucketkey.v1"
LIST_LABEL = b"sov.list.v1\0"
RECORD_LABEL = b"sov.record.v1\0"

WRAPPED_KEY_BYTES = sealed_size(KEY_BYTES, CHUNK_BYTES_MIN)
assert WRAPPED_KEY_BYTES == 112

NONCE_BYTES = 12


ACTIVE, DESTROYED = "active", "destroyed"


class WrappedBucketKey(Message, frozen=True):
    """One version: 112 bytes under the key of ``epoch``, bound to (keyring id, bucket id, version, epoch)."""

    version: int
    epoch: int
    created_ms: int
    wrapped: bytes


Versions = tuple[WrappedBucketKey, ...]


class BucketEnd(Message, frozen=True):
    """A bucket that was found empty after it was fenced, on its way to Deleted: its ``name``, the fence's ``nonce`` and
    ``shards``, and the time of this.
    """

    name: str
    since_ms: int
    nonce: bytes
    shards: tuple[int, ...]


class BucketKeyRecord(Message, frozen=True):
    """The register ``key/BUCKET_ID`` (hex): versions in ascending order, none once the key is destroyed.

    ``authenticator``: HMAC by the keyring's record key over register, sequence and all other fields. Old records have
    none: they are read, but only an authentic record can prove that a key is destroyed, or that its bucket has ended.
    """

    bucket_id: bytes
    versions: Versions
    state: str = ACTIVE
    ended: BucketEnd | None = None
    authenticator: bytes = b""


class KeyCopy(Message, frozen=True):
    """A bucket's key outside of the ring: in a gateway's own log, or in a backup. No versions: the key was
    forgotten.
    """

    bucket_id: bytes
    versions: Versions


class UnknownEpoch(Exception):
    """The keyring has no such epoch key."""


def register_of(bucket_id: bytes) -> str:
    """The path of the register."""
    return "key/" + bucket_id.hex()


def wrap_context(keyring_id: bytes, bucket_id: bytes, version: int, epoch: int) -> bytes:
    """The context of a wrapped bucket key."""
    return pack_context(b"", [keyring_id, bucket_id, version.to_bytes(4, "big"), epoch.to_bytes(4, "big")])


class Vault:
    """Wraps, opens and authenticates bucket keys with an opened keyring."""

    def __init__(self, material: KeyMaterial, entropy: Entropy) -> None:
        self.keyring_id = material.keyring_id
        self.newest_epoch = material.newest.epoch
        self._epochs = material.epochs
        self._record_key = material.record_key
        self._entropy = entropy

    def __repr__(self) -> str:
        return f"Vault({self.keyring_id.hex()})"

    def close(self) -> None:
        """Forgets its keys: from now on nothing opens and nothing is authentic."""
        self._epochs, self._record_key = {}, self._entropy(KEY_BYTES)

    def wrap_new(self, bucket_id: bytes, version: int, now_ms: int) -> WrappedBucketKey:
        """A new random key under the newest epoch."""
        context = wrap_context(self.keyring_id, bucket_id, version, self.newest_epoch)
        epoch_key, key, salt = self._epochs[self.newest_epoch].key, self._entropy(KEY_BYTES), self._entropy(SALT_BYTES)
        wrapped = seal_message(epoch_key, BUCKET_KEY_LABEL, context, key, salt)
        return WrappedBucketKey(version, self.newest_epoch, now_ms, wrapped)

    def open(self, bucket_id: bytes, entry: WrappedBucketKey) -> bytes:
        """The key in the clear. Raises UnknownEpoch, SealBroken."""
        epoch = self._epochs.get(entry.epoch)
        if epoch is None:
            raise UnknownEpoch(entry.epoch)
        return open_message(
            epoch.key,
            BUCKET_KEY_LABEL,
            wrap_context(self.keyring_id, bucket_id, entry.version, entry.epoch),
            entry.wrapped,
        )

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        """HMAC-SHA256 by the record key, 32 bytes."""
        return hmac.digest(self._record_key, pack_context(RECORD_LABEL, [*context, message]), "sha256")

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return hmac.compare_digest(self.authenticate(context, message), tag)

    def sign(self, record: BucketKeyRecord, sequence: int) -> BucketKeyRecord:
        """The record with the authenticator for this sequence number of its register."""
        unsigned = msgspec.structs.replace(record, authenticator=b"")
        tag = self.authenticate(_context(record.bucket_id, sequence), encode(unsigned))
        return msgspec.structs.replace(record, authenticator=tag)

    def authentic(self, record: BucketKeyRecord, sequence: int) -> bool:
        unsigned = encode(msgspec.structs.replace(record, authenticator=b""))
        return self.verify(_context(record.bucket_id, sequence), unsigned, record.authenticator)


def _context(bucket_id: bytes, sequence: int) -> tuple[bytes, bytes]:
    return register_of(bucket_id).encode(), sequence.to_bytes(8, "big")


class FieldBox:
    """AES-256-GCM under one key with random 96-bit nonces: nonce || ciphertext || tag. The label and the packed context
    are the associated data.
    """

    def __init__(self, key: bytes, label: bytes, entropy: Entropy) -> None:
        self._cipher = AESGCM(key)
        self._label = label
        self._entropy = entropy

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        nonce = self._entropy(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, self._label + context)

    def open_all(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        """Opens each with its context. Raises SealBroken when one does not open or is too short."""
        decrypt, label = self._cipher.decrypt, self._label
        try:
            return [
                decrypt(field[:NONCE_BYTES], field[NONCE_BYTES:], label + context)
                for field, context in zip(sealed, contexts, strict=True)
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
        self._list = FieldBox(HKDFExpand(SHA512(), KEY_BYTES, LIST_LABEL).derive(key), LIST_LABEL, entropy)

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
