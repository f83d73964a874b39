"""What a node's metrics say of its disks."""

from __future__ import annotations

from pathlib import Path

from storaged.node.gauges import set_disk_gauges
from storaged.observe import Metrics
from tests.integration.test_node import opened_disks, storage_config


async def test_the_metrics_of_disks_say_what_heartbeats_and_operations_say(tmp_path: Path) -> None:
    disks = await opened_disks(storage_config(tmp_path))
    try:
        metrics, statuses = Metrics(), await disks.statuses()
        hung = disks.healths[statuses[0].id]
        hung.hung_count, hung.longest_s = 2, 31.5
        set_disk_gauges(metrics, statuses, disks)

        def value(name: str, disk: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(name, {"disk": disk, **labels})

        assert len(statuses) == 2
        for status in statuses:
            assert value("storaged_disk_ok", status.id) == 1
            assert value("storaged_disk_bytes", status.id, kind="used") == status.bytes_used
            assert value("storaged_disk_bytes", status.id, kind="free") == status.bytes_free > 0
            assert value("storaged_ring_alarms", status.id, kind="ballot_conflicts") == 0
            assert value("storaged_ring_alarms", status.id, kind="sequence_falls") == 0
        assert [value("storaged_disk_hangs", status.id) for status in statuses] == [2, 0]
        assert value("storaged_disk_slowest_seconds", statuses[0].id) == 31.5
    finally:
        await disks.close()
