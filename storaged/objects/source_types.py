"""What a read or a copy reads: part of the port of the object plane (``api``)."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from storaged.objects.condition_types import NO_READ_CONDITIONS, ReadConditions
from storaged.objects.encryption import NO_KEY
from storaged.objects.grant_types import Allowed
from storaged.objects.pending_events import Origin
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


class Renaming(NamedTuple):
    """A rename of the object of the key ``source``. ``token``: the client's; empty: it has none. ``source_allowed``,
    ``allowed``: the objects of the old and of the new key that it was allowed for. ``created``, ``removed``: for the
    events of the new and of the old key.
    """

    source: bytes
    key: bytes
    token: str = ""
    source_conditions: ReadConditions = NO_READ_CONDITIONS
    conditions: ReadConditions = NO_READ_CONDITIONS
    source_allowed: Allowed = None
    allowed: Allowed = None
    created: Origin | None = None
    removed: Origin | None = None
