"""What the metrics of every node say of its disks and of its ring client, as they are now."""

from __future__ import annotations

from collections.abc import Sequence

from storaged.cluster.ports import DiskStatus
from storaged.disk_states import OK
from storaged.meta.client import RingClient
from storaged.node.disks import Disks
from storaged.observe import Metrics


def set_disk_gauges(metrics: Metrics, statuses: Sequence[DiskStatus], disks: Disks) -> None:
    """``statuses``: of ``disks``, as heartbeats carry them."""
    ok, size = metrics.gauge("storaged_disk_ok"), metrics.gauge("storaged_disk_bytes")
    latency = metrics.gauge("storaged_disk_latency_seconds")
    for disk in statuses:
        ok.labels(disk.id).set(disk.state == OK)
        latency.labels(disk.id).set(disk.latency_ms / 1000)
        size.labels(disk.id, "used").set(disk.bytes_used)
        size.labels(disk.id, "free").set(disk.bytes_free)
    hangs, slowest = metrics.gauge("storaged_disk_hangs"), metrics.gauge("storaged_disk_slowest_seconds")
    for disk_id, health in disks.healths.items():
        hangs.labels(disk_id).set(health.hung_count)
        slowest.labels(disk_id).set(max(health.longest_s, health.oldest_s()))
    alarms = metrics.gauge("storaged_ring_alarms")
    for used in disks.used.values():
        statistics = used.replica.statistics()
        alarms.labels(used.id, "ballot_conflicts").set(statistics.ballot_conflicts)
        alarms.labels(used.id, "sequence_falls").set(statistics.sequence_falls)


def set_ring_gauges(metrics: Metrics, ring: RingClient) -> None:
    metrics.gauge("storaged_ring_chosen_falls").set(ring.chosen_falls[0])
    doubts, counts = metrics.gauge("storaged_ring_doubts"), ring.statistics()
    for kind in ("digest_conflicts", "doubted", "unheard"):
        doubts.labels(kind).set(getattr(counts, kind))
