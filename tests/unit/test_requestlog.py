"""Which requests get a line in the log, and what is in it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from storaged.config import LogSection
from storaged.node.requestlog import SLOW_BYTES_PER_S, RequestLog
from storaged.observe import Metrics
from storaged.s3.reply import Reply
from storaged.s3.request import Request, RequestDone


class _Request:
    """What a line says of a request."""

    id, operation, method, bucket, remote = "R1", "GetObject", "GET", "b", "127.0.0.1:5"
    raw_target = b"/b/k?X-Amz-Signature=abc&X-Amz-Date=d"

    class who:
        access_key = "AK"


def done(status: int = 200, *, seconds: float = 0.1, moved: int = 0, code: str = "") -> RequestDone:
    reply = Reply(status)
    reply.code = code
    return RequestDone(cast(Request, _Request()), reply, 0, moved, seconds, True)


def lines(settings: LogSection, *requests: RequestDone) -> list[dict[str, Any]]:
    log = RequestLog(Metrics(), settings)
    with capture_logs() as captured:
        for request in requests:
            log(request)
    return [dict(line) for line in captured if line["log_level"] != "debug"]


def test_an_access_log_is_written_where_it_is_wanted_and_holds_no_signature() -> None:
    assert lines(LogSection(access=False), done()) == []
    (line,) = lines(LogSection(access=True), done())
    assert (line["event"], line["log_level"], line["operation"], line["user"], line["status"]) == (
        "answered",
        "info",
        "GetObject",
        "AK",
        200,
    )
    assert "abc" not in line["target"]


@pytest.mark.parametrize(
    ("seconds", "moved", "slow"),
    [
        (0.9, 0, False),
        (1.1, 0, True),
        (100.0, 100 * SLOW_BYTES_PER_S, False),
        (102.0, 100 * SLOW_BYTES_PER_S, True),
    ],
)
def test_a_slow_request_is_one_that_its_bytes_do_not_explain(seconds: float, moved: int, slow: bool) -> None:
    found = lines(LogSection(slow_ms=1000), done(seconds=seconds, moved=moved))
    assert [line["event"] for line in found] == (["slow"] if slow else [])
    assert lines(LogSection(slow_ms=0), done(seconds=seconds, moved=moved)) == []


def test_the_stores_own_failures_are_always_logged() -> None:
    found = lines(
        LogSection(), done(503, code="SlowDown"), done(501, code="NotImplemented"), done(404, code="NoSuchKey")
    )
    assert [(line["event"], line["code"]) for line in found] == [("failed", "SlowDown")]


def test_a_reload_turns_it_on_and_off() -> None:
    log = RequestLog(Metrics(), LogSection())
    with capture_logs() as captured:
        log(done())
        log.configure(LogSection(access=True))
        log(done())
        log.configure(LogSection())
        log(done())
    assert [line["event"] for line in captured if line["log_level"] == "info"] == ["answered"]


@pytest.mark.parametrize(
    "parameter",
    [
        b"X-Amz-Signature", b"X-Amz-%53ignature", b"%58-Amz-Signature", b"x-amz-%63redential", b"X-Amz-Security%2DToken",  # noqa: E501
        b"%41WSAccessKeyId", b"Signatur%65",
    ],
)  # fmt: skip
def test_a_signature_is_left_out_of_the_log_however_its_name_is_encoded(parameter: bytes) -> None:
    """``X-Amz-%53ignature`` signs a request as ``X-Amz-Signature`` does."""
    request = Request("R1", "GET", b"/b/%2541?list-type=2&" + parameter + b"=abc&prefix=a%26", "127.0.0.1", False)
    target = RequestDone(request, Reply(200), 0, 0, 0.1, True).target
    assert "abc" not in target
    assert target.startswith("/b/%2541?list-type=2&")
    assert target.endswith("=-&prefix=a%26")
