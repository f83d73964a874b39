"""What objects need from the key plane, as a port: a storage node, which runs ``place`` and ``erasure``, never imports
``storaged.keys``.

``node.py`` hands in ``keys.keyring.Keyring`` on gateways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from storaged.objects.records import BucketRecord
from storaged.sov1 import SealBroken as SealBroken
from storaged.sov1 import pack_context as pack_context

WRAPPED_KEY_BYTES = 112


class BucketKey(Protocol):
    """One version of a bucket's key, unwrapped and cached. Pure computation from here on: about 6 us a wrap, 1 us a
    list field.

    ``context``: the packed fields that the sealed bytes are bound to (``pack_context``)."""

    @property
    def version(self) -> int: ...

    def wrap(self, dek: bytes, context: bytes) -> bytes:
        """32-byte DEK -> 112 bytes, committing, bound to the context."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Raises SealBroken when it was not wrapped under this key for this context."""

    def seal_list(self, plaintext: bytes, context: bytes) -> bytes:
        """nonce(12) || AES-256-GCM under the list key, context as AAD."""

    def open_list(self, sealed: bytes, context: bytes) -> bytes: ...

    def open_lists(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        """What a page of a listing prints, each field with its context. Raises SealBroken when one of them does not
        open.
        """


class BucketEnd(Protocol):
    """What ``end_bucket_key`` noted, and when (ms since 1970)."""

    @property
    def name(self) -> str: ...
    @property
    def since_ms(self) -> int: ...
    @property
    def nonce(self) -> bytes: ...
    @property
    def shards(self) -> tuple[int, ...]: ...


class EndedKey(Protocol):
    """The key of a bucket that has ended."""

    @property
    def bucket_id(self) -> bytes: ...
    @property
    def end(self) -> BucketEnd: ...


class KeyService(Protocol):
    """Keys never leave the process that has this. Raises KeyringUnavailable when it is closed or not this cluster's,
    KeyReleaseRefused when the policy does not
    allow this gateway to have the key. ``countries`` are those of the authenticated bucket record."""

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        """Makes version 1, wrapped under the epoch key, and commits it to the system register ``key/BUCKET_ID`` before
        it returns; audited.
        """

    async def end_bucket_key(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        """Notes with the key that its bucket was found empty under the fence ``nonce`` of its ``shards``, and is about
        to be Deleted. Idempotent. Raises ServiceUnavailable when that could not be noted.
        """

    async def ended_bucket_keys(self) -> Sequence[EndedKey]:
        """What was noted so, and is not destroyed yet."""

    async def destroy_bucket_key(self, bucket_id: bytes, nonce: bytes) -> bool:
        """Destroys the key of a bucket whose end has this ``nonce``, in the ring and in this gateway; audited. True
        when this call did.
        """

    async def reconcile_copies(self, buckets: Mapping[bytes, tuple[str, ...]]) -> None:
        """Compares the ring's keys with this gateway's copies of them, mends what is damaged, and makes copies of the
        keys of ``buckets`` (id -> countries).
        """

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> BucketKey:
        """The newest version (0), or the one named; cached, so that no object path waits for the register twice.
        The policy is asked each time. Audited on release and when it is refused, not on cached use."""

    def try_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> BucketKey | None:
        """What ``bucket_key`` would answer without waiting; None when it would wait, or refuse."""

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        """HMAC-SHA256 (32 bytes) by the keyring's record key over the length-prefixed context and message."""

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        """Constant time."""

    def sign_public(self, message: bytes) -> bytes:
        """Ed25519 (64 bytes) by the cluster's signing key, which follows from the keyring: for what nodes without keys
        verify.
        """

    def public_signer(self) -> bytes:
        """The public half of the signing key, 32 bytes."""

    def keyring_id(self) -> bytes:
        """16 bytes, random, the same for all gateways of the cluster."""

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        """For what is kept in system registers: S3 secrets. nonce(12) || AES-256-GCM, context as AAD."""

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes: ...


class Lenders(Protocol):
    """Buckets that were deleted while copies in other buckets use their data."""

    async def find(self, bucket_id: bytes) -> BucketRecord | None:
        """The verified record of such a bucket, with the nonce of its fence; None: the bucket is none. Raises
        DataDamaged, ServiceUnavailable.
        """

    async def bucket(self, name: str, bucket_id: bytes) -> BucketRecord | None:
        """The bucket of this id, which has or had this name: as it is, or as a lender. None: it has ended, or is being
        deleted. Raises as ``find``.
        """


class NoLenders:
    """``Lenders`` of a plane without a directory of buckets."""

    async def find(self, _bucket_id: bytes) -> BucketRecord | None:
        return None

    async def bucket(self, _name: str, _bucket_id: bytes) -> BucketRecord | None:
        return None
