"""Makes choices out of an input's bytes, so that a target can build something with a structure from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Takes bytes from the front of an input. At the end of it, every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        if self._at >= len(self._data):
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def number(self, below: int) -> int:
        """One byte for up to 256 possibilities, else two."""
        return (self.byte() if below <= 256 else self.byte() << 8 | self.byte()) % below

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def pick(self, values: Sequence[T]) -> T:
        return values[self.number(len(values))]

    def line(self) -> bytes:
        """Up to the next LF, which is taken too."""
        end = self._data.find(b"\n", self._at)
        end = len(self._data) if end < 0 else end
        found, self._at = self._data[self._at : end], end + 1
        return found

    def rest(self) -> bytes:
        found, self._at = self._data[self._at :], len(self._data)
        return found

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)
