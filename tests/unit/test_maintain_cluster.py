"""What repair does to a whole cluster: fragments lost, damaged, forged; disks and racks that go, stay away and return."""

from __future__ import annotations

import os

from tests.unit.ring_cluster import Cluster, run

SMALL, LARGE = 5_000, 2_500_000


def test_a_healthy_cluster_is_counted_and_at_rest() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index, size in enumerate((10, SMALL, LARGE)):
            await cluster.put(bucket, b"key%d" % index, os.urandom(size))
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert all(status.fragments_rebuilt == 0 for status in await cluster.statuses())

    run(scenario)
