"""Every digest that can be computed from content, in every form in which a program would write it; and how to search
for them.

A digest of four bytes turns up in random data by chance: once in four searches of a GiB. So bodies are planted as
siblings, four of a kind, and such a needle counts only when those of three siblings are found: a field that leaks one
leaks all. Longer needles count alone.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import xxhash
from awscrt import checksums as crt

DIGESTS: Mapping[str, Callable[[bytes], bytes]] = {
    "MD5": lambda data: hashlib.md5(data).digest(),
    "SHA1": lambda data: hashlib.sha1(data).digest(),
    "SHA256": lambda data: hashlib.sha256(data).digest(),
    "SHA512": lambda data: hashlib.sha512(data).digest(),
    "CRC32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "CRC32C": lambda data: crt.crc32c(data).to_bytes(4, "big"),
    "CRC64NVME": lambda data: crt.crc64nvme(data).to_bytes(8, "big"),
    "XXHASH64": xxhash.xxh64_digest,
    "XXHASH3": xxhash.xxh3_64_digest,
    "XXHASH128": xxhash.xxh3_128_digest,
}

SIBLINGS = 4
SIBLINGS_FOUND_MIN = 3
CHANCE_BYTES_MAX = 4
"""Needles of so few bytes are found by chance."""
NUMBER_BYTES_MAX = 8
WORD_BYTES, LONG_WORD_BYTES = 4, 8
CODES = {WORD_BYTES: "I", LONG_WORD_BYTES: "Q"}
"""Of ``array``."""


class Needle(NamedTuple):
    """``what`` is the same for siblings: algorithm, form and kind of body."""

    what: str
    sibling: int
    data: bytes


def forms(what: str, sibling: int, data: bytes) -> list[Needle]:
    """Raw, hexadecimal in both cases, base64 without its padding; of what may be a number also with
    its bytes reversed.
    """
    found = {
        "raw": data,
        "hex": data.hex().encode(),
        "HEX": data.hex().upper().encode(),
        "base64": base64.b64encode(data).rstrip(b"="),
    }
    if len(data) <= NUMBER_BYTES_MAX:
        found["reversed"] = data[::-1]
    return [Needle(f"{what}, {form}", sibling, data) for form, data in found.items()]


def of_body(kind: str, sibling: int, body: bytes, *, short_alone: bool = False) -> list[Needle]:
    """``short_alone``: only what is found by chance, for the further siblings of a body that is
    stored in the same way.
    """
    found = [needle for name, digest in DIGESTS.items() for needle in forms(f"{name} of {kind}", sibling, digest(body))]
    return [needle for needle in found if len(needle.data) <= CHANCE_BYTES_MAX] if short_alone else found


def of_parts(
    kind: str, sibling: int, bodies: Sequence[bytes], algorithm: str, *, short_alone: bool = False
) -> list[Needle]:
    """Of an upload: its parts, their whole, and the checksums of its parts' checksums (of MD5: its ETag).
    ``algorithm``: that it was created for, looked for in any case."""
    found = []
    named = {
        f"{kind}, whole": b"".join(bodies),
        **{f"{kind}, part {number}": body for number, body in enumerate(bodies, 1)},
    }
    for name, digest in DIGESTS.items():
        needles = [
            needle for what, body in named.items() for needle in forms(f"{name} of {what}", sibling, digest(body))
        ]
        needles += forms(f"composite {name} of {kind}", sibling, digest(b"".join(map(digest, bodies))))
        if short_alone and name not in ("MD5", algorithm):
            needles = [needle for needle in needles if len(needle.data) <= CHANCE_BYTES_MAX]
        found += needles
    return found


def of_request(kind: str, sibling: int, bodies: Sequence[bytes]) -> list[Needle]:
    """The digest of a Complete that names these parts, as it once was stored."""
    parts = [(number, hashlib.md5(body).hexdigest(), []) for number, body in enumerate(bodies, 1)]
    return forms(f"request for {kind}", sibling, hashlib.sha256(msgspec.msgpack.encode([parts, [], "", None])).digest())


class Search:
    """Takes data piece by piece; says which needles count as found.

    Hundreds of needles are looked for in hundreds of MiB, so all are looked for at once. Wherever a needle lies, one of
    its words lies whole at a multiple of the words' size: data that has none of its words has no such needle. The few
    needles that are left are searched for byte by byte.
    """

    def __init__(self, needles: Iterable[Needle]) -> None:
        self._needles = list(needles)
        self._found: dict[str, set[int]] = defaultdict(set)
        self._short = {needle.what for needle in self._needles if len(needle.data) <= CHANCE_BYTES_MAX}
        self._words: dict[int, dict[int, list[int]]] = {
            WORD_BYTES: defaultdict(list),
            LONG_WORD_BYTES: defaultdict(list),
        }
        """The numbers of the needles by their words, for each size of words."""
        self._shifts = {WORD_BYTES: 1, LONG_WORD_BYTES: 1}
        """In how many alignments the data is looked at: needles with less than twice a word's bytes need more."""
        for number, needle in enumerate(self._needles):
            self._add(number, needle.data)
        self._wanted = {size: frozenset(words) for size, words in self._words.items()}
        self.searched = 0

    def _add(self, number: int, data: bytes) -> None:
        assert len(data) >= WORD_BYTES
        size = LONG_WORD_BYTES if len(data) >= 2 * LONG_WORD_BYTES - 1 else WORD_BYTES
        starts = min(len(data) - size + 1, size)
        self._shifts[size] = max(self._shifts[size], size - starts + 1)
        for start in range(starts):
            self._words[size][int.from_bytes(data[start : start + size], sys.byteorder)].append(number)

    def look(self, data: bytes) -> None:
        self.searched += len(data)
        view, possible = memoryview(data), set[int]()
        for size, words in self._words.items():
            for shift in range(self._shifts[size] if words else 0):
                end = shift + max(0, len(data) - shift) // size * size
                there = array(CODES[size])
                there.frombytes(view[shift:end])
                for word in self._wanted[size].intersection(there):
                    possible.update(words[word])
        for number in possible:
            what, sibling, needle = self._needles[number]
            if sibling not in self._found[what] and needle in data:
                self._found[what].add(sibling)

    @property
    def hits(self) -> list[str]:
        return sorted(
            what
            for what, found in self._found.items()
            if len(found) >= (SIBLINGS_FOUND_MIN if what in self._short else 1)
        )
