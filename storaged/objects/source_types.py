"""What a read or a copy reads: part of the port of the object plane (``api``)."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from storaged.objects.condition_types import NO_READ_CONDITIONS, ReadConditions
from storaged.objects.encryption import NO_KEY
from storaged.objects.grant_types import Allowed
from storaged.objects.records import BucketRecord


class RangeSpec(Struct, frozen=True):
    """A parsed Range. ``bytes=first-last`` has both, ``bytes=first-`` no ``last``, ``bytes=-suffix`` no ``first``."""

    first: int | None
    last: int | None


class CopySource(NamedTuple):
    """The version that a copy reads, or a range of it. ``allowed``: the object that may be copied."""

    bucket: BucketRecord
    key: bytes
    version_id: str = ""
    conditions: ReadConditions = NO_READ_CONDITIONS
    span: RangeSpec | None = None
    customer_key: bytes = NO_KEY
    allowed: Allowed = None
