"""Buckets that a replica reports as fenced: their cached records may be those of deleted buckets.

Theory of operation
    A gateway caches a bucket's record for a second. Meanwhile another gateway may delete the bucket, create one of the
    same name, and acknowledge objects in it. This gateway gets no message about it, but every quorum of the old bucket
    knows: a bucket is deleted only when a majority of each of its shards is fenced. So every read, list or change of
    the old bucket that reaches a majority meets the fence, and the answer reports it. A key that then seems to be
    missing is looked for once more, in the bucket that has the name now (``s3.bucket_retry``). A bucket that is in use
    pays nothing for this.
"""

from __future__ import annotations

from collections import OrderedDict

from storaged.clock import Clock

FENCED_MAX = 4_096
"""Buckets in the table; the least recently seen are dropped."""


class FencedBuckets:
    """By bucket id. A bucket that is not empty becomes active again and keeps its fence for a while: ``lingers``."""

    def __init__(self, clock: Clock, lingers_s: float) -> None:
        self._clock = clock
        self._lingers_s = lingers_s
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        """Bucket id -> number of its last sighting."""
        self._lingering: OrderedDict[bytes, float] = OrderedDict()
        self.count = 0
        """Sightings so far."""

    def note_fenced(self, bucket_id: bytes) -> bool:
        """Notes a sighting. True when it is the first: then the bucket's record must be dropped from the cache."""
        if self._clock.monotonic() < self._lingering.get(bucket_id, 0.0):
            return False
        self.count += 1
        news = bucket_id not in self._seen
        self._seen[bucket_id] = self.count
        _bound(self._seen)
        return news

    def is_fenced(self, bucket_id: bytes) -> bool:
        """Whether the bucket's record must be read again before a key is reported as missing."""
        return bucket_id in self._seen

    def note_active(self, bucket_id: bytes, since: int, *, lingers: bool) -> None:
        """The bucket is active according to a record that was requested when ``count`` was ``since``. ``lingers``: its
        fence may still be there.
        """
        if self._seen.get(bucket_id, since + 1) <= since:
            del self._seen[bucket_id]
        if lingers:
            self._lingering[bucket_id] = self._clock.monotonic() + self._lingers_s
            _bound(self._lingering)


def _bound(entries: OrderedDict[bytes, int] | OrderedDict[bytes, float]) -> None:
    if len(entries) > FENCED_MAX:
        entries.popitem(last=False)
