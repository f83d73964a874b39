"""Metrics of a process, and of a node with several processes.

Metric names are stable: ``storaged_`` + what + unit, few labels. ``METRICS`` lists them all; the registry is built from
that table alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector


class MetricDescription(NamedTuple):
    """One metric. ``kind``: counter, gauge or histogram.

    ``merge`` says how a node with several processes merges a gauge: ``own`` (the first process's), ``sum``, ``max``, or
    ``count`` (a sum in which processes that have ended still count). Counters and histograms are merged as counts.
    """

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    merge: str = "own"


REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper edges of the buckets of ``storaged_s3_request_seconds``."""

METRICS: dict[str, MetricDescription] = {
    "storaged_info": MetricDescription("gauge", "Always 1; says what runs here.", ("node", "version", "roles")),
    "storaged_ready": MetricDescription(
        "gauge", "1 when this node can do its work (a gateway: the ring has a quorum and the keyring is the cluster's)."
    ),
    "storaged_layout_epoch": MetricDescription("gauge", "Epoch of the layout in force."),
    "storaged_node_up": MetricDescription("gauge", "1 when the node answers this one.", ("node",)),
    "storaged_disk_bytes": MetricDescription("gauge", "Bytes of a local disk's fragment store.", ("disk", "kind")),
    "storaged_disk_ok": MetricDescription("gauge", "1 when the local disk takes part fully.", ("disk",)),
    "storaged_disk_hangs": MetricDescription("gauge", "How often the local disk hung since the start.", ("disk",)),
    "storaged_disk_slowest_seconds": MetricDescription(
        "gauge", "The longest operation of the local disk since the start that took 0.1 s or more.", ("disk",)
    ),
    "storaged_disk_latency_seconds": MetricDescription(
        "gauge", "How long operations of the local disk take, or the age of the oldest that has not ended.", ("disk",)
    ),
    "storaged_audit_alarms": MetricDescription(
        "gauge",
        "Nodes whose audit log is not what this node, or a witness of its own log, saw of it:"
        " AUDIT_REFUSED_BY_WITNESS.",
    ),
    "storaged_audit_entries": MetricDescription("gauge", "Entries of the audit log of this process that are on disk."),
    "storaged_ring_alarms": MetricDescription(
        "gauge",
        "Of a local disk since the start: ballot_conflicts (0 in a sound cluster) and sequence_falls (a few after"
        " crashes).",
        ("disk", "kind"),
    ),
    "storaged_ring_chosen_falls": MetricDescription(
        "gauge",
        "How often this gateway found a register back at an older record than it had seen chosen: CHOSEN_FELL_BACK.",
        merge="count",
    ),
    "storaged_ring_doubts": MetricDescription(
        "gauge",
        "Answers to this process from replicas that may lie, since the start: digest_conflicts (two hold different"
        " values under one ballot), doubted (one holds a system record that no gateway wrote; both are 0 in a sound"
        " cluster), unheard (a system record was changed while replicas differed and one did not answer).",
        ("kind",),
        merge="count",
    ),
    "storaged_s3_requests_total": MetricDescription("counter", "S3 requests answered.", ("operation", "status")),
    "storaged_s3_request_seconds": MetricDescription(
        "histogram", "From the request's first byte to the answer's last.", ("operation",)
    ),
    "storaged_s3_in_flight": MetricDescription(
        "gauge", "S3 requests being answered; past limits.s3_requests_max further ones get SlowDown.", merge="sum"
    ),
    "storaged_s3_connections": MetricDescription("gauge", "Open connections of S3 clients.", merge="sum"),
    "storaged_s3_unauthenticated": MetricDescription(
        "gauge", "Of those, the ones without an authenticated request so far.", merge="sum"
    ),
    "storaged_s3_unauthenticated_closed": MetricDescription(
        "gauge",
        "Connections that had not authenticated, closed since the start to make room (s3.unauthenticated_*_max).",
        merge="count",
    ),
    "storaged_s3_received_bytes_total": MetricDescription("counter", "Bytes of request bodies."),
    "storaged_s3_sent_bytes_total": MetricDescription("counter", "Bytes of answer bodies."),
    "storaged_access_log_lines": MetricDescription(
        "gauge",
        "Lines of access logs of buckets since the start: lines (all), delivered, dropped (no room in memory), refused"
        " (by the target bucket); objects counts those that have the delivered lines.",
        ("what",),
        merge="count",
    ),
    "storaged_notifications": MetricDescription(
        "gauge",
        "Events since the start: delivered, failed (attempts), given_up (their bucket does not name the destination any"
        " more); left counts keys with events that the last look at all buckets could not deliver.",
        ("what",),
        merge="count",
    ),
    "storaged_repair_moves": MetricDescription(
        "gauge",
        "Moves of blocks that storage nodes asked this gateway for, by what came of them; blocks_moved counts blocks.",
        ("outcome",),
        merge="count",
    ),
    "storaged_object_events": MetricDescription(
        "gauge",
        "Events of the object plane since the start: blocks_fallback are writes below their target profile.",
        ("event",),
        merge="count",
    ),
    "storaged_system_records_damaged": MetricDescription(
        "gauge", "Records of buckets and users that can't be used (SYSTEM_RECORD_DAMAGED)."
    ),
    "storaged_workers": MetricDescription(
        "gauge", "Processes that serve the S3 port, without those that are being restarted."
    ),
    "storaged_worker_restarts_total": MetricDescription(
        "counter", "Processes that ended unexpectedly and were restarted."
    ),
    "storaged_fragments_damaged_total": MetricDescription(
        "counter", "Cells whose checksum or seal did not hold when they were read.", ("disk",)
    ),
    "storaged_loop_lag_seconds": MetricDescription(
        "gauge", "How late the event loop ran the last time it was measured.", merge="max"
    ),
}


class RequestMetrics(Collector):
    """The four metrics of S3 requests, counted in plain numbers by the event loop's thread.

    prometheus_client's own counters and histograms take a lock for every number; they would cost a gateway a tenth of a
    HEAD.
    """

    NAMES = (
        "storaged_s3_requests_total",
        "storaged_s3_request_seconds",
        "storaged_s3_received_bytes_total",
        "storaged_s3_sent_bytes_total",
    )

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, int]] = {}
        """Operation -> status -> count."""
        self._seconds: dict[str, tuple[list[int], list[float]]] = {}
        """Operation -> the number of answers whose lowest bucket each is, and the sum of their seconds."""
        self.bytes_in = 0
        self.bytes_out = 0

    def answered(self, operation: str, status: int, seconds: float) -> None:
        counts = self._counts.get(operation)
        if counts is None:
            self._seconds[operation] = ([0] * (len(REQUEST_SECONDS) + 1), [0.0])
            # Set last: ``collect`` expects ``_seconds`` to have every operation of ``_counts``.
            counts = self._counts[operation] = {}
        counts[status] = counts.get(status, 0) + 1
        buckets, total = self._seconds[operation]
        buckets[bisect_left(REQUEST_SECONDS, seconds)] += 1
        total[0] += seconds

    def collect(self) -> Iterator[Metric]:
        """May run in another thread; it sees each number as it was at some moment."""
        requests, seconds, received, sent = ((name, METRICS[name].help) for name in self.NAMES)
        counted = CounterMetricFamily(*requests, labels=METRICS[requests[0]].labels)
        timed = HistogramMetricFamily(*seconds, labels=METRICS[seconds[0]].labels)
        for operation, counts in list(self._counts.items()):
            for status, count in list(counts.items()):
                counted.add_metric([operation, str(status)], count)
            buckets, total = self._seconds[operation]
            edges = [*map(str, REQUEST_SECONDS), "+Inf"]
            timed.add_metric([operation], list(zip(edges, accumulate(buckets), strict=True)), total[0])
        yield counted
        yield timed
        yield CounterMetricFamily(*received, value=self.bytes_in)
        yield CounterMetricFamily(*sent, value=self.bytes_out)


class Metrics:
    """The process's registry. ``counter(name)`` and ``gauge(name)`` return what ``METRICS`` describes.

    They raise KeyError for an unknown name, and for a name of ``requests``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        kinds: dict[str, Callable[..., Any]] = {"counter": Counter, "gauge": Gauge}
        self._by_name: dict[str, Any] = {}
        self.requests = RequestMetrics()
        self.registry.register(self.requests)
        for name, described in METRICS.items():
            if name in RequestMetrics.NAMES:
                continue
            self._by_name[name] = kinds[described.kind](name, described.help, described.labels, registry=self.registry)

    def counter(self, name: str) -> Counter:
        found: Counter = self._by_name[name]
        return found

    def gauge(self, name: str) -> Gauge:
        found: Gauge = self._by_name[name]
        return found


Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]
"""A process's metrics by sample name (such as ``storaged_s3_request_seconds_bucket``) and sorted labels."""

_MERGE_BY_NAME = {
    "process_virtual_memory_bytes": "sum",
    "process_resident_memory_bytes": "sum",
    "process_open_fds": "sum",
    **{name: described.merge for name, described in METRICS.items() if described.kind == "gauge"},
}


def _merge_rule(family: Metric) -> str:
    return "count" if family.type in ("counter", "histogram") else _MERGE_BY_NAME.get(family.name, "own")


def samples_of(registry: CollectorRegistry) -> Samples:
    """The samples that another process of the node merges with its own (``exposition``)."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        if _merge_rule(family) != "own"
        for sample in family.samples
    }


def counts_of(samples: Samples, registry: CollectorRegistry) -> Samples:
    """The samples that still count after their process has ended."""
    counting = {
        name for family in registry.collect() if _merge_rule(family) == "count" for name in _sample_names(family)
    }
    return {key: value for key, value in samples.items() if key[0] in counting}


def _sample_names(family: Metric) -> list[str]:
    return [family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")]


class _MergedRegistry:
    """A registry for ``generate_latest``: one process's metrics, merged with those of others."""

    def __init__(self, own: CollectorRegistry, others: Sequence[Samples]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        for family in self._own.collect():
            how = _merge_rule(family)
            if how == "own" or not self._others:
                yield family
                continue
            merged: Samples = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for sample in family.samples
                if not sample.name.endswith("_created")
            }
            names = frozenset(_sample_names(family))
            for other in self._others:
                for key, value in other.items():
                    if key[0] in names:
                        merged[key] = (
                            max(merged.get(key, value), value) if how == "max" else merged.get(key, 0.0) + value
                        )
            described = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in sorted(merged.items(), key=_histogram_order):
                described.add_sample(name, dict(labels), value)
            yield described


def _histogram_order(item: tuple[tuple[str, Labels], float]) -> tuple[Labels, str, float]:
    """The order that Prometheus requires: by labels, then buckets from the lowest."""
    (name, labels), _ = item
    edge = dict(labels).get("le")
    return tuple(label for label in labels if label[0] != "le"), name, float(edge) if edge is not None else 0.0


def exposition(registry: CollectorRegistry, others: Sequence[Samples] = ()) -> bytes:
    """The metrics in Prometheus' text format: the process's own, merged with those of the node's other processes."""
    return generate_latest(cast(CollectorRegistry, _MergedRegistry(registry, others)))
