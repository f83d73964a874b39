"""Logs, metrics and spans: set up once per process, used by every plane through structlog and the registry here."""

from storaged.observe.logs import REDACTED, choose_format, redact, setup_logging
from storaged.observe.metrics import METRICS, REQUEST_SECONDS, Metrics, Samples, counts_of, exposition, samples_of
from storaged.observe.spans import SPANS_FILE, SPANS_FILE_BYTES_MAX, Recorder, setup_spans, span_recorder, spans_enabled

__all__ = [
    "METRICS",
    "REDACTED",
    "REQUEST_SECONDS",
    "SPANS_FILE",
    "SPANS_FILE_BYTES_MAX",
    "Metrics",
    "Recorder",
    "Samples",
    "choose_format",
    "counts_of",
    "exposition",
    "redact",
    "samples_of",
    "setup_logging",
    "setup_spans",
    "span_recorder",
    "spans_enabled",
]
