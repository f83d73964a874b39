"""Exports the spans of ``storaged.trace``: over OpenTelemetry, or as lines of a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

import structlog

from storaged import trace

SPANS_FILE = "STORAGED_SPANS"
"""An environment variable. It names a file that gets one JSON line with the spans of each request, for use without a
collector. The file stops growing at SPANS_FILE_BYTES_MAX."""

SPANS_FILE_BYTES_MAX = 64 * 1024 * 1024


def spans_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables turn spans on: they name an endpoint, and do not disable the SDK."""
    return "OTEL_EXPORTER_OTLP_ENDPOINT" in environ and environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def setup_spans(node: str) -> bool:
    """Exports spans over OTLP/HTTP when they are enabled and the extra ``otel`` is installed. Returns whether
    it does.
    """
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
"""``record(name, duration_s, attributes, trace)``: records an operation that has just ended, and where its
time went."""


def span_recorder(scope: str) -> Recorder | None:
    """Returns a recorder that makes OpenTelemetry spans or lines of a file; None when spans are off, so that they cost
    nothing.
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
    file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open as long as the process runs

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
