"""Data ids that the collector of one disk is about to delete there: the *condemned*.

Theory of operation. Between the look at a register and the deletion a writer may come that wants to refer to the data.
So the collector condemns a data id before it looks. A write, sync or touch of a fragment of the data id on this disk
pardons it, and so does a small copy that is kept here. Only what is still condemned is deleted.

A writer of coded data has its fragments synced, or touches them, after its promise and before its accept. Then either
the collector condemned before that: the writer pardons the data, or finds that it is gone and accepts nothing. Or the
collector condemned after that, so after the promise. Then the round that it waits for ends the promise
(``maintain.disuse``).

All this is in memory. What a restart forgets is not deleted.

The event loop condemns and pardons, the writer thread takes. Each removes the data id by one operation on a dict, so
that exactly one of them gets it.
"""

from __future__ import annotations

from collections.abc import Iterable

DATA_ID_BYTES = 16


class Condemned:
    __slots__ = ("_condemned", "_going")

    def __init__(self) -> None:
        self._condemned: dict[bytes, None] = {}
        self._going: dict[bytes, None] = {}
        """What the writer thread is deleting."""

    def add(self, data_ids: Iterable[bytes]) -> None:
        for data_id in data_ids:
            self._condemned[data_id] = None

    def pardon(self, keys: Iterable[bytes]) -> bool:
        """``keys``: data ids, or packed fragment ids, which begin with one. False: one of them may be on its way out,
        and what the index says of it counts only after the writer thread had its turn.
        """
        if not self._condemned and not self._going:
            return True
        data_ids = {key[:DATA_ID_BYTES] for key in keys}
        for data_id in data_ids:
            self._condemned.pop(data_id, None)
        return self._going.keys().isdisjoint(data_ids)

    def take(self, data_ids: Iterable[bytes]) -> set[bytes]:
        """Those that are still condemned. They are on their way out until ``gone``. In the writer thread."""
        taken: set[bytes] = set()
        for data_id in data_ids:
            self._going[data_id] = None
            if self._condemned.pop(data_id, data_id) is None:
                taken.add(data_id)
            else:
                self._going.pop(data_id, None)
        return taken

    def gone(self, data_ids: Iterable[bytes]) -> None:
        """They were deleted, or could not be. In the writer thread."""
        for data_id in data_ids:
            self._going.pop(data_id, None)

    def __len__(self) -> int:
        return len(self._condemned)
