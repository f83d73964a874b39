"""Disks that forgot what they promised: wiped, put back from a snapshot, swapped, with and without their node's ledger.

The other nodes remember them. One cluster goes through all of it, with real processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from storaged.node.ledger_exchange import PUBLISH_S
from tests.cluster import Cluster

OBJECTS = 20
NODES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("forgetful") / "s3")
    try:
        found.start()
        write_all(found, "first")
        yield found
    finally:
        found.stop()


def write_all(cluster: Cluster, text: str) -> None:
    s3 = cluster.boto3()
    for number in range(OBJECTS):
        s3.put_object(Bucket="demo", Key=f"key-{number}", Body=f"{text} {number}".encode())


def check_all(cluster: Cluster, text: str) -> None:
    """Every object reads as it was acknowledged last, and its key is taken."""
    s3 = cluster.boto3()
    for number in range(OBJECTS):
        read = s3.get_object(Bucket="demo", Key=f"key-{number}")["Body"].read()
        assert read == f"{text} {number}".encode()
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="demo", Key=f"key-{number}", Body=b"again", IfNoneMatch="*")


def problems(cluster: Cluster) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in cluster.status()["problems"]:
        found.setdefault(problem["code"], []).append(problem["detail"])
    return found


def wait_for(cluster: Cluster, code: str, count: int) -> list[str]:
    cluster.wait_until(lambda: len(problems(cluster).get(code, ())) == count, 40, f"{count} times {code}")
    return problems(cluster)[code]


def position_of(cluster: Cluster, disk: Path) -> int:
    """What the ledger of the disk's node says of its redo log."""
    known = next(one for node in cluster.status()["nodes"] for one in node["disks"] if one["directory"] == str(disk))
    ledger = json.loads((disk.parent / "disks.json").read_text())
    return int(ledger["disks"][known["id"]].get("position", 0))


def stop(cluster: Cluster, *nodes: str) -> None:
    for node in nodes:
        cluster.run("dev", "stop", node)


def start(cluster: Cluster, *nodes: str) -> None:
    for node in nodes:
        cluster.run("dev", "start", node)


def wait_whole(cluster: Cluster) -> None:
    """But for what the witnesses of a node's audit log say when that was put back."""

    def whole() -> bool:
        return not {code for code in problems(cluster) if code not in ("AUDIT_REFUSED_BY_WITNESS",)}

    cluster.wait_until(whole, 90, "a cluster that is whole")


def aside(cluster: Cluster, what: Path, name: str) -> Path:
    place = cluster.directory.parent / name
    shutil.rmtree(place, ignore_errors=True)
    what.rename(place)
    return place


def test_a_node_that_lost_its_ledger_rebuilds_it_from_the_others(cluster: Cluster) -> None:
    stop(cluster, "n1")
    (cluster.directory / "n1" / "disks.json").unlink()
    start(cluster, "n1")
    wait_whole(cluster)
    assert (cluster.directory / "n1" / "disks.json").read_text().count('"store"') == 2
    check_all(cluster, "first")


def test_a_node_that_starts_with_half_of_the_others_away_says_what_it_waits_for(cluster: Cluster) -> None:
    stop(cluster, *NODES)
    start(cluster, "n1")
    for detail in wait_for(cluster, "DISK_WAITS", 2):
        assert "n2, n3" in detail
    start(cluster, "n2")
    cluster.wait_until(lambda: "DISK_WAITS" not in problems(cluster), 40, "the disks of two nodes of three")
    check_all(cluster, "first")
    start(cluster, "n3")
    wait_whole(cluster)


def test_all_nodes_come_up_that_were_killed_at_once(cluster: Cluster) -> None:
    for node in NODES:
        cluster.run("dev", "kill", node)
    start(cluster, *NODES)
    wait_whole(cluster)
    check_all(cluster, "first")


def test_all_ledgers_are_lost_and_the_disks_begin_with_what_they_have(cluster: Cluster) -> None:
    stop(cluster, *NODES)
    for node in NODES:
        (cluster.directory / node / "disks.json").unlink()
    start(cluster, "n1", "n2")
    for detail in wait_for(cluster, "DISK_WAITS", 4):
        assert "n3" in detail
    start(cluster, "n3")
    wait_whole(cluster)
    check_all(cluster, "first")


def test_two_swapped_disks_answer_nothing_until_each_is_in_its_place(cluster: Cluster) -> None:
    node = cluster.directory / "n2"

    def swap() -> None:
        stop(cluster, "n2")
        place = aside(cluster, node / "d1", "swapped")
        (node / "d2").rename(node / "d1")
        place.rename(node / "d2")
        start(cluster, "n2")

    swap()
    wait_for(cluster, "DISK_FOREIGN", 2)
    check_all(cluster, "first")
    swap()
    wait_whole(cluster)


def test_a_disk_that_was_put_back_to_a_state_of_this_start_answers_nothing(cluster: Cluster) -> None:
    disk = cluster.directory / "n1" / "d1"
    snapshot = cluster.directory.parent / "snapshot"
    shutil.copytree(disk, snapshot)
    before = position_of(cluster, disk)
    write_all(cluster, "second")
    cluster.wait_until(lambda: position_of(cluster, disk) > before, 60, "a newer position in the node's ledger")
    time.sleep(2 * PUBLISH_S + 1)  # those of the whole write are in all ledgers by then
    cluster.run("dev", "kill", "n1")
    as_it_was = aside(cluster, disk, "as it was")
    snapshot.rename(disk)
    start(cluster, "n1")
    (detail,) = wait_for(cluster, "DISK_ROLLED_BACK", 1)
    assert "put back to an older state" in detail
    check_all(cluster, "second")
    stop(cluster, "n1")
    shutil.rmtree(disk)
    as_it_was.rename(disk)
    start(cluster, "n1")
    wait_whole(cluster)
    check_all(cluster, "second")


def test_a_machine_that_was_put_back_as_a_whole_is_noticed_by_the_others(cluster: Cluster) -> None:
    node = cluster.directory / "n3"
    stop(cluster, "n3")
    snapshot = cluster.directory.parent / "machine"
    shutil.copytree(node, snapshot, ignore=shutil.ignore_patterns("*.sock"))
    start(cluster, "n3")
    wait_whole(cluster)
    write_all(cluster, "third")
    stop(cluster, "n3")
    as_it_was = aside(cluster, node, "machine as it was")
    shutil.copytree(snapshot, node)
    start(cluster, "n3")
    wait_for(cluster, "DISK_ROLLED_BACK", 2)
    check_all(cluster, "third")
    stop(cluster, "n3")
    shutil.rmtree(node)
    as_it_was.rename(node)
    start(cluster, "n3")
    wait_whole(cluster)


def test_a_server_that_was_built_anew_takes_no_part(cluster: Cluster) -> None:
    """The last of all: no command lets its disks take part."""
    node = cluster.directory / "n1"
    stop(cluster, "n1")
    for path in node.iterdir():
        if path.name not in ("config.toml", "identity"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    start(cluster, "n1")
    wait_for(cluster, "DISK_BLANK", 2)
    check_all(cluster, "third")
    explained: Any = cluster.run("explain", "DISK_BLANK").stdout
    assert "makes a blank disk take part" in explained
    stop(cluster, "n1")
    start(cluster, "n1")
    wait_for(cluster, "DISK_BLANK", 2)
    check_all(cluster, "third")
