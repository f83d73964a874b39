"""SOV1, the sealed stream: encrypted and authenticated chunk by chunk, committed to its key, bound to a context.

    0   4  magic "SOV1"
    4   1  suite: 1 = AES-256-GCM, HKDF-SHA512
    5   1  log2(C), C the size of a sealed chunk: 12 .. 16
    6   2  zero
    8  24  salt, fresh and random for every stream
    32 32  key commitment
    64 ..  chunk i at 64 + i * C: ciphertext || 16-byte tag; C bytes of C - 16 bytes of plaintext, but the last

K(32) || N(12) || commitment(32) = HKDF-Expand-SHA512(key, label || 0x00 || header[0:32] || context)   (RFC 5869,
section 2.3)

The nonce of chunk i is N XOR i (96 bits, big-endian), i < 2^32; there is no associated data. The last chunk is always
shorter than C, its plaintext possibly empty, so that a cut at a chunk's border is detected.

A derived key serves one stream, so nonces never repeat as long as no index is sealed twice: ``Sealer`` refuses that.
The commitment makes a stream open under one key only (AES-GCM alone does not: https://eprint.iacr.org/2020/1491).
Labels separate the uses of one key:

    sov.part.v1       a part of an object          objects.code.seal
    sov.meta.v1       metadata in a record         objects.code.seal
    sov.parts.v1      parts of a long manifest     objects.code.manifest
    sov.partmeta.v1   the secrets of a part's row  objects.write.uploads
    sov.result.v1     answer of a Complete         objects.write.uploads
    sov.key.v1        a wrapped data key           keys
    sov.bucketkey.v1  a wrapped bucket key         keys
    sov.keyring.v1    the keyring file's body      keys

This composition of known parts has not had an outside review.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.wire import Buffer

MAGIC = b"SOV1"
SUITE = 1
HEADER_BYTES = 64
SALT_BYTES = 24
TAG_BYTES = 16
KEY_BYTES = 32
CHUNK_BYTES_MIN = 4 * 1024
CHUNK_BYTES_MAX = 64 * 1024
CHUNKS_MAX = 2**32

_PREFIX_BYTES = 32
_NONCE_BYTES = 12
_COMMITMENT_BYTES = 32
assert len(MAGIC) + 4 + SALT_BYTES == _PREFIX_BYTES
assert _PREFIX_BYTES + _COMMITMENT_BYTES == HEADER_BYTES
_MATERIAL_BYTES = KEY_BYTES + _NONCE_BYTES + _COMMITMENT_BYTES
assert (KEY_BYTES, _NONCE_BYTES) == (32, 12)
_SHA512 = SHA512()
_HEADS = {1 << log: MAGIC + bytes((SUITE, log, 0, 0)) for log in range(12, 17)}


class SealBroken(Exception):
    """Bytes do not open under the given key and context: they are damaged, or not what they claim to be.

    ``index`` is the chunk that does not open; None for the header (wrong key, wrong context, or a damaged header).
    """

    def __init__(self, message: str = "", *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def pack_context(label: bytes, fields: Sequence[bytes]) -> bytes:
    """label || for each field: u32 BE length || field. The result is unambiguous for any fields. To pack more fields,
    use the result as the label.
    """
    packed = label
    for field in fields:
        packed += len(field).to_bytes(4, "big") + field
    return packed


def chunk_bytes_for(size: int | None, k: int) -> int:
    """The smallest power of two C in 4 .. 64 KiB with k * (C - 16) > ``size``, so that k cells of a short stream are
    not mostly padding. 64 KiB for a longer stream, or one of unknown length (None).
    """
    if size is not None:
        chunk = CHUNK_BYTES_MIN
        while chunk < CHUNK_BYTES_MAX:
            if k * (chunk - TAG_BYTES) > size:
                return chunk
            chunk *= 2
    return CHUNK_BYTES_MAX


def chunk_count(size: int, chunk_bytes: int) -> int:
    """The number of chunks for ``size`` bytes of plaintext: at least one, and the last is never full."""
    return size // (chunk_bytes - TAG_BYTES) + 1


def sealed_size(size: int, chunk_bytes: int) -> int:
    """The size of header and chunks for ``size`` bytes of plaintext: 64 + P + 16 * (P // (C - 16) + 1)."""
    return HEADER_BYTES + chunks_size(size, chunk_bytes)


def chunks_size(size: int, chunk_bytes: int) -> int:
    """The size of the chunks alone, without the header."""
    return size + TAG_BYTES * chunk_count(size, chunk_bytes)


def header_chunk_bytes(header: Buffer) -> int:
    """C, from a header of 64 bytes. Raises SealBroken when it is not one of SOV1."""
    if len(header) != HEADER_BYTES or header[:4] != MAGIC:
        raise SealBroken("not an SOV1 header")
    if header[4] != SUITE:
        raise SealBroken(f"SOV1 suite {header[4]} is not known")
    if not 12 <= header[5] <= 16 or header[6] or header[7]:
        raise SealBroken("malformed SOV1 header")
    return 1 << header[5]


def _derive(key: bytes, label: str, prefix: bytes, context: bytes) -> bytes:
    """K || N || commitment."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return HKDFExpand(_SHA512, _MATERIAL_BYTES, b"".join((label.encode(), b"\0", prefix, context))).derive(key)


def derive_key(key: bytes, label: str, context: bytes) -> bytes:
    """32 bytes: HKDF-Expand-SHA512(key, label || 0x00 || context). Without ``key`` (32 bytes) they are
    indistinguishable from random bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return HKDFExpand(_SHA512, KEY_BYTES, b"".join((label.encode(), b"\0", context))).derive(key)


def _prefix(chunk_bytes: int, salt: bytes) -> bytes:
    """The header up to the commitment."""
    head = _HEADS.get(chunk_bytes)
    if head is None:
        raise ValueError(
            f"chunks have a power of two from {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX} bytes, not {chunk_bytes}"
        )
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
    return head + salt


def seal_one(
    key: bytes, label: str, context: bytes, chunk_bytes: int, plaintext: Buffer, salt: bytes
) -> tuple[bytes, bytes]:
    """Seals a stream that is shorter than a chunk, without a ``Sealer``; returns (header, chunk). ``salt``: 24 fresh
    random bytes.
    """
    prefix = _prefix(chunk_bytes, salt)
    if len(plaintext) >= chunk_bytes - TAG_BYTES:
        raise ValueError(f"{len(plaintext)} bytes fill a chunk of {chunk_bytes}: the stream needs another")
    material = _derive(key, label, prefix, context)
    return prefix + material[44:], AESGCM(material[:32]).encrypt(material[32:44], plaintext, None)


class StreamKey(NamedTuple):
    """The derived key and nonce of a stream whose header's commitment is verified. ``chunk_bytes`` is C."""

    key: bytes
    nonce: bytes
    chunk_bytes: int

    def open_only(self, chunk: Buffer) -> bytes:
        """The plaintext of a stream that is shorter than a chunk. Raises SealBroken, also for a full chunk."""
        if not TAG_BYTES <= len(chunk) < self.chunk_bytes:
            raise SealBroken(f"{len(chunk)} bytes are not the only chunk of a stream", index=0)
        try:
            return AESGCM(self.key).decrypt(self.nonce, chunk, None)
        except InvalidTag:
            raise SealBroken("chunk 0 does not open", index=0) from None

    def open_whole(self, sealed: Buffer) -> bytes:
        """The plaintext of a whole stream, of its chunks one after the other. Raises SealBroken, also for one that is
        cut short.
        """
        chunk_bytes = self.chunk_bytes
        if len(sealed) < chunk_bytes:
            return self.open_only(sealed)
        if len(sealed) % chunk_bytes < TAG_BYTES:
            raise SealBroken(f"{len(sealed)} bytes are not a whole stream", index=len(sealed) // chunk_bytes)
        cipher, nonce, view, plain = AESGCM(self.key), int.from_bytes(self.nonce, "big"), memoryview(sealed), []
        for index, at in enumerate(range(0, len(sealed), chunk_bytes)):
            try:
                chunk = view[at : at + chunk_bytes]
                plain.append(cipher.decrypt((nonce ^ index).to_bytes(_NONCE_BYTES, "big"), chunk, None))
            except InvalidTag:
                raise SealBroken(f"chunk {index} does not open", index=index) from None
        return b"".join(plain)


def stream_key(key: bytes, label: str, context: bytes, header: bytes) -> StreamKey:
    """Derives a stream's key. Raises SealBroken for a wrong key, context or header; compares the commitment in constant
    time.
    """
    chunk_bytes = header_chunk_bytes(header)
    material = _derive(key, label, header[:_PREFIX_BYTES], context)
    if not hmac.compare_digest(material[44:], header[_PREFIX_BYTES:]):
        raise SealBroken("the header does not commit to this key and context")
    return StreamKey(material[:32], material[32:44], chunk_bytes)


def open_one(key: bytes, label: str, context: bytes, header: bytes, chunk: Buffer) -> bytes:
    """Opens a stream that is shorter than a chunk, without an ``Opener``. Raises SealBroken, also for a full chunk."""
    return stream_key(key, label, context, header).open_only(chunk)


class Sealer:
    """Seals one stream. One thread at a time.

    Indices must ascend, and the one chunk that is not full must come last. Sealing an index twice would reuse a nonce,
    which reveals both plaintexts and the authentication key, so it raises ValueError. ``salt``: 24 fresh random bytes.
    """

    def __init__(self, key: bytes, label: str, context: bytes, chunk_bytes: int, salt: bytes) -> None:
        prefix = _prefix(chunk_bytes, salt)
        material = _derive(key, label, prefix, context)
        self._cipher = AESGCM(material[:32])
        self._nonce = int.from_bytes(material[32:44], "big")
        self._next = 0
        self.header = prefix + material[44:]
        """The 64 bytes of the stream's header."""
        self.chunk_bytes = chunk_bytes
        self.plain_bytes = chunk_bytes - TAG_BYTES
        """Plaintext bytes of a full chunk."""

    def seal_into(self, index: int, plaintext: Buffer, out: memoryview) -> int:
        """Seals chunk ``index`` to the front of ``out``; returns its length, ``len(plaintext) + 16``."""
        self._reserve(index, len(plaintext))
        length = len(plaintext) + TAG_BYTES
        self._cipher.encrypt_into((self._nonce ^ index).to_bytes(_NONCE_BYTES, "big"), plaintext, None, out[:length])
        return length

    def seal(self, index: int, plaintext: Buffer) -> bytes:
        """As ``seal_into``, into fresh bytes."""
        self._reserve(index, len(plaintext))
        return self._cipher.encrypt((self._nonce ^ index).to_bytes(_NONCE_BYTES, "big"), plaintext, None)

    def seal_block(self, first: int, plaintext: Buffer, out: memoryview, *, last: bool) -> int:
        """Seals consecutive chunks from index ``first`` on, one after the other into ``out``; returns the bytes
        written.

        ``plaintext`` is a whole number of full chunks, unless it ends the stream (``last``): then the final chunk,
        shorter and possibly empty, is sealed too. The cipher runs without the interpreter lock: call this in a thread
        for large blocks.
        """
        view = memoryview(plaintext)
        full, rest = divmod(len(view), self.plain_bytes)
        if rest and not last:
            raise ValueError(
                f"{len(view)} bytes are not a whole number of chunks of {self.plain_bytes}, and do not end the stream"
            )
        at = 0
        for number in range(full):
            start = number * self.plain_bytes
            at += self.seal_into(
                first + number, view[start : start + self.plain_bytes], out[at : at + self.chunk_bytes]
            )
        if last:
            at += self.seal_into(first + full, view[full * self.plain_bytes :], out[at:])
        return at

    def _reserve(self, index: int, length: int) -> None:
        if not self._next <= index < CHUNKS_MAX:
            raise ValueError(
                f"chunk {index} after chunk {self._next - 1}: indices ascend, below 2^32, and end with the short chunk"
            )
        if length > self.plain_bytes:
            raise ValueError(f"a chunk holds {self.plain_bytes} bytes, not {length}")
        self._next = index + 1 if length == self.plain_bytes else CHUNKS_MAX


class Opener:
    """Opens one stream's chunks, in any order, from any number of threads.

    With ``size`` (bytes of plaintext) every chunk must also have the length that follows from it.
    """

    def __init__(self, key: StreamKey, size: int | None = None) -> None:
        self.chunk_bytes = key.chunk_bytes
        self.plain_bytes = self.chunk_bytes - TAG_BYTES
        self._cipher = AESGCM(key.key)
        self._nonce = int.from_bytes(key.nonce, "big")
        self._chunks = None if size is None else chunk_count(size, self.chunk_bytes)
        self._full = 0 if self._chunks is None else self._chunks - 1
        """The chunks before this index are full ones."""
        self._last_bytes = 0 if size is None else size % self.plain_bytes + TAG_BYTES

    def open(self, index: int, sealed: Buffer) -> bytes:
        """The plaintext of chunk ``index``. Raises SealBroken."""
        self._check(index, len(sealed))
        try:
            return self._cipher.decrypt((self._nonce ^ index).to_bytes(_NONCE_BYTES, "big"), sealed, None)
        except InvalidTag:
            raise SealBroken(f"chunk {index} does not open", index=index) from None

    def open_chunks(self, first: int, chunks: Sequence[Buffer], out: memoryview, at: int) -> int:
        """Opens consecutive chunks from index ``first`` on, which may lie apart, to ``out[at:]``; returns where their
        plaintext ends. One call for all of them, for a GET opens sixteen chunks for each MiB.

        Raises SealBroken whose ``index`` is the first chunk that does not open; then do not use ``out``.
        """
        decrypt_into, nonce, full = self._cipher.decrypt_into, self._nonce, self.chunk_bytes
        for index, sealed in enumerate(chunks, first):
            length = len(sealed)
            if length != full or not 0 <= index < self._full:
                self._check(index, length)
            end = at + length - TAG_BYTES
            try:
                decrypt_into((nonce ^ index).to_bytes(_NONCE_BYTES, "big"), sealed, None, out[at:end])
            except InvalidTag:
                raise SealBroken(f"chunk {index} does not open", index=index) from None
            at = end
        return at

    def open_block(self, first: int, sealed: Buffer, out: memoryview) -> int:
        """As ``open_chunks``, of chunks that lie one after the other; returns the bytes of plaintext written to
        ``out``.
        """
        view, full = memoryview(sealed), self.chunk_bytes
        return self.open_chunks(first, [view[at : at + full] for at in range(0, len(view), full)], out, 0)

    def _check(self, index: int, length: int) -> None:
        if not 0 <= index < CHUNKS_MAX or not TAG_BYTES <= length <= self.chunk_bytes:
            raise SealBroken(f"chunk {index} of {length} bytes cannot be", index=index)
        if self._chunks is None:
            return
        wanted = self.chunk_bytes if index < self._chunks - 1 else self._last_bytes
        if index >= self._chunks or length != wanted:
            raise SealBroken(f"chunk {index} of {length} bytes does not fit the stream's size", index=index)


def seal_message(key: bytes, label: str, context: bytes, plaintext: bytes, salt: bytes) -> bytes:
    """Seals a whole stream into one value: header and chunks. C is the smallest with which the plaintext fits one
    chunk, else 64 KiB.

    ``context`` is packed (``pack_context``); ``salt`` is 24 fresh random bytes; the result has
    ``sealed_size(len(plaintext), C)`` bytes.
    """
    chunk_bytes = chunk_bytes_for(len(plaintext), 1)
    if len(plaintext) < chunk_bytes - TAG_BYTES:
        header, chunk = seal_one(key, label, context, chunk_bytes, plaintext, salt)
        return header + chunk
    sealer = Sealer(key, label, context, chunk_bytes, salt)
    out = bytearray(sealed_size(len(plaintext), chunk_bytes))
    out[:HEADER_BYTES] = sealer.header
    sealer.seal_block(0, plaintext, memoryview(out)[HEADER_BYTES:], last=True)
    return bytes(out)


def open_message(key: bytes, label: str, context: bytes, sealed: bytes) -> bytes:
    """Opens what ``seal_message`` made. Raises SealBroken."""
    header = sealed[:HEADER_BYTES]
    if len(sealed) < HEADER_BYTES + header_chunk_bytes(header):
        return open_one(key, label, context, header, sealed[HEADER_BYTES:])
    opener = Opener(stream_key(key, label, context, header))
    chunks = memoryview(sealed)[HEADER_BYTES:]
    count, rest = divmod(len(chunks), opener.chunk_bytes)
    if rest < TAG_BYTES:
        raise SealBroken("the message is cut short", index=count)
    out = bytearray(count * opener.plain_bytes + rest - TAG_BYTES)
    opener.open_block(0, chunks, memoryview(out))
    return bytes(out)
