"""Spans: noted for the request a task works for, and only when they are on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benches.waterfall import bars, covered, draw
from storaged import observe, trace


@pytest.fixture
def spans_on() -> Iterator[None]:
    trace.enable()
    yield
    trace.enable(False)


async def test_nothing_is_noted_while_spans_are_off() -> None:
    assert trace.start() is None
    assert trace.current() is None
    with trace.span("seal"), trace.span_of(None, "code"):
        pass
    assert trace.span("seal") is trace.span("code")


@pytest.mark.usefixtures("spans_on")
async def test_each_request_gets_the_spans_of_its_own_tasks_and_threads() -> None:
    async def request(name: str) -> trace.Trace:
        found = trace.start()
        assert found is not None
        with trace.span(name):
            await asyncio.sleep(0)
            await asyncio.create_task(child(f"{name}-child"))
        noted = trace.current()

        def in_thread() -> None:
            with trace.span_of(noted, f"{name}-thread"):
                pass

        await asyncio.get_running_loop().run_in_executor(None, in_thread)
        return found

    async def child(name: str) -> None:
        with trace.span(name):
            await asyncio.sleep(0)

    one, two = await asyncio.gather(asyncio.create_task(request("a")), asyncio.create_task(request("b")))
    assert [span.name for span in one.spans] == ["a-child", "a", "a-thread"]
    assert [span.name for span in two.spans] == ["b-child", "b", "b-thread"]
    inner, outer, _ = one.spans
    assert one.began_ns <= outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns


@pytest.mark.usefixtures("spans_on")
async def test_what_fails_is_noted_too_and_the_number_of_spans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trace.start(received_ns=1)
    assert found is not None
    assert (found.spans[0].name, found.spans[0].start_ns) == ("queue", 1)
    with pytest.raises(ValueError, match="broken"), trace.span("seal"):
        raise ValueError("broken")
    assert found.spans[-1].name == "seal"
    monkeypatch.setattr(trace, "SPANS_MAX", 3)
    for _ in range(5):
        with trace.span("code"):
            pass
    assert (len(found.spans), found.left_out) == (3, 4)


@pytest.mark.usefixtures("spans_on")
async def test_the_spans_file_gets_a_line_a_request_and_ends_at_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spans"
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.setenv(observe.SPANS_FILE, str(path))
    record = observe.span_recorder("storaged")
    assert record is not None
    found = trace.start()
    with trace.span("seal"):
        pass
    record("PutObject", 0.25, {"http.response.status_code": 200}, found)
    record("PutObject", 0.25, {}, None)
    monkeypatch.setattr("storaged.observe.spans.SPANS_FILE_BYTES_MAX", 10)
    record("GetObject", 0.25, {}, found)
    (line,) = path.read_text().splitlines()
    told = json.loads(line)
    assert (told["operation"], told["http.response.status_code"], told["left_out"]) == ("PutObject", 200, 0)
    ((name, start_us, end_us),) = told["spans"]
    assert name == "seal"
    assert 0 <= start_us <= end_us <= told["duration_us"]


def test_a_waterfall_draws_each_kind_of_work_once_and_counts_overlap_once() -> None:
    spans = [("seal", 0, 25), ("send", 25, 75), ("seal", 50, 75), ("reply", 75, 100)]
    assert bars(spans, 100, 8) == [
        ("seal", "###.### ", 50, 2),
        ("send", "  ##### ", 50, 1),
        ("reply", "      ##", 25, 1),
    ]
    assert covered([(0, 10), (5, 20), (30, 40), (31, 35)]) == 30
    told = draw("PUT", {"duration_us": 200, "spans": spans, "left_out": 3})
    assert "PUT: 0.20 ms" in told
    assert "3 later spans" in told
    assert "between" in told.splitlines()[-2]
    assert "50%" in told.splitlines()[-2]
