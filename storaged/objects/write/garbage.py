"""The way to the disks' garbage lists: whatever is replaced or left over within a moment goes to a disk in one call.

All of it is best effort: what is lost on the way, be it that this process dies, the sweep of orphans finds. So nobody
waits for it, and since an entry is due an hour
later, a tenth of a second is nothing. An overwrite that made three calls of its own cost half as much again as a PUT of
a new key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from storaged.errors import PeerError
from storaged.fragments.ports import RETIREMENTS_MAX, FragmentStores, Retirement
from storaged.objects.background import Background

GATHER_S = 0.1
WAITING_MAX = 8192
"""Entries gathered or on their way: at 100 bytes and a key each, some megabytes. More are dropped, and counted."""


async def retire_on(stores: FragmentStores, disk: str, entries: Sequence[Retirement], timeout_s: float) -> None:
    """Puts entries on one disk's list, as far as it answers."""
    for start in range(0, len(entries), RETIREMENTS_MAX):
        try:
            async with asyncio.timeout(timeout_s):
                await stores.store(disk).retire(entries[start : start + RETIREMENTS_MAX])
        except (PeerError, TimeoutError):
            return


async def retire_all(stores: FragmentStores, by_disk: Mapping[str, Sequence[Retirement]], timeout_s: float) -> None:
    """All disks at once."""
    await asyncio.gather(*(retire_on(stores, disk, entries, timeout_s) for disk, entries in by_disk.items()))


class Garbage:
    """Gathers entries, and sends them in the background: one batch at a time, so that a disk that does not answer holds
    back what is gathered meanwhile, and what
    is gathered and on its way is ``WAITING_MAX`` at most."""

    def __init__(self, stores: FragmentStores, background: Background, timeout_s: float) -> None:
        self._stores = stores
        self._background = background
        self._timeout_s = timeout_s
        self._waiting: dict[str, list[Retirement]] = {}
        self._held = 0
        """Entries that wait or are on their way."""
        self._sending = False

    def add(self, disk: str, entry: Retirement) -> None:
        if self._held >= WAITING_MAX:
            self._background.drop()
            return
        if not self._sending:
            if not self._background.spawn(self._send()):
                return
            self._sending = True
        self._waiting.setdefault(disk, []).append(entry)
        self._held += 1

    async def _send(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(GATHER_S)
                batch, self._waiting = self._waiting, {}
                await retire_all(self._stores, batch, self._timeout_s)
                self._held -= sum(map(len, batch.values()))
        finally:  # when it is ended, what is left is lost with the process
            self._waiting, self._held, self._sending = {}, 0, False
