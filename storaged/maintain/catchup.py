"""Catch-up: brings the registers of a disk that was away to what the others agreed on meanwhile.

The work falls to the first replica of each range that was *not* away: a returning disk does not know what it missed, not even which buckets are new. A node that has just started counts all others as returned, so that
replicas that differ when a whole cluster starts are brought together too.
Slices are compared by digest, so what did not change costs a comparison, not a transfer.
"""

from __future__ import annotations

from storaged.errors import NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.maintain.context import MaintainContext
from storaged.maintain.runner import Job
from storaged.meta.listing import RingScanner
from storaged.meta.names import RegisterName


class CatchUpWork:
    """One round for each set of disks that came back."""

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self._scanner = scanner
        self.job = Job("catch-up", context.clock)
        self.settled = 0

    async def bring_up(self, returned: frozenset[str]) -> bool:
        """False when some range could not be compared (no majority): the caller tries again."""
        ranges = self._ranges(returned)
        self.job.start(len(ranges))
        whole = True
        before = self.settled
        for table, scope, shard in ranges:
            try:
                found = await self._scanner.catch_up(table, scope, shard)
                self.settled += found.settled
            except NoSuchBucket:
                pass  # the bucket is being deleted: its fence lets nothing be settled, and nothing of it will be read
            except (ServiceUnavailable, StoragedError, TimeoutError) as error:
                whole = False
                self._context.log(f"catch-up: {error}")
            self.job.advance()
        self.job.finish("done" if whole else "failed", f"{self.settled - before} registers settled")
        return whole

    def _ranges(self, returned: frozenset[str]) -> list[tuple[int, bytes, int]]:
        layout, liveness = self._context.layouts.current, self._context.liveness
        found = set()
        for disk, store in self._context.local_meta.items():
            if disk in returned:
                continue
            for table, scope, shard in store.scopes():
                replicas = layout.replicas_of(RegisterName(table, scope, shard, b"").partition)
                stayed = [replica for replica in replicas if replica not in returned and liveness.disk_readable(replica)]
                if returned.intersection(replicas) and stayed and stayed[0] == disk:
                    found.add((table, scope, shard))
        return sorted(found)
