"""How often the log says that peers are refused."""

from __future__ import annotations

from typing import Any

from storaged.cluster.refusal_lines import RefusalLines


def test_a_stranger_gets_one_line_a_minute_which_counts_the_others() -> None:
    lines: list[dict[str, Any]] = []
    now = 0.0
    refusals = RefusalLines(lambda event, **fields: lines.append({"event": event, **fields}), lambda: now)
    for number in range(1000):
        now = number / 100
        refusals.note("call refused", f"peer {number}", "ROLE_REFUSED", "not its method")
    refusals.note("node refused", "another", "CERTIFICATE_REFUSED", "expired")
    assert [line["event"] for line in lines] == ["call refused", "node refused"]
    assert "more_since_last_line" not in lines[0]
    now = 60.5
    refusals.note("call refused", "last", "ROLE_REFUSED", "not its method")
    assert lines[-1] == {
        "event": "call refused",
        "peer": "last",
        "code": "ROLE_REFUSED",
        "reason": "not its method",
        "more_since_last_line": 999,
    }
    now = 121
    refusals.note("call refused", "last", "ROLE_REFUSED", "not its method")
    assert "more_since_last_line" not in lines[-1]
    assert len(lines) == 4
