"""Changes inputs of a corpus at random: the n-th input of a target depends on its name, n and its corpus alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

HOSTILE = (
    b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\x7f", b"\x80", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80",
    b"\xd9\xa3", b"\xe2\x84\xaa", b"\xef\xbf\xbf", b"\xf0\x9f\x92\xa9", b"%00", b"%", b"%zz", b"+", b"-", b"-1", b"0",
    b"1_0", b"2147483648", b"9223372036854775808", b"99999999999999999999", b"1e999", b"9" * 5000, b"NaN", b"'", b'"',
    b"\\", b"\\ud800", b"/", b"..", b",", b";", b":", b"=", b"&", b"*", b"?", b"${", b"}", b"<", b">", b"]]>", b"<!--",
    b"0001-01-01T00:00:00+23:59", b"9999-12-31T23:59:59-23:59", b"[" * 990, b"(" * 200,
    b"\xc1", b"\xdd\xff\xff\xff\xff",
)  # fmt: skip
"""Bytes that parsers are often wrong about."""

CHANGES_MAX = 6


class Mutator:
    """``tokens``: words of the target's language, which are put in as they are."""

    def __init__(self, name: str, seeds: Sequence[bytes], tokens: Sequence[bytes], size_max: int) -> None:
        self._name = name
        self._seeds = [*seeds] or [b""]
        self._tokens = (*tokens, *HOSTILE)
        self._size_max = size_max

    def input(self, number: int) -> bytes:
        """The ``number``-th input: the corpus as it is comes first."""
        if number < len(self._seeds):
            return self._seeds[number]
        rng = random.Random(f"{self._name} {number}")
        return self.changed(rng.choice(self._seeds), rng)

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        for _ in range(rng.randint(1, CHANGES_MAX)):
            data = self._change(data, rng)[: self._size_max]
        return data

    def _change(self, data: bytes, rng: random.Random) -> bytes:
        at = rng.randint(0, len(data))
        size = min(len(data) - at, 1 << rng.randint(0, 6))
        kind = rng.randrange(9)
        if kind <= 1:
            return data[:at] + rng.choice(self._tokens) + data[at:]
        if kind == 2:
            return data[:at] + rng.choice(self._tokens) + data[at + size :]
        if kind == 3:
            return data[:at] + data[at + size :]
        if kind == 4:
            return data[:at] + data[at : at + size] * rng.choice((2, 2, 3, 20)) + data[at + size :]
        if kind == 5 and size:
            return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
        if kind == 6:
            return data[:at] + rng.randbytes(min(size, 4) or 1) + data[at + min(size, 4) :]
        other = rng.choice(self._seeds)
        start = rng.randint(0, len(other))
        piece = other[start : start + (1 << rng.randint(0, 8))]
        if kind == 7:
            return data[:at] + piece + data[at:]
        return data[:at] + other[start:]
