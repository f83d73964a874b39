"""Immutable pages of manifests at one acceptor's disk."""

from __future__ import annotations

import asyncio
from functools import partial

from storaged.clock import Clock
from storaged.disk_room import Use
from storaged.errors import DiskUnusable, InvalidRequest
from storaged.hashes import is_old
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.consensus.bounds import check_page, check_pages
from storaged.meta.messages import PageCheck, PageGet, PagePut, PageReply, PagesMissing
from storaged.meta.store_ports import MetaStore, RowDamaged, StoreBatch, StoredPage

PAGES_A_TURN = 16
"""Pages checked in one turn of the event loop, so that other requests are not held up."""


class DiskPages:
    def __init__(self, store: MetaStore, writes: DiskWrites, clock: Clock) -> None:
        self.damaged = 0
        """Pages that were found not to have their hash."""
        self._store = store
        self._writes = writes
        self._clock = clock

    async def put(self, request: PagePut, accepts: int) -> PageReply:
        """``accepts`` that are on their way to the disk."""
        self._writes.check_answers()
        check_page(request)
        if (
            is_old(request.page_hash)
            and (held := await self._page(request.page_hash)) is not None
            and held != request.body
        ):
            # an attacker can find other bytes with the same old hash
            raise InvalidRequest("Another page has this name here.")
        self._writes.check_room(len(request.body), accepts)
        room = self._store.health.room
        if not room.take(len(request.body)) and room.refuses(Use.SETTLING):
            raise DiskUnusable(f"Disk {self._writes.disk} has no room for another page of a manifest.", state="full")
        page = StoredPage(request.page_hash, request.body, self._clock.wall_ms(), request.owner)
        await self._writes.durably(StoreBatch(pages=[page]), size=len(request.body))
        return PageReply()

    async def get(self, request: PageGet) -> PageReply:
        self._writes.check_answers()
        return PageReply(await self._page(request.page_hash))

    async def check(self, request: PageCheck) -> PagesMissing:
        check_pages(request)
        missing = []
        for index, page_hash in enumerate(request.hashes):
            if index % PAGES_A_TURN == 0:
                await asyncio.sleep(0)
                self._writes.check_answers()
            if await self._page(page_hash) is None:
                missing.append(page_hash)
        return PagesMissing(tuple(missing))

    async def _page(self, page_hash: bytes) -> bytes | None:
        try:
            return await self._store.read(partial(self._store.get_page, page_hash))
        except RowDamaged:
            self.damaged += 1
            return None
