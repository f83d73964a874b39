"""Batches of entries for the disks' garbage lists: all data that was replaced within a moment goes to a disk in one
call.

All of this is best effort: the sweep of orphans finds entries that get lost, for example when this process dies. So no
request waits for it. An entry is due an hour later, so a delay of a tenth of a second does not matter. An overwrite
that made three calls of its own cost half as much again as a PUT of a new key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from storaged.errors import PeerError
from storaged.fragments.ports import RETIREMENTS_MAX, FragmentStores, Retirement
from storaged.objects.background import Background

GATHER_S = 0.1
WAITING_MAX = 8192
"""Entries that wait or are being sent: at 100 bytes and a key each, some megabytes. Further ones are dropped, and
counted.
"""


async def retire_on(stores: FragmentStores, disk: str, entries: Sequence[Retirement], timeout_s: float) -> None:
    """Puts entries on one disk's list, as long as it answers."""
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
    """Collects entries, and sends them in the background, one batch at a time: while a disk does not answer, new
    entries wait. At most ``WAITING_MAX`` entries wait or are being sent.
    """

    def __init__(self, stores: FragmentStores, background: Background, timeout_s: float) -> None:
        self._stores = stores
        self._background = background
        self._timeout_s = timeout_s
        self._waiting: dict[str, list[Retirement]] = {}
        self._held = 0
        """Entries that wait or are being sent."""
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
        finally:  # it is cancelled only when the process stops, and the rest is lost with it
            self._waiting, self._held, self._sending = {}, 0, False
