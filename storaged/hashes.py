"""Hashes fragments, manifest pages, rows and listings, as a guard against hostile nodes. The hashes have no key,
because nodes without keys must be able to check them.

Each is SHA-256 over a label, a zero byte and the bytes, cut to 20 bytes: finding other bytes for a given hash takes
2^160 steps. SHA-256, because processors have instructions for it (1 to 1.7 GB/s a core; BLAKE2b 0.5 to 0.9:
benches/hashes.py). 20 bytes, because every fragment carries the hashes of all fragments of its block. The labels keep a
fragment from passing as a page. Hashes that only answer a question, and are stored nowhere, are cut to 16 bytes: two
replicas compare what each of them holds, so that a liar needs other bytes for a given hash (2^128 steps).

Earlier versions used xxh3-128, for which other bytes are found in a tenth of a second. Its length of 16 bytes
identifies it. It still checks what was written with it, and nothing new. Bit rot is found by xxh3-64 of each cell and
row, which is forty times as fast. A liar finds other bytes with the same xxh3-64, so that it proves nothing about what
another node sends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import xxhash

from storaged.wire import Buffer

HASH_BYTES: Final = 20
OLD_HASH_BYTES: Final = 16
ANSWER_HASH_BYTES: Final = 16
"""Of what a replica answers instead of a row or a part of a listing."""

_sha256 = hashlib.sha256

_FRAGMENT: Final = hashlib.sha256(b"sov.fragment.v1\0", usedforsecurity=True)
_PAGE: Final = hashlib.sha256(b"sov.page.v1\0", usedforsecurity=True)
_ROW_LABEL: Final = b"sov.row.v1\0"
_LISTED_LABEL: Final = b"sov.listed.v1\0"


def fragment_hash(pieces: Sequence[Buffer]) -> bytes:
    """The hash of a whole fragment, 20 bytes. ``pieces``: its bytes, in order."""
    state = _FRAGMENT.copy()
    for piece in pieces:
        state.update(piece)
    return state.digest()[:HASH_BYTES]


def transfer_checksum(pieces: Sequence[Buffer]) -> bytes:
    """xxh3-64 of a fragment, 8 bytes: detects damage in transfer from a sender that is trusted to have hashed the
    fragment.
    """
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def is_fragment(pieces: Sequence[Buffer], expected: bytes) -> bool:
    """Whether the fragment has this hash, new or old. False for a hash of an unknown kind."""
    if len(expected) == HASH_BYTES:
        return fragment_hash(pieces) == expected
    return len(expected) == OLD_HASH_BYTES and _old(pieces) == expected


def page_hash(body: Buffer) -> bytes:
    """The name of a new manifest page, 20 bytes."""
    state = _PAGE.copy()
    state.update(body)
    return state.digest()[:HASH_BYTES]


def is_page(body: Buffer, name: bytes) -> bool:
    """Whether the page has this name, new or old. False for a name of an unknown kind."""
    if len(name) == HASH_BYTES:
        return page_hash(body) == name
    return is_old(name) and xxhash.xxh3_128_digest(body) == name


def row_hash(row: Buffer) -> bytes:
    """Of a row without its version and its check, 16 bytes. One call: a row is some 600 bytes, and copying the state of
    a hash costs as much as the label.
    """
    return _sha256(_ROW_LABEL + row).digest()[:ANSWER_HASH_BYTES]


def listed_hash(listed: Buffer) -> bytes:
    """Of what a replica would send of a listing, 16 bytes."""
    return _sha256(_LISTED_LABEL + listed).digest()[:ANSWER_HASH_BYTES]


def is_old(name: bytes) -> bool:
    """Whether a hash is of the old kind, for which an attacker can find other bytes."""
    return len(name) == OLD_HASH_BYTES


def _old(pieces: Sequence[Buffer]) -> bytes:
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()
