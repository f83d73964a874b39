"""Repair of pages, of manifests and of older versions: every replica of the register whose record needs one should have
it.

A replica may lack a page because it was away when the page was written, because its copy is damaged, or because its
disk was replaced. It gets the page from another replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from storaged.errors import DataDamaged, PeerError, StoragedError
from storaged.maintain.context import MaintainContext
from storaged.maintain.health import Tally
from storaged.meta.messages import PAGES_A_CHECK
from storaged.meta.names import RegisterName, Value
from storaged.objects.code.version_walk import OnUnreadable
from storaged.objects.write.references import pages_in


class PagesOf(NamedTuple):
    """The pages that one register's record names."""

    tally: Tally
    partition: int
    hashes: tuple[bytes, ...]


class Holders(NamedTuple):
    """The disks that answer, of the replicas of one page: those that have it, and those that don't."""

    have: tuple[str, ...]
    lacking: tuple[str, ...]


async def pages_of(
    context: MaintainContext, name: RegisterName, value: Value | None, *, on_unreadable: OnUnreadable
) -> tuple[bytes, ...]:
    """All pages that an object, or an upload that is being completed, needs, as far as they can be read. Raises
    DataDamaged.
    """
    found = pages_in(context.pages, name, value, on_unreadable=on_unreadable)
    return tuple(dict.fromkeys([page async for page in found]))


class PageRepair:
    """Asks the replicas, and copies pages. ``unanswered`` counts calls that failed although the disk is thought to
    answer.
    """

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self.unanswered = 0
        self.copied = 0

    async def judge(self, registers: Iterable[PagesOf]) -> None:
        """Adds to each tally what its pages lack. Makes one call to a disk for up to ``PAGES_A_CHECK`` pages of all
        registers together.
        """
        by_partition: dict[int, list[PagesOf]] = {}
        for one in registers:
            by_partition.setdefault(one.partition, []).append(one)
        for partition, some in by_partition.items():
            replicas = self._context.layouts.partition(partition).present
            holders = await self._holders(replicas, list(dict.fromkeys(page for one in some for page in one.hashes)))
            for one in some:
                for page in one.hashes:
                    one.tally.add_page(len(holders[page].have), len(holders[page].lacking))

    async def repair(self, name: RegisterName, value: Value | None) -> None:
        """Copies every page that a replica lacks and another one has. Tries all; then raises the first failure
        (StoragedError, TimeoutError).
        """
        unreadable: list[DataDamaged] = []
        hashes = await pages_of(self._context, name, value, on_unreadable=unreadable.append)
        failure: Exception | None = unreadable[0] if unreadable else None
        replicas = self._context.layouts.partition(name.partition).disks
        for page, holders in (await self._holders(replicas, hashes)).items():
            for disk in holders.lacking if holders.have else ():
                try:
                    async with asyncio.timeout(self._context.limits.call_timeout_s):
                        await self._context.pages.copy_page(name, page, disk)
                    self.copied += 1
                except (StoragedError, TimeoutError) as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    async def _holders(self, replicas: Sequence[str], hashes: Sequence[bytes]) -> dict[bytes, Holders]:
        disks = filter(self._context.liveness.disk_readable, replicas)
        answers = await asyncio.gather(*(self._lacking(disk, hashes) for disk in disks)) if hashes else []
        answered = [answer for answer in answers if answer is not None]
        return {
            page: Holders(
                tuple(disk for disk, lacking in answered if page not in lacking),
                tuple(disk for disk, lacking in answered if page in lacking),
            )
            for page in hashes
        }

    async def _lacking(self, disk: str, hashes: Sequence[bytes]) -> tuple[str, frozenset[bytes]] | None:
        """None when the disk does not answer."""
        lacking: set[bytes] = set()
        try:
            for start in range(0, len(hashes), PAGES_A_CHECK):
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    lacking.update(await self._context.pages.pages_missing(disk, hashes[start : start + PAGES_A_CHECK]))
        except (PeerError, TimeoutError):
            self.unanswered += 1
            return None
        return disk, frozenset(lacking)
