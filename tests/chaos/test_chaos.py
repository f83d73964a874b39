"""Real processes, real signals: short runs of what ``python -m tests.chaos`` does for as long as one likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.copies import rename_buckets
from tests.chaos.forgetful import forget_disks
from tests.chaos.scenarios import flip_bits, kill_any, kill_nodes, lose_a_rack
from tests.cluster import Cluster

SECONDS = float(os.environ.get("STORAGED_CHAOS_SECONDS", "20"))

THINK_S = 0.1
"""A client's pause between requests, where other tests run meanwhile. ``python -m tests.chaos`` makes none."""
LEAST = 21

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def chaos_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Path(tmp_path_factory.mktemp("chaos")) / "s3", workers=2).start()
    yield cluster
    cluster.stop()


def test_killing_any_node_under_load_loses_no_acknowledged_write(chaos_cluster: Cluster) -> None:
    tally = kill_nodes(chaos_cluster, SECONDS, think_s=THINK_S, least=LEAST)
    assert tally.violations() == []
    assert tally.acknowledged >= LEAST
    assert tally.reads >= LEAST


def test_buckets_are_renamed_while_nodes_are_killed_and_no_copy_loses_its_data(chaos_cluster: Cluster) -> None:
    wrong, done = rename_buckets(chaos_cluster, SECONDS, clients=2, kills=kill_any)
    assert wrong == []
    assert done["delete bucket"] >= 2
    assert done["get"] >= LEAST


@pytest.mark.alone
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
    tally = forget_disks(chaos_cluster, 0, faults=faults, hold_s=(0.2, 0.5), beside=False, think_s=THINK_S)
    assert tally.violations() == []
    assert [error for error in tally.noted if "Timeout" not in error] == []
    assert tally.acknowledged > 20
    assert tally.reads > 20
