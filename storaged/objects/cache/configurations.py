"""The configurations of buckets, opened and decoded: a gateway opens the sealed field of a record once, not for each
request.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from storaged.errors import DataDamaged
from storaged.objects.configuration import document, kinds
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.ports import KeyService, SealBroken
from storaged.objects.records import BucketRecord
from storaged.wire import decode


class Configurations:
    """By bucket; the latest that was asked for. ``bytes_max``: of sealed bytes."""

    def __init__(self, keys: KeyService, bytes_max: int) -> None:
        self._keys = keys
        self._bytes_max = bytes_max
        self._bytes = 0
        self._opened: OrderedDict[bytes, tuple[bytes, Configuration]] = OrderedDict()
        """Bucket id -> the sealed field, and what it opened to."""

    def of(self, record: BucketRecord) -> Configuration:
        """Raises DataDamaged, KeyringUnavailable, ServiceUnavailable (a newer version wrote it)."""
        sealed = record.configuration
        if not sealed:
            return NOTHING if not record.tags else self._of_old(record)
        held = self._opened.get(record.id)
        if held is not None and held[0] == sealed:
            return held[1]
        try:
            data = self._keys.open_secret(sealed, _context(record.id))
        except SealBroken as error:
            raise DataDamaged(f"The configuration of this bucket does not open: {error}") from None
        found = document.unpacked(data, kinds.KINDS)
        self._keep(record.id, sealed, found)
        return found

    def _keep(self, bucket_id: bytes, sealed: bytes, found: Configuration) -> None:
        before = self._opened.pop(bucket_id, None)
        self._bytes += len(sealed) - (len(before[0]) if before is not None else 0)
        self._opened[bucket_id] = sealed, found
        while self._bytes > self._bytes_max:
            _, (dropped, _) = self._opened.popitem(last=False)
            self._bytes -= len(dropped)

    def _of_old(self, record: BucketRecord) -> Configuration:
        """Version 0.1.0 kept tags in a field of their own, and had no other configuration."""
        try:
            tags = decode(self._keys.open_secret(record.tags, (b"bucket tags", record.id)), dict[str, str])
        except (SealBroken, msgspec.MsgspecError) as error:
            raise DataDamaged(f"The tags of this bucket do not open: {error}") from None
        return NOTHING.having(kinds.TAGGING, kinds.Tags(tags))

    def put(self, record: BucketRecord, configuration: Configuration) -> BucketRecord:
        """The record with this configuration."""
        data = document.packed(configuration)
        return msgspec.structs.replace(
            record,
            configuration=self._keys.seal_secret(data, _context(record.id)) if data else b"",
            plain=configuration.is_plain(kinds.KINDS),
            tags=b"",
        )


def _context(bucket_id: bytes) -> tuple[bytes, ...]:
    return (b"bucket configuration", bucket_id)
