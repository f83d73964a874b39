"""The small copies of one disk of a run."""

from __future__ import annotations

import asyncio

from storaged.errors import DiskUnusable
from storaged.meta.store_ports import Copy


class PayloadDisk:
    """Small copies of one disk: durable once synced. Of these some are ``lost`` since; some are ``unreadable``, and a
    read fails after so many seconds; and some come ``late`` by so many.
    """

    def __init__(self) -> None:
        self.synced: dict[bytes, bytes] = {}
        self.lost: set[bytes] = set()
        self.unreadable: dict[bytes, float] = {}
        self.late: dict[bytes, float] = {}

    def stored(self, data_id: bytes, content: bytes) -> None:
        self.synced[data_id] = content
        self.lost.discard(data_id)
        self.unreadable.pop(data_id, None)

    def holds(self, data_id: bytes, _was_durable: bool) -> bool:
        return data_id in self.synced and data_id not in self.lost

    async def load(self, data_id: bytes) -> Copy | None:
        if data_id in self.late:
            await asyncio.sleep(self.late[data_id])
        if data_id in self.unreadable:
            await asyncio.sleep(self.unreadable[data_id])
            raise DiskUnusable("a read of the copy failed")
        return Copy(data_id, memoryview(self.synced[data_id])) if self.holds(data_id, True) else None
