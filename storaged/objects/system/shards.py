"""Chooses the index shards of a new bucket. Pure except for the random ids that it is given.

Theory of operation
    A register's replicas follow from the bucket's id and the shard's number, so the registers of a bucket with
    countries lie inside these countries only when its shards' partitions do. A shard's number is one byte. Of the 256
    numbers, the record lists up to 16 whose partitions lie inside, and keys are spread over these. When the ring has
    few such partitions an id may have fewer than 16 such shards; then other ids are tried, and the best of them is
    taken. One shard is enough for a bucket to work: it is then as fast as the three disks of one partition. A bucket
    without countries has the first 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from storaged.cluster.layout import PARTITIONS, SHARDS_DEFAULT, Layout, partition_of
from storaged.cluster.ports import Layouts
from storaged.errors import ServiceUnavailable

SHARD_NUMBERS = 256
"""A shard's number is one byte."""

DRAWS_FOR_ALL = 32
"""Ids that are tried for the full number of shards: when 64 of the 1,024 partitions lie inside, one of these ids has
it.
"""

DRAWS_MAX = 1024
"""Ids that are tried for any shard at all. With a single partition inside, one id in five has a shard there."""


class Drawn(NamedTuple):
    """``shard_list`` is empty for the first 16."""

    bucket_id: bytes
    shards: int
    shard_list: bytes


def draw(layouts: Layouts, countries: Sequence[str], new_id: Callable[[], bytes]) -> Drawn:
    """A bucket's id and its shards, every replica of which lies inside ``countries`` (none: anywhere).

    Raises ServiceUnavailable, with the reason, when no partition of the ring lies inside, and as ``Layouts.partition``.
    """
    if not countries:
        return Drawn(new_id(), SHARDS_DEFAULT, b"")
    best = Drawn(b"", 0, b"")
    for number in range(DRAWS_MAX):
        if number == DRAWS_FOR_ALL and (best.shards or not any_inside(layouts, countries)):
            break
        bucket_id = new_id()
        found = shards_inside(layouts, bucket_id, countries)
        if len(found) > best.shards:
            best = Drawn(bucket_id, len(found), found)
        if best.shards == SHARDS_DEFAULT or (best.shards and number >= DRAWS_FOR_ALL):
            break
    if not best.shards:
        raise ServiceUnavailable(f"The bucket was not created: {why_none(layouts.current, countries)}.")
    return best


def shards_inside(layouts: Layouts, bucket_id: bytes, countries: Sequence[str]) -> bytes:
    """The numbers of up to 16 shards whose partitions lie inside, ascending; of different partitions as far as
    possible.
    """
    first: list[int] = []
    more: list[int] = []
    partitions: set[int] = set()
    for shard in range(SHARD_NUMBERS):
        partition = partition_of(bucket_id, shard)
        if is_inside(layouts, partition, countries):
            (more if partition in partitions else first).append(shard)
            partitions.add(partition)
            if len(first) == SHARDS_DEFAULT:
                break
    return bytes(sorted((first + more)[:SHARDS_DEFAULT]))


def is_inside(layouts: Layouts, partition: int, countries: Sequence[str]) -> bool:
    """Whether all replicas of a partition are in ``countries``: those that it has, the one that comes while it moves,
    and those that it is moving to, also while disks are out. False for one without replicas.
    """
    layout = layouts.current
    wanted = layouts.partitions.target(layout)
    replicas = {*layouts.partition(partition).disks, *layout.replicas_of(partition), *wanted.replicas_of(partition)}
    return bool(replicas) and all(layout.country_by_disk.get(disk) in countries for disk in replicas)


def any_inside(layouts: Layouts, countries: Sequence[str]) -> bool:
    return any(is_inside(layouts, partition, countries) for partition in range(PARTITIONS))


def why_none(layout: Layout, countries: Sequence[str]) -> str:
    """Why no partition lies inside ``countries``, with the numbers."""
    named = ", ".join(countries)
    domains = domains_inside(layout, countries)
    if len(domains) < layout.replicas:
        there = f": {', '.join(domains)}" if domains else ""
        return (
            f"metadata wants {layout.replicas} replicas in distinct {layout.domain_kind}s, "
            f"and {named} has {len(domains)} {layout.domain_kind}s with disks{there}"
        )
    return (
        f"none of the ring's {PARTITIONS} partitions has all {layout.replicas} replicas in {named}, where"
        f" {len(domains)} of {len(set(layout.domain_by_disk.values()))} {layout.domain_kind}s are"
    )


def domains_inside(layout: Layout, countries: Sequence[str]) -> list[str]:
    """The failure domains that have disks in ``countries`` (none named: all)."""
    return sorted(
        {
            domain
            for disk, domain in layout.domain_by_disk.items()
            if not countries or layout.country_of(disk) in countries
        }
    )
