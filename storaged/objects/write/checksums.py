"""MD5 and the ten checksums of S3: computed piece by piece, verified against what was declared, combined for
multipart uploads.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html. ``hashlib``'s ``update``
and zlib release the interpreter lock; the CRCs of awscrt and xxHash run at memory speed. A body that came without a
checksum gets CRC64NVME, which takes 0.3 us for a small object.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import xxhash
from awscrt import checksums as crt
from msgspec import Struct

from storaged.errors import BadDigest, IncompleteBody, InvalidRequest, XAmzContentSHA256Mismatch
from storaged.objects.api import CHECKSUM_ALGORITHMS, DEFAULT_ALGORITHM, BodyChecks
from storaged.wire import Buffer

FULL_OBJECT = "FULL_OBJECT"
COMPOSITE = "COMPOSITE"


class _Crc:
    def __init__(self, function: Callable[..., int], width_bytes: int) -> None:
        self._function = function
        self._width = width_bytes
        self._value = 0

    def update(self, data: Buffer) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width, "big")


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...

    def digest(self) -> bytes: ...


class _Algorithm(NamedTuple):
    new: Callable[[], _Hash]
    combine: Callable[[int, int, int], int] | None
    """(crc of A, crc of B, bytes of B) -> crc of A || B."""
    width_bytes: int


_ALGORITHMS: dict[str, _Algorithm] = {
    "CRC32": _Algorithm(lambda: _Crc(zlib.crc32, 4), crt.combine_crc32, 4),
    "CRC32C": _Algorithm(lambda: _Crc(crt.crc32c, 4), crt.combine_crc32c, 4),
    "CRC64NVME": _Algorithm(lambda: _Crc(crt.crc64nvme, 8), crt.combine_crc64nvme, 8),
    "SHA1": _Algorithm(lambda: hashlib.sha1(usedforsecurity=False), None, 20),
    "SHA256": _Algorithm(hashlib.sha256, None, 32),
    "SHA512": _Algorithm(hashlib.sha512, None, 64),
    "MD5": _Algorithm(lambda: hashlib.md5(usedforsecurity=False), None, 16),
    "XXHASH64": _Algorithm(xxhash.xxh64, None, 8),
    "XXHASH3": _Algorithm(xxhash.xxh3_64, None, 8),
    "XXHASH128": _Algorithm(xxhash.xxh3_128, None, 16),
}
assert tuple(_ALGORITHMS) == CHECKSUM_ALGORITHMS

CHECKSUM_BYTES = {name: rule.width_bytes for name, rule in _ALGORITHMS.items()}
"""Bytes of each algorithm's value, before base64."""


_crc64nvme: Callable[[Buffer, int], int] = crt.crc64nvme  # type: ignore[assignment]  # it takes any buffer


def can_be_full_object(algorithm: str) -> bool:
    """CRCs of parts combine to the whole object's; hashes don't."""
    return _ALGORITHMS[algorithm].combine is not None


def default_type(algorithm: str) -> str:
    """The checksum type of a multipart upload that names none, as AWS chooses it."""
    return FULL_OBJECT if algorithm == "CRC64NVME" else COMPOSITE if algorithm else ""


def can_be_composite(algorithm: str) -> bool:
    """On AWS, CRC64NVME is for whole objects only."""
    return algorithm != DEFAULT_ALGORITHM


def checksum_of(algorithm: str, data: Buffer) -> str:
    """Base64 of one algorithm's value."""
    found = _ALGORITHMS[algorithm].new()
    found.update(data)
    return _base64(found.digest())


def _base64(digest: bytes) -> str:
    return binascii.b2a_base64(digest, newline=False).decode()


class Digest(Struct, frozen=True):
    """The digests of a body: ETag (hex MD5), checksums (algorithm -> base64), size in bytes."""

    etag: str
    checksums: dict[str, str]
    size: int


class BodyDigest:
    """Digests a body piece by piece (one thread at a time), then compares the result with the declared values."""

    def __init__(self, checks: BodyChecks) -> None:
        """Raises InvalidRequest for an unknown algorithm."""
        self._checks = checks
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sums: dict[str, _Hash] = {}
        self.size = 0
        for name in (*checks.algorithms, *checks.checksums):
            if name not in _ALGORITHMS:
                raise InvalidRequest(f"The checksum algorithm {name} is not known.")
            if name not in self._sums:
                self._sums[name] = _ALGORITHMS[name].new()
        if not self._sums:
            self._sums[DEFAULT_ALGORITHM] = _ALGORITHMS[DEFAULT_ALGORITHM].new()
        self._signed_hash = self._sums.get("SHA256") or hashlib.sha256() if checks.sha256 else None

    def update(self, piece: Buffer) -> None:
        self.size += len(piece)
        self._md5.update(piece)
        for checksum in self._sums.values():
            checksum.update(piece)
        if self._signed_hash is not None and "SHA256" not in self._sums:
            self._signed_hash.update(piece)

    def finish(self) -> Digest:
        """Raises IncompleteBody, XAmzContentSHA256Mismatch, BadDigest, InvalidRequest (a trailer with an algorithm that
        was not announced), and what ``BodyChecks.trailing`` raises.
        """
        declared = dict(self._checks.checksums)
        if self._checks.size is not None and self.size != self._checks.size:
            raise IncompleteBody(f"The body has {self.size} bytes; {self._checks.size} were declared.")
        if self._signed_hash is not None and (computed := self._signed_hash.digest().hex()) != self._checks.sha256:
            raise XAmzContentSHA256Mismatch(
                ClientComputedContentSHA256=self._checks.sha256, S3ComputedContentSHA256=computed
            )
        if self._checks.trailing is not None:
            declared.update(self._checks.trailing())
        md5 = self._md5.digest()
        if self._checks.md5 is not None and md5 != self._checks.md5:
            raise BadDigest("The Content-MD5 you specified did not match what we received.")
        found = {name: _base64(checksum.digest()) for name, checksum in self._sums.items()}
        for name, value in declared.items():
            if name not in found:
                raise InvalidRequest(f"The trailer has a {name} checksum that the request did not announce.")
            if found[name] != value:
                raise BadDigest(f"The {name} you specified did not match the calculated checksum.")
        return Digest(md5.hex(), found, self.size)


def digest_of(plain: Buffer, checks: BodyChecks) -> Digest:
    """As ``BodyDigest``, of a body that has arrived whole. Raises the same."""
    if checks.algorithms or checks.checksums or checks.trailing is not None:
        digest = BodyDigest(checks)
        digest.update(plain)
        return digest.finish()
    if checks.size is not None and len(plain) != checks.size:
        raise IncompleteBody(f"The body has {len(plain)} bytes; {checks.size} were declared.")
    if checks.sha256 and (computed := hashlib.sha256(plain).hexdigest()) != checks.sha256:
        raise XAmzContentSHA256Mismatch(ClientComputedContentSHA256=checks.sha256, S3ComputedContentSHA256=computed)
    md5 = hashlib.md5(plain, usedforsecurity=False)
    if checks.md5 is not None and md5.digest() != checks.md5:
        raise BadDigest("The Content-MD5 you specified did not match what we received.")
    return Digest(md5.hexdigest(), {DEFAULT_ALGORITHM: _base64(_crc64nvme(plain, 0).to_bytes(8, "big"))}, len(plain))


def multipart_etag(etags: Sequence[str]) -> str:
    """The MD5 of the parts' binary MD5s, ``-N``."""
    joined = b"".join(bytes.fromhex(etag) for etag in etags)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"


def multipart_checksum(algorithm: str, kind: str, parts: Sequence[tuple[str, int]]) -> str:
    """``parts``: (base64 checksum, size) in order. COMPOSITE: the checksum of the parts' checksums, with ``-N``.
    FULL_OBJECT: the checksum of all bytes, combined from the parts'.

    Raises InvalidRequest when a part has no checksum of this algorithm, or the algorithm can't do FULL_OBJECT.
    """
    rule = _ALGORITHMS[algorithm]
    values = []
    for number, (text, _size) in enumerate(parts, 1):
        value = decode_checksum(algorithm, text)
        if value is None:
            raise InvalidRequest(f"Part {number} was uploaded without a {algorithm} checksum.")
        values.append(value)
    if kind == COMPOSITE:
        total = rule.new()
        total.update(b"".join(values))
        return f"{_base64(total.digest())}-{len(parts)}"
    if rule.combine is None:
        raise InvalidRequest(f"The {algorithm} checksum of a multipart upload can only be COMPOSITE.")
    whole = 0
    for value, (_text, size) in zip(values, parts, strict=True):
        whole = rule.combine(whole, int.from_bytes(value, "big"), size)
    return _base64(whole.to_bytes(rule.width_bytes, "big"))


def decode_checksum(algorithm: str, text: str) -> bytes | None:
    """The raw value, or None when the text is not a checksum of this algorithm."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == _ALGORITHMS[algorithm].width_bytes else None


def same_checksums(given: Mapping[str, str], kept: Mapping[str, str]) -> bool:
    """Whether every given value was kept, and is equal."""
    return all(kept.get(name) == value for name, value in given.items())
