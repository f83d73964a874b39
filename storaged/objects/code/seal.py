"""Seals parts and the metadata in records: SOV1 (``storaged.sov1``) with the labels and contexts of the object plane.

A part's context is data id (16 bytes) || part number (u32 big-endian); a message's context is its fields, each
length-prefixed. The wrap of the data key binds bucket, key and version, so that parts need not be sealed again when
they become a version.
"""

from __future__ import annotations

from storaged.ids import DATA_ID_BYTES
from storaged.sov1 import TAG_BYTES, Sealer, StreamKey, chunk_bytes_for, chunks_size, seal_one, stream_key
from storaged.wire import Buffer, unfilled

PART_LABEL = "sov.part.v1"
META_LABEL = "sov.meta.v1"
ENCRYPTED_META_LABEL = "sov.meta.v2"
"""Metadata of a version that names its encryption."""


def _part_context(data_id: bytes, part_number: int) -> bytes:
    if len(data_id) != DATA_ID_BYTES:
        raise ValueError(f"a data id has {DATA_ID_BYTES} bytes, not {len(data_id)}")
    return data_id + part_number.to_bytes(4, "big")


def seal_part(dek: bytes, data_id: bytes, part_number: int, plaintext: Buffer, salt: bytes) -> tuple[bytes, Buffer]:
    """(header, chunks one after the other) of a part that is kept whole. It is one chunk, of the smallest size that
    holds it, or several of 64 KiB. ``salt``: 24 fresh random bytes for every attempt.
    """
    chunk_bytes, size = chunk_bytes_for(len(plaintext), 1), len(plaintext)
    if size < chunk_bytes - TAG_BYTES:
        return seal_one(dek, PART_LABEL, _part_context(data_id, part_number), chunk_bytes, plaintext, salt)
    sealer, sealed = PartSealer(dek, data_id, part_number, chunk_bytes, salt), unfilled(chunks_size(size, chunk_bytes))
    sealer.seal_block(0, plaintext, memoryview(sealed), last=True)
    return sealer.header, sealed


def part_key(dek: bytes, header: bytes, data_id: bytes, part_number: int) -> StreamKey:
    """The key that opens a part. Raises SealBroken when the header does not commit to this key, data
    id and part number.
    """
    return stream_key(dek, PART_LABEL, _part_context(data_id, part_number), header)


class PartSealer(Sealer):
    """Seals one part: see ``Sealer`` for ``header``, ``seal_into``, ``seal`` and ``seal_block``. ``salt``: 24 fresh
    random bytes for every attempt.
    """

    def __init__(self, dek: bytes, data_id: bytes, part_number: int, chunk_bytes: int, salt: bytes) -> None:
        super().__init__(dek, PART_LABEL, _part_context(data_id, part_number), chunk_bytes, salt)
