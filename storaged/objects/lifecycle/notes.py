"""Notes of changes for lifecycle, in memory: one for a key and a day."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from storaged.errors import StoragedError
from storaged.objects.background import Counters
from storaged.objects.cache.configurations import Configurations
from storaged.objects.code.lifecycle import Subject, due_day, first_look, rules_of
from storaged.objects.configuration.kinds import VERSIONING
from storaged.objects.records import BucketRecord

NOTES_MAX = 100_000
"""In one process: with keys of 60 bytes some 20 MB. Further ones are dropped and counted; the next walk finds them."""


class Notes:
    """The notes of one process, until ``take`` returns them to be written."""

    def __init__(self, configurations: Configurations, counters: Counters, day_ms: int) -> None:
        self._configurations = configurations
        self._counters = counters
        self._day_ms = day_ms
        self._noted: dict[bytes, tuple[BucketRecord, dict[int, set[bytes]]]] = {}
        self.count = 0
        self.writing = asyncio.Lock()
        """Held while what was taken is written."""

    def changed(
        self,
        bucket: BucketRecord,
        key: bytes,
        size: int,
        modified_ms: int,
        tags: Mapping[str, str],
        *,
        is_marker: bool = False,
    ) -> None:
        """A committed change made this the newest version of a key. Callers ask ``bucket.plain`` first. It does not
        raise.
        """
        try:
            configuration = self._configurations.of(bucket)
            rules = configuration.derive(rules_of)
            if not rules.prefixes:
                return
            day = first_look(
                rules,
                Subject(key, size, modified_ms, lambda: tags),
                is_marker=is_marker,
                versioned=configuration.get(VERSIONING) is not None,
                day_ms=self._day_ms,
            )
        except StoragedError:
            self._counters.lifecycle_notes_lost += 1
            return
        if day is not None:
            self.add(bucket, key, day)

    def look_soon(self, bucket: BucketRecord, key: bytes, now_ms: int) -> None:
        """A committed change of older versions, of tags or of a lock: the look on the next day says what follows from
        it. It does not raise.
        """
        try:
            prefixes = self._configurations.of(bucket).derive(rules_of).prefixes
        except StoragedError:
            self._counters.lifecycle_notes_lost += 1
            return
        if any(map(key.startswith, prefixes)):
            self.add(bucket, key, due_day(now_ms, 0, self._day_ms))

    def add(self, bucket: BucketRecord, key: bytes, day: int) -> None:
        if self.count >= NOTES_MAX:
            self._counters.lifecycle_notes_lost += 1
            return
        _, days = self._noted.setdefault(bucket.id, (bucket, {}))
        keys = days.setdefault(day, set())
        self.count -= len(keys)
        keys.add(key)
        self.count += len(keys)

    def take(self, bucket_id: bytes | None = None) -> list[tuple[BucketRecord, int, list[bytes]]]:
        """(bucket, day, keys) of all that is noted, or of one bucket; it is noted no more."""
        wanted = list(self._noted) if bucket_id is None else [bucket_id] if bucket_id in self._noted else []
        found = []
        for one in wanted:
            bucket, days = self._noted.pop(one)
            for day, keys in days.items():
                self.count -= len(keys)
                found.append((bucket, day, sorted(keys)))
        return found
