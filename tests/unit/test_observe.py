"""Log lines say what happened, and never a secret; metric names are stable."""

from __future__ import annotations

import io
import json

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from storaged import observe
from storaged.observe.logs import logfmt


@pytest.fixture(autouse=True)
def _restore() -> object:
    yield
    structlog.reset_defaults()


def lines_of(form: str, **fields: object) -> str:
    out = io.StringIO()
    observe.setup_logging("info", form, stream=out, node="n1")
    structlog.get_logger().warning("something happened", **fields)
    structlog.get_logger().debug("not shown")
    return out.getvalue()


def test_a_journal_line_carries_its_priority_and_is_logfmt() -> None:
    line = lines_of("journal", path="/a b", count=3)
    assert line.startswith('<4>level=warning event="something happened"')
    assert 'path="/a b"' in line
    assert "count=3" in line
    assert "node=n1" in line
    assert line.count("\n") == 1


def test_json_lines_are_json() -> None:
    assert json.loads(lines_of("json", count=3))["count"] == 3


@pytest.mark.parametrize("form", ["journal", "json", "logfmt", "console"])
def test_no_form_shows_a_secret(form: str) -> None:
    line = lines_of(
        form,
        secret_key="hunter2",
        passphrase="hunter2",
        authorization="hunter2",
        wrapped_key=b"hunter2",
        payload=b"hunter2",
        url="/b/k?X-Amz-Signature=hunter2&X-Amz-Date=1",
        header="AWS4-HMAC-SHA256 Credential=AK/x, SignedHeaders=host, Signature=hunter2",
        access_key="AKIA",
    )
    assert "hunter2" not in line
    assert "AKIA" in line


@pytest.mark.parametrize("form", ["journal", "json", "logfmt", "console"])
def test_the_text_of_an_exception_holds_no_local_variables(form: str) -> None:
    """They are keys, secret keys and content; the console's default shows them where the package rich is installed, as
    it is beside our dependencies.
    """
    out = io.StringIO()
    observe.setup_logging("info", form, stream=out)
    dek = "never to be seen".upper()
    try:
        int("x")
    except ValueError:
        structlog.get_logger().exception("request failed")
    assert "request failed" in out.getvalue()
    assert "ValueError" in out.getvalue()
    assert dek not in out.getvalue()


@given(st.text(max_size=60))
def test_a_logfmt_line_stays_one_line_whatever_a_value_holds(text: str) -> None:
    assert "\n" not in logfmt({"level": "info", "event": text, "x": text})


def test_auto_chooses_by_where_the_lines_go() -> None:
    out = io.StringIO()
    assert observe.choose_format("auto", stream=out, environ={"JOURNAL_STREAM": "8:1"}) == "journal"
    assert observe.choose_format("auto", stream=out, environ={}) == "logfmt"
    assert observe.choose_format("json", stream=out, environ={"JOURNAL_STREAM": "8:1"}) == "json"


def test_metrics_are_those_described_and_no_others() -> None:
    metrics = observe.Metrics()
    metrics.requests.answered("GetObject", 200, 0.5)
    assert (
        metrics.registry.get_sample_value("storaged_s3_requests_total", {"operation": "GetObject", "status": "200"})
        == 1.0
    )
    with pytest.raises(KeyError):
        metrics.gauge("storaged_unheard_of")


def test_requests_are_told_as_prometheus_own_counters_and_histograms_would_tell_them() -> None:
    metrics, registry = observe.Metrics(), CollectorRegistry()
    count = Counter(
        "storaged_s3_requests_total",
        observe.METRICS["storaged_s3_requests_total"].help,
        ("operation", "status"),
        registry=registry,
    )
    time = observe.METRICS["storaged_s3_request_seconds"]
    seconds = Histogram(
        "storaged_s3_request_seconds", time.help, ("operation",), buckets=observe.REQUEST_SECONDS, registry=registry
    )
    for operation, status, took_s in (
        ("GetObject", 200, 0.001),
        ("GetObject", 404, 0.00100001),
        ("GetObject", 200, 0.0),
        ("none", 400, 99.0),
        ("none", 400, 30.0),
    ):
        count.labels(operation, str(status)).inc()
        seconds.labels(operation).observe(took_s)
        metrics.requests.answered(operation, status, took_s)
    metrics.requests.bytes_in += 7

    def lines(told: CollectorRegistry) -> list[str]:
        text = observe.exposition(told).decode().splitlines()
        return [line for line in text if "storaged_s3_request" in line and "_created" not in line]

    assert lines(metrics.registry) == lines(registry)
    assert metrics.registry.get_sample_value("storaged_s3_received_bytes_total") == 7


def test_what_several_processes_counted_is_one_nodes_and_goes_on_when_one_has_ended() -> None:
    processes = [observe.Metrics() for _ in range(3)]
    for number, metrics in enumerate(processes, 1):
        for _ in range(number):
            metrics.requests.answered("GetObject", 200, 0.003)
        metrics.gauge("storaged_s3_connections").set(10 * number)
        metrics.gauge("storaged_loop_lag_seconds").set(number / 10)
        metrics.gauge("storaged_ready").set(number == 1)
        metrics.gauge("storaged_object_events").labels("gets").set(number)
    processes[2].requests.answered("PutObject", 200, 0.003)
    first, second, ended = processes
    ended_counts = observe.counts_of(observe.samples_of(ended.registry), first.registry)
    text = observe.exposition(first.registry, [observe.samples_of(second.registry), ended_counts]).decode()
    lines = text.splitlines()
    assert 'storaged_s3_requests_total{operation="GetObject",status="200"} 6.0' in lines
    assert 'storaged_s3_requests_total{operation="PutObject",status="200"} 1.0' in lines
    assert 'storaged_s3_request_seconds_count{operation="GetObject"} 6.0' in lines
    assert "storaged_s3_connections 30.0" in lines
    assert "storaged_loop_lag_seconds 0.2" in lines
    assert "storaged_ready 1.0" in lines
    assert 'storaged_object_events{event="gets"} 6.0' in lines
    edges = [
        line.split('le="')[1].split('"')[0]
        for line in lines
        if 'operation="GetObject"} ' in line and "_bucket{" in line
    ]
    assert edges == ["0.001", "0.0025", *edges[2:-1], "+Inf"]
    assert [float(edge) for edge in edges] == sorted(map(float, edges))


def test_spans_cost_nothing_unless_they_are_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert observe.span_recorder("storaged") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert observe.span_recorder("storaged") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    record = observe.span_recorder("storaged")
    assert record is not None
    record("PutObject", 0.01, {"status": 200}, None)
