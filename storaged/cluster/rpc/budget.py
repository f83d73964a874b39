"""The bytes that a server may hold in flight, for all its connections together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Budget:
    """Bytes that may be in flight. Waiting requests get them in the order of their requests."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._waiting: deque[tuple[int, object, Callable[[int], None]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def _fits(self, size: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + size <= self.limit_bytes

    def try_take(self, size: int) -> bool:
        """Takes ``size`` bytes if they fit and no one waits; one request larger than the budget fits an unused one."""
        if self._waiting or not self._fits(size):
            return False
        self.add(size)
        return True

    def add(self, size: int) -> None:
        """Counts bytes that exist already (a reply), whether or not they fit."""
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def wait(self, size: int, owner: object, on_granted: Callable[[int], None]) -> None:
        """Calls ``on_granted(size)`` once the bytes fit, unless ``forget(owner)`` comes first."""
        self._waiting.append((size, owner, on_granted))

    def forget(self, owner: object) -> None:
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not owner)
        self._wake()

    def release(self, size: int) -> None:
        self.used_bytes -= size
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, _owner, on_granted = self._waiting.popleft()
            self.add(size)
            on_granted(size)
