"""The public part of a bucket's record: the fields that nodes without keys act on, signed so that they can verify them.
Pure.

A storage node places fragments by a bucket's countries, and finds its rows by its shards. It has no keyring, so it
can't verify the authenticator of the record. It verifies this signature instead (``cluster.signers``) and places
nothing for a bucket whose record fails. The signature also covers the register's name and sequence number, so that
neither another bucket's record nor an older one can replace a newer one.
"""

from __future__ import annotations

from storaged.objects.records import BucketRecord
from storaged.wire import Message, encode

BUCKET_LABEL = b"sov.bucket.v1\0"


class PublicBucket(Message, frozen=True):
    """The signed fields, after the label. ``sequence`` is the register's; ``shards``: the numbers, one byte each, also
    when the record lists none.
    """

    cluster: str
    name: str
    sequence: int
    id: bytes
    owner: str
    state: str
    shards: bytes
    countries: tuple[str, ...]
    profile: str


def public_bytes(cluster: str, sequence: int, record: BucketRecord) -> bytes:
    """The bytes that the signature of a bucket's record covers."""
    return BUCKET_LABEL + encode(
        PublicBucket(
            cluster,
            record.name,
            sequence,
            record.id,
            record.owner,
            record.state,
            record.shard_numbers,
            record.countries,
            record.profile,
        )
    )
