"""Real processes, real signals: short runs of what ``python -m tests.chaos`` does for as long as one likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.changing import Change
from tests.chaos.forgetful import forget_disks
from tests.chaos.scenarios import flip_bits, kill_nodes, lose_a_rack
from tests.chaos.steps import ADD, COME_BACK, LOSE, OLDER
from tests.cluster import Cluster
from tests.servers import Servers

SECONDS = float(os.environ.get("STORAGED_CHAOS_SECONDS", "20"))

pytestmark = [pytest.mark.timeout(900), pytest.mark.alone]


@pytest.fixture(scope="module")
def chaos_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Path(tmp_path_factory.mktemp("chaos")) / "s3", workers=2).start()
    yield cluster
    cluster.stop()


def test_killing_any_node_under_load_loses_no_acknowledged_write(chaos_cluster: Cluster) -> None:
    tally = kill_nodes(chaos_cluster, SECONDS)
    assert tally.violations() == []
    assert tally.acknowledged > 20
    assert tally.reads > 20


def test_a_lost_rack_fails_no_request_twice_and_is_repaired_on_return(chaos_cluster: Cluster) -> None:
    outcome = lose_a_rack(chaos_cluster, "par2", SECONDS / 2)
    assert outcome.tally.violations() == []
    assert outcome.tally.failed_twice == 0
    assert max(count for _, count in outcome.below_target) > 0, "a write during the loss must count as below target"
    assert outcome.below_target[-1][1] == 0


def test_flipped_bits_are_never_served_and_are_repaired(chaos_cluster: Cluster) -> None:
    outcome = flip_bits(chaos_cluster, 60, waves=3)
    assert outcome.flips >= 50
    assert outcome.wrong == 0
    assert outcome.refused == 0


def test_disks_that_forget_under_load_are_refused_by_name_and_lose_nothing(chaos_cluster: Cluster) -> None:
    faults = ("swap", "wipe", "roll back within a start")
    tally = forget_disks(chaos_cluster, 0, faults=faults, hold_s=(0.2, 0.5), beside=False)
    assert tally.violations() == []
    assert [error for error in tally.noted if "Timeout" not in error] == []
    assert tally.acknowledged > 20
    assert tally.reads > 20


@pytest.mark.timeout(3600)
def test_a_server_comes_and_another_is_lost_for_good_under_load_and_faults(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "servers")
    try:
        run = Change(servers.create(gateways=2), objects=30)
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
