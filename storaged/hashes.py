"""Hashes of sealed bytes that guard against liars: of fragments, and of manifest pages. Unkeyed, for nodes without
keys must be able to check them.

Each is SHA-256 over a label, a zero byte and the bytes, cut to 20 bytes: finding other bytes for a given hash costs
2^160 steps, which no node has. SHA-256 because processors have instructions for it (1 to 1.7 GB/s a core; BLAKE2b 0.5
to 0.9: benches/hashes.py); 20 bytes because every fragment carries the hashes of all fragments of its block. The
labels keep a fragment from being taken for a page.

Before there were these, xxh3-128 stood in their place, for which other bytes are found in a tenth of a second. Its 16
bytes tell it apart: what was written under it is still checked by it, and nothing new is. Bit rot is found by xxh3-64
of each cell and row, which is forty times as fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import xxhash

from storaged.wire import Buffer

HASH_BYTES: Final = 20
OLD_HASH_BYTES: Final = 16

_FRAGMENT: Final = hashlib.sha256(b"sov.fragment.v1\0", usedforsecurity=True)
_PAGE: Final = hashlib.sha256(b"sov.page.v1\0", usedforsecurity=True)


def fragment_hash(pieces: Sequence[Buffer]) -> bytes:
    """Of a whole fragment, 20 bytes. ``pieces``: its bytes, in order."""
    state = _FRAGMENT.copy()
    for piece in pieces:
        state.update(piece)
    return state.digest()[:HASH_BYTES]


def quick_check(pieces: Sequence[Buffer]) -> bytes:
    """xxh3-64 of a fragment, 8 bytes: whether it came as it was sent, by a sender who is believed to have hashed it."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def is_fragment(pieces: Sequence[Buffer], expected: bytes) -> bool:
    """Whether the fragment has this hash, of whichever kind it is. False for one of an unknown kind."""
    if len(expected) == HASH_BYTES:
        return fragment_hash(pieces) == expected
    return len(expected) == OLD_HASH_BYTES and _old(pieces) == expected


def page_hash(body: Buffer) -> bytes:
    """The name of a new manifest page, 20 bytes."""
    state = _PAGE.copy()
    state.update(body)
    return state.digest()[:HASH_BYTES]


def is_page(body: Buffer, name: bytes) -> bool:
    """Whether the page has this name, of whichever kind it is. False for one of an unknown kind."""
    if len(name) == HASH_BYTES:
        return page_hash(body) == name
    return is_old(name) and xxhash.xxh3_128_digest(body) == name


def is_old(name: bytes) -> bool:
    """Whether a hash is of the kind that a liar can find other bytes for."""
    return len(name) == OLD_HASH_BYTES


def _old(pieces: Sequence[Buffer]) -> bytes:
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()
