"""Which buckets a replica has called fenced: their records, as this gateway remembers them, may be those of buckets
that are gone.

Theory of operation. A bucket's record is remembered for a second. Meanwhile another gateway may delete the bucket,
make one of the same name, and acknowledge objects in it. This gateway gets no message of it, but every replica of the
old
bucket that counts does: no bucket is deleted before a majority of each of its shards is fenced, so every read, list
or change of it that reaches a majority meets the fence, and its answer says so. What then seems not to be there is
looked for once more, in the bucket that has the name now (``s3.bucket_retry``). That costs a bucket that is in use
nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from storaged.clock import Clock

FENCED_MAX = 4_096
"""Buckets that are remembered; the least lately seen are forgotten."""


class FencedBuckets:
    """By bucket id. A bucket that is not empty comes back, with its fence for a while: ``lingers``."""

    def __init__(self, clock: Clock, lingers_s: float) -> None:
        self._clock = clock
        self._lingers_s = lingers_s
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        """With the number of the sighting."""
        self._lingering: OrderedDict[bytes, float] = OrderedDict()
        self.count = 0
        """Sightings so far."""

    def saw(self, bucket_id: bytes) -> bool:
        """Whether it is news, and its record is to be forgotten."""
        if self._clock.monotonic() < self._lingering.get(bucket_id, 0.0):
            return False
        self.count += 1
        news = bucket_id not in self._seen
        self._seen[bucket_id] = self.count
        _bound(self._seen)
        return news

    def gone(self, bucket_id: bytes) -> bool:
        """Whether its record is to be read anew before anything is said to be missing."""
        return bucket_id in self._seen

    def read_anew(self, bucket_id: bytes, since: int, *, lingers: bool) -> None:
        """The bucket is active by a record that was asked for when ``count`` was ``since``. ``lingers``: its fence
        may still be there."""
        if self._seen.get(bucket_id, since + 1) <= since:
            del self._seen[bucket_id]
        if lingers:
            self._lingering[bucket_id] = self._clock.monotonic() + self._lingers_s
            _bound(self._lingering)


def _bound(entries: OrderedDict[bytes, int] | OrderedDict[bytes, float]) -> None:
    if len(entries) > FENCED_MAX:
        entries.popitem(last=False)
