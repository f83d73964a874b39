"""Logs, metrics and spans: set up once a process, used by every plane through structlog and the registry here.

A log line is an event with named fields. Under systemd it carries the journal's priority (``<4>`` in front,
sd-daemon(3)) and is logfmt; on a terminal it is coloured; as JSON it is for containers. Whatever a field is called:
values under names such as ``secret`` or ``authorization`` never reach a line.

Metric names are stable: ``storaged_`` + what + unit, few labels. ``METRICS`` lists them all; the registry is built from
that table alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import IO, Any, NamedTuple, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from storaged import trace

REDACTED = "***"
_SECRET_NAME = re.compile(
    r"secret|passphrase|password|token|authorization|signature|credential|private|wrapped|\bdek\b|^key$|_key$",
    re.IGNORECASE,
)
_NOT_SECRET = frozenset({"access_key", "object_key", "bucket_key", "credential_file"})
_SECRET_TEXT = re.compile(
    r"(X-Amz-(?:Signature|Security-Token|Credential)=)[^&\s\"]+|(AWS4-HMAC-SHA256 Credential=)\S+.*?(?=$|\n)",
    re.IGNORECASE,
)

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2, "exception": 3}
"""syslog(3) priorities."""


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replaces values whose name says that they are secret, raw bytes of any name, and signatures inside texts."""
    for name, value in event.items():
        if _SECRET_NAME.search(name) and name not in _NOT_SECRET:
            event[name] = REDACTED
        elif isinstance(value, bytes | bytearray | memoryview):
            event[name] = f"<{len(value)} bytes>"
        elif isinstance(value, str) and ("X-Amz-" in value or "AWS4-HMAC" in value or "x-amz-" in value):
            event[name] = _SECRET_TEXT.sub(lambda match: (match[1] or match[2]) + REDACTED, value)
    return event


def _journal(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    priority = _PRIORITY.get(str(event.get("level", "info")), 6)
    event.pop("timestamp", None)
    return f"<{priority}>" + _logfmt(event).replace("\n", f"\n<{priority}>")


def _logfmt_renderer(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    return _logfmt(event)


_PLAIN = re.compile(r"[^\s\"=\\]+")


def _logfmt(event: Mapping[str, Any]) -> str:
    """``level=info event="node started" name=n1``: one line, whatever the values hold (but for the text of an
    exception, which is what an operator reads).
    """
    order = [name for name in ("timestamp", "level", "event") if name in event]
    order += [name for name in event if name not in ("timestamp", "level", "event", "exception")]
    words = []
    for name in order:
        text = str(event[name])
        if not _PLAIN.fullmatch(text):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'
        if not text.isprintable():  # other nodes and clients choose some texts: none may control a terminal
            text = "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in text)
        words.append(f"{name}={text}")
    line = " ".join(words)
    return f"{line}\n{event['exception']}" if "exception" in event else line


class _Foreign(logging.Handler):
    """Lines of libraries that use the standard library's logging (asyncio, aiohttp) come out like our own."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(
            max(record.levelno, logging.INFO), record.getMessage(), exc_info=record.exc_info or None, logger=record.name
        )


def choose_format(wanted: str, *, stream: IO[str], environ: Mapping[str, str] = os.environ) -> str:
    """``auto`` becomes journal under systemd, console on a terminal, logfmt else."""
    if wanted != "auto":
        return wanted
    if "JOURNAL_STREAM" in environ:
        return "journal"
    return "console" if stream.isatty() else "logfmt"


def setup_logging(level: str, form: str = "auto", *, stream: TextIO | None = None, **always: str) -> None:
    """Configures structlog for the process; may be called again (reload). ``always`` are fields on every line, such as
    the node's name.
    """
    out = stream or sys.stderr
    chosen = choose_format(form, stream=out)
    renderers: dict[str, Any] = {
        "journal": _journal,
        "json": structlog.processors.JSONRenderer(),
        # Its default prints the local variables of every frame where the package rich is installed: keys, secrets,
        # content.
        "console": structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
        "logfmt": _logfmt_renderer,
    }
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if chosen == "console" else [structlog.processors.format_exc_info]),
            redact,
            renderers[chosen],
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**always)
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(max(logging.getLevelName(level.upper()), logging.WARNING))
    logging.getLogger("storaged").setLevel(level.upper())


class Described(NamedTuple):
    """One metric: ``kind`` counter, gauge or histogram. ``together``: what a gauge of a node with several processes is,
    ``own`` (the first process's), ``sum``, ``max``, or ``count`` (a sum that those which have ended still count in).
    Counters and histograms are counts.
    """

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    together: str = "own"


REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper edges of the buckets of ``storaged_s3_request_seconds``."""

METRICS: dict[str, Described] = {
    "storaged_info": Described("gauge", "Always 1; says what runs here.", ("node", "version", "roles")),
    "storaged_ready": Described(
        "gauge", "1 when this node can do its work (a gateway: the ring has a quorum and the keyring is the cluster's)."
    ),
    "storaged_layout_epoch": Described("gauge", "Epoch of the layout in force."),
    "storaged_node_up": Described("gauge", "1 when the node answers this one.", ("node",)),
    "storaged_disk_bytes": Described("gauge", "Bytes of a local disk's fragment store.", ("disk", "kind")),
    "storaged_disk_ok": Described("gauge", "1 when the local disk takes part fully.", ("disk",)),
    "storaged_audit_alarms": Described(
        "gauge",
        "Nodes whose audit log is not what this node, or a witness of its own log, saw of it:"
        " AUDIT_REFUSED_BY_WITNESS.",
    ),
    "storaged_audit_entries": Described("gauge", "Entries of the audit log of this process that are on disk."),
    "storaged_ring_alarms": Described(
        "gauge",
        "Of a local disk since the start: ballot_conflicts (0 in a sound cluster) and sequence_falls (a few after"
        " crashes).",
        ("disk", "kind"),
    ),
    "storaged_s3_requests_total": Described("counter", "S3 requests answered.", ("operation", "status")),
    "storaged_s3_request_seconds": Described(
        "histogram", "From the request's first byte to the answer's last.", ("operation",)
    ),
    "storaged_s3_in_flight": Described(
        "gauge", "S3 requests being answered; past limits.s3_requests_max further ones get SlowDown.", together="sum"
    ),
    "storaged_s3_connections": Described("gauge", "Open connections of S3 clients.", together="sum"),
    "storaged_s3_unauthenticated": Described(
        "gauge", "Of those, the ones without an authenticated request so far.", together="sum"
    ),
    "storaged_s3_unauthenticated_closed": Described(
        "gauge",
        "Connections that had not authenticated, closed since the start to make room (s3.unauthenticated_*_max).",
        together="count",
    ),
    "storaged_s3_received_bytes_total": Described("counter", "Bytes of request bodies."),
    "storaged_s3_sent_bytes_total": Described("counter", "Bytes of answer bodies."),
    "storaged_object_events": Described(
        "gauge",
        "Events of the object plane since the start: blocks_fallback are writes below their target profile.",
        ("event",),
        together="count",
    ),
    "storaged_system_records_damaged": Described(
        "gauge", "Records of buckets and users that can't be used (SYSTEM_RECORD_DAMAGED)."
    ),
    "storaged_workers": Described("gauge", "Processes that serve the S3 port, those being started again left out."),
    "storaged_worker_restarts_total": Described("counter", "Processes that ended unasked and were started again."),
    "storaged_fragments_damaged_total": Described(
        "counter", "Cells whose checksum or seal did not hold when they were read.", ("disk",)
    ),
    "storaged_loop_lag_seconds": Described(
        "gauge", "How late the event loop ran the last time it was measured.", together="max"
    ),
}


class Tallies(Collector):
    """The four metrics of S3 requests, counted in plain numbers by the event loop's thread: what each request adds to
    prometheus_client's own counters and histograms, with a lock for every number, would cost a gateway a tenth of a
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
        """By operation and status."""
        self._seconds: dict[str, tuple[list[int], list[float]]] = {}
        """By operation: how many answers each bucket is the lowest for, and the sum of all their seconds."""
        self.bytes_in = 0
        self.bytes_out = 0

    def answered(self, operation: str, status: int, seconds: float) -> None:
        counts = self._counts.get(operation)
        if counts is None:
            self._seconds[operation] = ([0] * (len(REQUEST_SECONDS) + 1), [0.0])
            counts = self._counts[operation] = {}  # last: ``collect`` takes what is here to be there too
        counts[status] = counts.get(status, 0) + 1
        buckets, total = self._seconds[operation]
        buckets[bisect_left(REQUEST_SECONDS, seconds)] += 1
        total[0] += seconds

    def collect(self) -> Iterator[Metric]:
        """May run in another thread: it sees each number as it was at some moment."""
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
    """The process's registry. ``counter("storaged_...")`` and so on hand out what ``METRICS`` describes; another name
    is a KeyError, as is one of ``requests``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        kinds: dict[str, Callable[..., Any]] = {"counter": Counter, "gauge": Gauge}
        self._by_name: dict[str, Any] = {}
        self.requests = Tallies()
        self.registry.register(self.requests)
        for name, told in METRICS.items():
            if name in Tallies.NAMES:
                continue
            self._by_name[name] = kinds[told.kind](name, told.help, told.labels, registry=self.registry)

    def counter(self, name: str) -> Counter:
        found: Counter = self._by_name[name]
        return found

    def gauge(self, name: str) -> Gauge:
        found: Gauge = self._by_name[name]
        return found


Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]
"""A process's metrics by sample name (``storaged_s3_request_seconds_bucket``) and labels, sorted."""

_TOGETHER = {
    "process_virtual_memory_bytes": "sum",
    "process_resident_memory_bytes": "sum",
    "process_open_fds": "sum",
    **{name: told.together for name, told in METRICS.items() if told.kind == "gauge"},
}


def _together(family: Metric) -> str:
    return "count" if family.type in ("counter", "histogram") else _TOGETHER.get(family.name, "own")


def samples_of(registry: CollectorRegistry) -> Samples:
    """What other processes of the node may add to their own (``exposition``)."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        if _together(family) != "own"
        for sample in family.samples
    }


def counts_of(samples: Samples, registry: CollectorRegistry) -> Samples:
    """Those that go on counting when their process has ended."""
    counting = {name for family in registry.collect() if _together(family) == "count" for name in _sample_names(family)}
    return {key: value for key, value in samples.items() if key[0] in counting}


def _sample_names(family: Metric) -> list[str]:
    return [family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")]


class _Together:
    """A registry for ``generate_latest``: one process's, with what others counted."""

    def __init__(self, own: CollectorRegistry, others: Sequence[Samples]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        for family in self._own.collect():
            how = _together(family)
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
            told = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in sorted(merged.items(), key=_histogram_order):
                told.add_sample(name, dict(labels), value)
            yield told


def _histogram_order(item: tuple[tuple[str, Labels], float]) -> tuple[Labels, str, float]:
    """By labels, then buckets from below, as Prometheus wants them."""
    (name, labels), _ = item
    edge = dict(labels).get("le")
    return tuple(label for label in labels if label[0] != "le"), name, float(edge) if edge is not None else 0.0


def exposition(registry: CollectorRegistry, others: Sequence[Samples] = ()) -> bytes:
    """Prometheus' text: the process's own metrics, and those of the node's other processes added to them."""
    return generate_latest(cast(CollectorRegistry, _Together(registry, others)))


SPANS_FILE = "STORAGED_SPANS"
"""Environment: a file that gets a JSON line a request, with its spans, for looking without a collector. It is not
written beyond SPANS_FILE_BYTES_MAX."""

SPANS_FILE_BYTES_MAX = 64 * 1024 * 1024


def spans_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """OpenTelemetry's own variables turn spans on: an endpoint is named, and the SDK is not disabled."""
    return "OTEL_EXPORTER_OTLP_ENDPOINT" in environ and environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def setup_spans(node: str) -> bool:
    """Exports spans over OTLP/HTTP when enabled and the extra ``otel`` is installed; says whether it does."""
    if SPANS_FILE in os.environ:
        trace.enable()
    if not spans_enabled():
        return False
    trace.enable()
    try:
        from opentelemetry import trace as telemetry
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        structlog.get_logger().warning(
            "spans asked for, but OpenTelemetry's SDK is not installed", install="storaged[otel]"
        )
        return False
    provider = TracerProvider(resource=Resource.create({"service.name": "storaged", "service.instance.id": node}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    telemetry.set_tracer_provider(provider)
    return True


Recorder = Callable[[str, float, Mapping[str, str | int], trace.Trace | None], None]
"""``record(name, duration_s, attributes, trace)``: something that has just ended, and where its time went."""


def span_recorder(scope: str) -> Recorder | None:
    """Makes spans of each thing that ended, for OpenTelemetry, or lines in a file; None when spans are not enabled, so
    that nothing is paid for them.
    """
    recorders = [record for record in (_file_recorder(), _telemetry_recorder(scope)) if record is not None]
    if len(recorders) < 2:
        return recorders[0] if recorders else None

    def record_all(
        name: str, duration_s: float, attributes: Mapping[str, str | int], found: trace.Trace | None
    ) -> None:
        for record in recorders:
            record(name, duration_s, attributes, found)

    return record_all


def _telemetry_recorder(scope: str) -> Recorder | None:
    if not spans_enabled():
        return None
    from opentelemetry import trace as telemetry

    tracer = telemetry.get_tracer(scope)

    def record(name: str, duration_s: float, attributes: Mapping[str, str | int], found: trace.Trace | None) -> None:
        end_ns = time.time_ns()
        root = tracer.start_span(name, attributes=dict(attributes), start_time=end_ns - int(duration_s * 1e9))
        if found is not None:
            around, offset_ns = telemetry.set_span_in_context(root), end_ns - time.perf_counter_ns()
            for span in found.spans:
                tracer.start_span(span.name, context=around, start_time=span.start_ns + offset_ns).end(
                    span.end_ns + offset_ns
                )
        root.end(end_ns)

    return record


def _file_recorder() -> Recorder | None:
    path = os.environ.get(SPANS_FILE)
    if not path:
        return None
    file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # as long as the process

    def record(name: str, _duration_s: float, attributes: Mapping[str, str | int], found: trace.Trace | None) -> None:
        if found is None or file.tell() > SPANS_FILE_BYTES_MAX:
            return
        duration_us = (time.perf_counter_ns() - found.began_ns) // 1000
        spans = [
            (span.name, (span.start_ns - found.began_ns) // 1000, (span.end_ns - found.began_ns) // 1000)
            for span in found.spans
        ]
        line = {"operation": name, "duration_us": duration_us, **attributes, "left_out": found.left_out, "spans": spans}
        file.write(json.dumps(line, separators=(",", ":")) + "\n")

    return record
