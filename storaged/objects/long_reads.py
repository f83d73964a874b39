"""Long downloads of one process: names the data that they read, so that storage nodes keep it."""

from __future__ import annotations

from storaged.clock import Clock
from storaged.objects.records import Version

KEYS_MAX = 20_000
"""Some megabytes. Data of further downloads is not held: they may end early."""


class LongReads:
    """``began`` and ``ended`` are called by each download whose bytes come from disks."""

    def __init__(self, clock: Clock, after_s: float) -> None:
        """For downloads younger than ``after_s`` nothing is held: data stays that long in any case."""
        self._clock = clock
        self._after_s = after_s
        self._reads: dict[object, tuple[float, Version]] = {}

    def began(self, read: object, version: Version) -> None:
        self._reads[read] = self._clock.monotonic(), version

    def ended(self, read: object) -> None:
        self._reads.pop(read, None)

    def keys(self) -> list[bytes]:
        """What storage nodes have to hold now (``maintain.holds``): the data ids of the versions, the id of the upload
        that one comes from, which names the data of all of its parts, and the hashes of their pages. The oldest
        downloads first.
        """
        until, found = self._clock.monotonic() - self._after_s, dict[bytes, None]()
        for began, version in self._reads.values():
            if began > until or len(found) >= KEYS_MAX:
                break
            found[version.context_id] = None
            found.update(dict.fromkeys(part.data_id for part in version.parts))
            found.update(dict.fromkeys(version.pages))
        return list(found)[:KEYS_MAX]
