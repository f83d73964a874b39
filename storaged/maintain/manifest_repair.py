"""Pages of manifests on the replicas that should have them: all replicas of the register whose record names them.

A page that was written while a replica was away, or that a replica has damaged or never had since its disk was
replaced, is put there from another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from storaged.errors import PeerError, StoragedError
from storaged.maintain.context import MaintainContext
from storaged.maintain.health import Tally
from storaged.meta.messages import PAGES_A_CHECK
from storaged.meta.names import RegisterName, Value, Visibility
from storaged.objects.code.manifest import PAGES_MAX
from storaged.objects.write.references import versions_in


class PagesOf(NamedTuple):
    """The pages that one register's record names."""

    tally: Tally
    partition: int
    hashes: tuple[bytes, ...]


class Holders(NamedTuple):
    """Of one page: disks that have it and disks that don't, of those that answer."""

    have: tuple[str, ...]
    lacking: tuple[str, ...]


def pages_in(name: RegisterName, value: Value | None) -> tuple[bytes, ...]:
    """All pages that an object, or an upload that is being completed, needs; as many of each version as one can have.
    Raises DataDamaged.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE:
        return ()
    return tuple(
        dict.fromkeys(page for version in versions_in(value.body, name.table) for page in version.pages[:PAGES_MAX])
    )


class PageKeeper:
    """Asks the replicas, and copies. ``unanswered`` counts calls that failed although their disk is thought to be
    there.
    """

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self.unanswered = 0
        self.copied = 0

    async def weigh(self, registers: Iterable[PagesOf]) -> None:
        """Adds to each tally what its pages lack. One call a disk for up to ``PAGES_A_CHECK`` pages of all registers
        together.
        """
        by_partition: dict[int, list[PagesOf]] = {}
        for one in registers:
            by_partition.setdefault(one.partition, []).append(one)
        for partition, some in by_partition.items():
            holders = await self._holders(partition, list(dict.fromkeys(page for one in some for page in one.hashes)))
            for one in some:
                for page in one.hashes:
                    one.tally.page(len(holders[page].have), len(holders[page].lacking))

    async def mend(self, name: RegisterName, value: Value | None) -> None:
        """Puts every page where it lacks, and can be had. All are tried; then the first failure is raised
        (StoragedError, TimeoutError).
        """
        hashes = pages_in(name, value)
        failure: Exception | None = None
        for page, holders in (await self._holders(name.partition, hashes)).items():
            for disk in holders.lacking if holders.have else ():
                try:
                    async with asyncio.timeout(self._context.limits.call_timeout_s):
                        await self._context.pages.copy_page(name, page, disk)
                    self.copied += 1
                except (StoragedError, TimeoutError) as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    async def _holders(self, partition: int, hashes: Sequence[bytes]) -> dict[bytes, Holders]:
        disks = filter(self._context.liveness.disk_readable, self._context.layouts.current.replicas_of(partition))
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
