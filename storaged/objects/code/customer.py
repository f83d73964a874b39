"""SSE-C: a customer's key wraps the data key of a body; the key itself is never stored. Pure.

Theory of operation. A version with SSE-C has two random keys. Its *record key* seals the metadata, as the data key does
for other versions; the bucket's key wraps it. Its *data key* seals the body; the customer's key wraps it, and the
result lies in the sealed metadata. So tags, times and metadata can be read and changed without the customer's
key. To open the body one needs the customer's key, and the bucket's key as well.

The metadata would give away what can be computed from the content: a person who has the keyring could test guesses. So
the ETag of such a version, and of each of its parts, is not an MD5 but a keyed function of it, and its checksums are
sealed once more, under a key that follows from the data key. S3 has this too: the ETag of an object with SSE-C is not
its MD5, and its checksums are shown to those who send the key.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace

from storaged.ids import Entropy
from storaged.objects.records import SealedPart
from storaged.sov1 import SALT_BYTES, SealBroken, derive_key, open_message, pack_context, seal_message

WRAP_LABEL = "sov.customer.v1"
ETAG_LABEL = "sov.etag.v1"
CHECKSUM_LABEL = "sov.checksum.v1"
CUSTOMERS = "only a client's key (SSE-C) opens it: it stays whole until it is written again"
"""Why a small body is not coded (``write.divide``)."""

_NONCE_BYTES = 12
_ETAG_BYTES = 16
"""As an MD5 has."""


def _wrap_context(place: tuple[bytes, bytes], context_id: bytes) -> bytes:
    """``place``: (bucket id, key). An upload and the version that it becomes have the same context id."""
    return pack_context(b"", (*place, context_id))


def wrap_key(customer_key: bytes, place: tuple[bytes, bytes], context_id: bytes, dek: bytes, entropy: Entropy) -> bytes:
    """The data key under the customer's key: 112 bytes."""
    return seal_message(customer_key, WRAP_LABEL, _wrap_context(place, context_id), dek, entropy(SALT_BYTES))


def unwrap_key(customer_key: bytes, place: tuple[bytes, bytes], context_id: bytes, wrapped: bytes) -> bytes:
    """Raises SealBroken when it was wrapped under another key, or for another place."""
    return open_message(customer_key, WRAP_LABEL, _wrap_context(place, context_id), wrapped)


class ContentKey:
    """The data key of a body with SSE-C, and the keys that follow from it. ``data_id`` in what follows: of the part
    that a checksum is of; the version's context id for a checksum of the whole.
    """

    __slots__ = ("_box", "dek")

    def __init__(self, dek: bytes) -> None:
        self.dek = dek
        self._box = AESGCM(derive_key(dek, CHECKSUM_LABEL, b""))

    def etag(self, md5: str) -> str:
        """In place of the MD5 (hex), which it does not give away."""
        return derive_key(self.dek, ETAG_LABEL, bytes.fromhex(md5))[:_ETAG_BYTES].hex()

    def seal(self, checksums: Mapping[str, str], data_id: bytes, entropy: Entropy) -> dict[str, str]:
        return {name: self._seal(name, value, data_id, entropy) for name, value in checksums.items()}

    def _seal(self, algorithm: str, value: str, data_id: bytes, entropy: Entropy) -> str:
        nonce = entropy(_NONCE_BYTES)
        sealed = self._box.encrypt(nonce, value.encode(), _field_context(algorithm, data_id))
        return base64.b64encode(nonce + sealed).decode()

    def open(self, sealed: Mapping[str, str], data_id: bytes) -> dict[str, str]:
        """The reverse of ``seal``. Raises SealBroken."""
        return {name: self._open(name, text, data_id) for name, text in sealed.items()}

    def _open(self, algorithm: str, text: str, data_id: bytes) -> str:
        try:
            raw = base64.b64decode(text, validate=True)
            plain = self._box.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _field_context(algorithm, data_id))
            return plain.decode()
        except (InvalidTag, binascii.Error, ValueError):
            raise SealBroken("a checksum does not open") from None

    def seal_part(self, part: SealedPart, algorithm: str, entropy: Entropy) -> SealedPart:
        """A part with its checksum, if it has one, sealed once more."""
        if not part.checksum:
            return part
        return replace(part, checksum=self._seal(algorithm, part.checksum, part.data_id, entropy))

    def open_parts(self, parts: Iterable[SealedPart], algorithm: str) -> tuple[SealedPart, ...]:
        """The reverse of ``seal_part``; about 2 us a part. Raises SealBroken."""
        return tuple(
            replace(part, checksum=self._open(algorithm, part.checksum, part.data_id)) if part.checksum else part
            for part in parts
        )


def _field_context(algorithm: str, data_id: bytes) -> bytes:
    return pack_context(CHECKSUM_LABEL.encode() + b"\0", (data_id, algorithm.encode()))


def without_checksums(parts: Iterable[SealedPart]) -> tuple[SealedPart, ...]:
    """Parts as they are known without the customer's key."""
    return tuple(replace(part, checksum="") if part.checksum else part for part in parts)
