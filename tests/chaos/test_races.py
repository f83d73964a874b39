"""Races through three gateways, with kills: a short run of ``python -m tests.chaos races``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.races import Races
from tests.servers import Servers


@pytest.mark.timeout(1800)
def test_what_clients_are_answered_that_race_through_three_gateways_has_an_order(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "servers")
    try:
        races = Races(servers.create(gateways=3))
        races.run(0)
    finally:
        servers.stop()
    assert races.wrong == []
    assert races.keys == 7
    assert {"adds done", "adds refused", "lists done", "marks done"} <= races.counts.keys()
