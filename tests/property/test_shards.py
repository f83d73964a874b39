"""Every register of a bucket with countries lies inside them, and such a bucket can be made whenever any partition
does.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cli.create import seeds_of
from storaged.cluster.layout import PARTITIONS, SHARDS_DEFAULT, DiskEntry, Layout, NodeEntry, partition_of
from storaged.cluster.partitions import PartitionRecord
from storaged.errors import ServiceUnavailable
from storaged.meta.names import object_name, part_name, upload_name
from storaged.objects.records import BucketRecord
from storaged.objects.system.shards import draw, is_inside, shards_inside
from tests.doubles.layouts import KnownLayouts
from tests.examples import examples

COUNTRIES = ["FR", "DE", "IT", "HU"]
keys = st.binary(min_size=1, max_size=40)


def layout_of(places: list[str], disks: int = 2, seed: int = 0) -> Layout:
    """A node in a rack of its own for each country named."""
    chance = random.Random(seed)
    nodes = tuple(
        NodeEntry(f"n{i}", f"{country}/site{i}/r{i}", "h:1", ("storage",)) for i, country in enumerate(places)
    )
    found = tuple(
        DiskEntry(chance.randbytes(8).hex(), node.name, chance.randint(1, 4)) for node in nodes for _ in range(disks)
    )
    bare = Layout("c", 1, nodes, found, ())
    return msgspec.structs.replace(bare, seeds=seeds_of(bare))


def countries_of(layout: Layout, partition: int) -> set[str]:
    """By the layout's own words, not by the function under test."""
    where = {node.name: node.location.split("/")[0] for node in layout.nodes}
    of_disk = {disk.id: where[disk.node] for disk in layout.disks}
    return {of_disk[disk] for disk in layout.replicas_of(partition)}


@settings(deadline=None, max_examples=examples(40))
@given(
    places=st.lists(st.sampled_from(COUNTRIES), min_size=3, max_size=9),
    disks=st.integers(1, 3),
    countries=st.lists(st.sampled_from(COUNTRIES), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 1 << 32),
    objects=st.lists(keys, min_size=1, max_size=30),
)
def test_a_bucket_is_made_iff_a_partition_qualifies_and_its_registers_lie_inside(
    places: list[str], disks: int, countries: list[str], seed: int, objects: list[bytes]
) -> None:
    layout, entropy = layout_of(places, disks, seed), random.Random(seed)
    qualifies = any(countries_of(layout, partition) <= set(countries) for partition in range(PARTITIONS))
    if not qualifies:
        with pytest.raises(ServiceUnavailable, match=", ".join(countries)):
            draw(KnownLayouts(layout), countries, lambda: entropy.randbytes(16))
        return
    drawn = draw(KnownLayouts(layout), countries, lambda: entropy.randbytes(16))
    bucket = BucketRecord(
        "b", drawn.bucket_id, "o", 0, "active", drawn.shards, "r", tuple(countries), shard_list=drawn.shard_list
    )
    assert 1 <= len(set(bucket.shard_numbers)) == len(bucket.shard_numbers) == bucket.shards <= SHARDS_DEFAULT
    for number in bucket.shard_numbers:
        assert countries_of(layout, partition_of(bucket.id, number)) <= set(countries)
    for key in objects:
        name = object_name(bucket.id, bucket.shard_numbers, key)
        upload_id = bytes([name.shard]) + entropy.randbytes(15)
        for register in (name, upload_name(bucket.id, key, upload_id), part_name(bucket.id, upload_id, 7)):
            assert register.shard in bucket.shard_numbers
            assert countries_of(layout, register.partition) <= set(countries)


@pytest.mark.parametrize(
    "places", [["FR"] * 3 + ["DE"], ["FR"] * 9 + ["DE"], ["FR"] * 29 + ["DE"], ["FR"] * 5 + ["DE"] * 5]
)
def test_a_bucket_of_a_mixed_ring_has_all_its_shards(places: list[str]) -> None:
    layout, entropy = layout_of(places), random.Random(7)
    for _ in range(20):
        drawn = draw(KnownLayouts(layout), ("FR",), lambda: entropy.randbytes(16))
        assert len(drawn.shard_list) == drawn.shards == SHARDS_DEFAULT
        assert len({partition_of(drawn.bucket_id, shard) for shard in drawn.shard_list}) == SHARDS_DEFAULT


def test_without_countries_a_bucket_has_the_first_shards() -> None:
    drawn = draw(KnownLayouts(layout_of(["FR", "DE", "IT"])), (), lambda: b"i" * 16)
    assert drawn == (b"i" * 16, 16, b"")
    assert BucketRecord("b", b"i" * 16, "o", 0, "active", 16, "r").shard_numbers == bytes(range(16))


def test_a_single_partition_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 1,024: its bucket has one shard, seldom two."""
    layout, entropy = layout_of(["FR", "FR", "FR", "DE"]), random.Random(1)
    inside: Any = lambda _layout, partition, _countries: partition == 700  # noqa: E731
    monkeypatch.setattr("storaged.objects.system.shards.is_inside", inside)
    drawn = draw(KnownLayouts(layout), ("FR",), lambda: entropy.randbytes(16))
    assert {partition_of(drawn.bucket_id, shard) for shard in drawn.shard_list} == {700}


def test_shards_of_different_partitions_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: Any = lambda _layout, partition, _countries: partition % 64 == 5  # noqa: E731
    monkeypatch.setattr("storaged.objects.system.shards.is_inside", inside)
    for seed in range(50):
        bucket_id = random.Random(seed).randbytes(16)
        found = shards_inside(KnownLayouts(layout_of(["FR"] * 3)), bucket_id, ("FR",))
        inside_all = {partition_of(bucket_id, shard) for shard in range(256)} & set(range(5, PARTITIONS, 64))
        assert len({partition_of(bucket_id, shard) for shard in found}) == min(len(inside_all), SHARDS_DEFAULT)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            ["FR", "FR", "DE"],
            "metadata wants 3 replicas in distinct racks, and FR has 2 racks with disks: FR/site0/r0, FR/site1/r1",
        ),
        (["DE", "DE", "DE"], "metadata wants 3 replicas in distinct racks, and FR has 0 racks with disks"),
    ],
)
def test_a_refusal_names_the_reason(places: list[str], said: str) -> None:
    with pytest.raises(ServiceUnavailable) as caught:
        draw(KnownLayouts(layout_of(places)), ("FR",), lambda: b"i" * 16)
    assert caught.value.message == f"The bucket was not created: {said}."


def test_a_partition_that_has_or_gets_a_replica_outside_is_not_inside() -> None:
    layout = layout_of(["FR", "FR", "FR", "DE"])
    layouts = KnownLayouts(layout)
    there = [partition for partition in range(PARTITIONS) if countries_of(layout, partition) == {"FR"}]
    comes, was, moves = there[:3]
    german = next(disk.id for disk in layout.disks if layout.country_of(disk.id) == "DE")
    replicas = layout.replicas_of(comes)
    layouts.partitions.learn(PartitionRecord(comes, 1, replicas, (german, *replicas[1:]), 1))
    replicas = layout.replicas_of(was)
    layouts.partitions.learn(PartitionRecord(was, 2, (german, *replicas[1:]), (), 1))
    assert not is_inside(layouts, comes, ("FR",))
    assert not is_inside(layouts, was, ("FR",))
    assert is_inside(layouts, moves, ("FR",))
    outside = next(partition for partition in range(PARTITIONS) if countries_of(layout, partition) != {"FR"})
    layouts.partitions.learn(PartitionRecord(outside, 2, layout.replicas_of(moves), (), 1))
    assert not is_inside(layouts, outside, ("FR",))  # where it is moving to
