"""Cells that were found damaged, until their fragments are replaced. Usable from any thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping

HEAD_CELL = -1
"""In place of a cell number: the record's head is damaged, so none of the fragment's cells can be read."""

DAMAGED_FRAGMENTS_MAX = 100_000
"""Beyond that the disk is beyond repair, and every damaged fragment is found again when it is read."""


class DamageList:
    """Packed fragment id -> damaged cells."""

    def __init__(self, known: Mapping[bytes, frozenset[int]]) -> None:
        self._known = dict(known)
        self._dirty: set[bytes] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def add(self, key: bytes, cell: int) -> bool:
        """Returns whether the cell was not known yet, and there was room."""
        with self._lock:
            known = self._known.get(key, frozenset())
            if cell in known or len(self._known) >= DAMAGED_FRAGMENTS_MAX:
                return False
            self._known[key] = known | {cell}
            self._dirty.add(key)
            return True

    def discard(self, key: bytes) -> None:
        """The fragment was replaced or deleted."""
        if key in self._known:
            with self._lock:
                self._known.pop(key, None)
                self._dirty.add(key)

    def clear(self) -> None:
        """Forgets everything, so that it is found and reported again."""
        self._known.clear()

    def take_changes(self) -> dict[bytes, frozenset[int]]:
        """What changed since the last call, for a checkpoint; no cells for a fragment that is not damaged any more."""
        with self._lock:
            changes = {key: self._known.get(key, frozenset()) for key in self._dirty}
            self._dirty = set()
            return changes
