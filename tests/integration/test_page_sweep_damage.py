"""A record that has lost a page holds up the collection of its own pages, and of no others."""

from __future__ import annotations

import itertools

import pytest

from storaged.meta.names import object_name
from storaged.objects.write import versioned
from tests.integration.memory_cluster import Cluster, run
from tests.integration.test_maintain_lost_pages import WithLostPage
from tests.integration.test_maintain_versions import FEW, ORPHAN_S, on_disks, sweep_pages


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioned, "BOUNDS", FEW)


def test_pages_of_other_keys_are_collected_while_one_has_lost_a_page() -> None:
    async def scenario(cluster: Cluster) -> None:
        hurt = WithLostPage(cluster)
        await hurt.make()
        disks = cluster.layouts.partition(hurt.name.partition).present
        # a storage node copied this page: whose it is is not known on this disk
        cluster.meta(disks[0]).forget_page_owner(min(cluster.pages(disks[0])))
        keys = (b"other %d" % number for number in itertools.count())
        bucket = hurt.bucket
        numbers = bucket.shard_numbers
        key = next(key for key in keys if object_name(bucket.id, numbers, key).partition == hurt.name.partition)
        before = on_disks(cluster)
        for number in range(40):
            await cluster.put(bucket, key, b"%d" % number)
        new = on_disks(cluster) - before
        assert new
        await hurt.lose_page()
        left = on_disks(cluster) - new
        for version in (await cluster.objects.list_versions(bucket, prefix=key)).versions:
            await cluster.objects.delete(bucket, key, version_id=version.version_id)
        await cluster.leap(ORPHAN_S + 60)
        await sweep_pages(cluster)
        assert on_disks(cluster) == left

    run(scenario)
