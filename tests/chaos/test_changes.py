"""A cluster changes while it works: a short run of what ``python -m tests.chaos change`` does as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.changing import Change
from tests.chaos.steps import ADD, COME_BACK, LOSE, OLDER
from tests.servers import Servers

THINK_S = 0.1
"""A client's pause between requests: other tests run meanwhile. ``python -m tests.chaos`` makes shorter ones."""


@pytest.mark.timeout(3600)
def test_a_server_comes_and_another_is_lost_for_good_under_load_and_faults(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "servers")
    try:
        run = Change(servers.create(gateways=2), objects=30, think_s=THINK_S)
        with run.load():
            for step in (ADD, OLDER, LOSE, COME_BACK):
                run.step(step)
        run.judge()
    finally:
        servers.stop()
    assert run.violations() == []
    assert run.away.played.total() > 0
    assert run.counters.acknowledged.total() > 20
    assert run.workload.tally.acknowledged > 20
