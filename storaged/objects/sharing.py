"""What the records of two keys say of each other: one lends data to the other (``write.loans``), or becomes the other
(``write.departures``). Pure.
"""

from __future__ import annotations

from storaged.wire import Message


class Borrower(Message, frozen=True):
    """A version of the S3 key ``key`` that has no data of its own. ``id``: 16 random bytes of the copy that made it.
    ``ending``: random, of the request that looks whether the version is gone; empty: none does. ``scope``, ``shard``:
    of its register, if that is in another bucket; empty: it is in the bucket of the record that lends.
    """

    id: bytes
    key: bytes
    since_ms: int
    ending: bytes = b""
    scope: bytes = b""
    shard: int = 0


class Borrowed(Message, frozen=True):
    """Where a version without data of its own has it: the ``Borrower`` with this ``id`` in the record of ``key``.
    ``scope``, ``shard``: of that record's register, if it is in another bucket; ``bucket``: the name that this had.
    """

    key: bytes
    id: bytes
    scope: bytes = b""
    shard: int = 0
    bucket: str = ""


class Departure(Message, frozen=True):
    """The null version of a key is being renamed: it becomes the version of the S3 key ``key`` of the same bucket that
    has this ``id`` (``write.departures``). ``since_ms``, ``ending``: as of a Borrower.
    """

    id: bytes
    key: bytes
    since_ms: int
    ending: bytes = b""


class Arrival(Message, frozen=True):
    """A version has come from the S3 key ``key`` of the same bucket, whose record may have the ``Departure`` with this
    ``id`` still. It stays when the version is replaced or removed.
    """

    id: bytes
    key: bytes
