"""Bucket keys: the record ``key/BUCKET_ID``, and a version of a key in the clear. Pure but for the randomness that is handed in.

register key/BUCKET_ID  versions of the bucket's key, each wrapped under an epoch key          BucketKeys
record of an object     its data key, wrapped under a bucket key version                       UnwrappedBucketKey.wrap
HKDF of a bucket key    the list key, for what a listing prints                                UnwrappedBucketKey.seal_list
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.ids import Entropy
from storaged.sov1 import (
    CHUNK_BYTES_MIN,
    HEADER_BYTES,
    KEY_BYTES,
    SALT_BYTES,
    SealBroken,
    open_one,
    seal_one,
    sealed_size,
)
from storaged.wire import Message

WRAP_LABEL = "sov.key.v1"
BUCKET_KEY_LABEL = "sov.bucketkey.v1"
LIST_LABEL = b"sov.list.v1\0"

WRAPPED_KEY_BYTES = sealed_size(KEY_BYTES, CHUNK_BYTES_MIN)
assert WRAPPED_KEY_BYTES == 112

NONCE_BYTES = 12


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


class FieldBox:
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
