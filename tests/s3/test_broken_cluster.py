"""A cluster that lacks what it needs: it says so, acknowledges nothing it cannot keep, and has everything again when
that is back.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.patience import SLOWNESS
from tests.s3.test_bad_input import refused, signed
from tests.s3.test_dev_cluster import healthy_status, node_of, problem_codes


def filled(cluster: Cluster, prefix: str) -> dict[str, bytes]:
    client = cluster.boto3(attempts=3)
    bodies = {f"{prefix}/{size}": os.urandom(size) for size in (10, 5_000, 300_000)}
    for key, body in bodies.items():
        client.put_object(Bucket="demo", Key=key, Body=body)
    return bodies


def read_back(cluster: Cluster, bodies: dict[str, bytes]) -> None:
    client = cluster.boto3(attempts=3)
    for key, body in bodies.items():
        assert client.get_object(Bucket="demo", Key=key)["Body"].read() == body


@contextmanager
def stopped(cluster: Cluster, node: str) -> Iterator[None]:
    """To do something to a node's files; it runs again after the block."""
    cluster.run("dev", "stop", node)
    try:
        yield
    finally:
        cluster.run("dev", "start", node)


def test_with_one_rack_of_three_nothing_is_acknowledged_and_nothing_is_called_lost(cluster: Cluster) -> None:
    bodies = filled(cluster, "racks")
    cluster.run("dev", "kill", "par2")
    cluster.run("dev", "kill", "lyo1")
    cluster.wait_until(lambda: "QUORUM_LOST" in problem_codes(cluster.status()), 15, "the missing quorum to be named")
    done = cluster.run("status", "--json", check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"], found["objects_lost"], found["writes"]) == (2, "DOWN", 0, None)
    client = cluster.boto3()
    for key in bodies:
        assert refused(client.put_object, Bucket="demo", Key=key, Body=b"never") == (503, "ServiceUnavailable")
        assert refused(client.get_object, Bucket="demo", Key=key) == (503, "ServiceUnavailable")
    assert refused(client.list_objects_v2, Bucket="demo") == (503, "ServiceUnavailable")
    assert refused(client.create_bucket, Bucket="never-made") == (503, "ServiceUnavailable")
    told = cluster.run("where", "s3://demo/racks/10", check=False)
    assert (told.returncode, "storaged status" in told.stderr) == (1, True)
    cluster.run("dev", "start", "par2")
    cluster.run("dev", "start", "lyo1")
    healthy_status(cluster)
    read_back(cluster, bodies)
    assert "never-made" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


def test_a_full_disk_is_named_and_the_others_take_the_writes(cluster: Cluster) -> None:
    path = cluster.directory / "n2" / "config.toml"
    good = path.read_text()
    with stopped(cluster, "n2"):
        path.write_text(good.replace('reserve_bytes = "1 GiB"', 'reserve_bytes = "900 TiB"'))
    try:
        cluster.wait_until(lambda: "DISK_FULL" in problem_codes(cluster.status()), 15, "the full disks to be named")
        assert {disk["state"] for disk in node_of(cluster.status(), "n2")["disks"]} == {"full"}
        assert cluster.status()["verdict"] == "DEGRADED"
        bodies = filled(cluster, "full")
        read_back(cluster, bodies)
        assert "n2" not in {row["node"] for row in cluster.where("demo", "full/300000")["fragments"]}
        cluster.boto3().delete_object(Bucket="demo", Key="full/10")
        del bodies["full/10"]
    finally:
        with stopped(cluster, "n2"):
            path.write_text(good)
    healthy_status(cluster)
    read_back(cluster, bodies)
    assert "n2" in {row["node"] for row in cluster.where("demo", "full/300000")["fragments"]}


@pytest.mark.parametrize("part", ["fragments/index", "meta"])
def test_a_cut_off_database_costs_its_disk_and_no_other(cluster: Cluster, part: str) -> None:
    bodies = filled(cluster, "cut")
    disk, other = (Path(one["directory"]) for one in node_of(healthy_status(cluster), "n3")["disks"])
    file = disk / part / "data.mdb"
    with stopped(cluster, "n3"):
        whole = file.read_bytes()
        os.truncate(file, 9_000)
    # by where its pages are, a store that is cut off is damaged, or looks like one that was never used
    codes = {"INDEX_DAMAGED"} if part == "fragments/index" else {"DISK_DAMAGED", "DISK_FOREIGN"}
    cluster.wait_until(lambda: bool(codes & problem_codes(cluster.status())), 15, " or ".join(sorted(codes)))
    states = {Path(one["directory"]): one["state"] for one in node_of(cluster.status(), "n3")["disks"]}
    assert (states[disk] in ("index-damaged", "damaged", "foreign"), states[other]) == (True, "ok")
    read_back(cluster, bodies)
    with stopped(cluster, "n3"):
        if part == "meta":
            file.write_bytes(whole)
        else:
            assert "rebuild-index" in cluster.run("fsck", str(disk), check=False).stderr
            assert "made anew" in cluster.run("fsck", "--rebuild-index", str(disk)).stdout
            assert cluster.run("fsck", str(disk)).returncode == 0
    healthy_status(cluster)
    read_back(cluster, bodies)


def test_a_stopping_gateway_finishes_the_requests_it_has_begun(cluster: Cluster) -> None:
    body = os.urandom(2_000_000)
    headers = signed(cluster, "PUT", "/demo/drained", payload="UNSIGNED-PAYLOAD")
    head = f"PUT /demo/drained HTTP/1.1\r\nHost: 127.0.0.1:{cluster.s3_port}\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    with socket.create_connection(("127.0.0.1", cluster.s3_port), 10) as connection:
        connection.sendall(head.encode() + body[:1_000_000])
        stopping = threading.Thread(target=cluster.run, args=("dev", "stop", "gateway"))
        stopping.start()
        cluster.wait_until(lambda: not listens(cluster), 10, "the gateway to stop listening")
        connection.sendall(body[1_000_000:])
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        stopping.join(30)
    cluster.run("dev", "start", "gateway")
    assert cluster.boto3(attempts=3).get_object(Bucket="demo", Key="drained")["Body"].read() == body


def listens(cluster: Cluster) -> bool:
    try:
        socket.create_connection(("127.0.0.1", cluster.s3_port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


# --- commands that cannot do what was asked


def test_a_config_with_five_mistakes_lists_all_five(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[node]\nname = "n 1"\ndirectory = 5\nroles = ["storrage"]\n[cluster]\nidentity = "identity"\n[rpc]\nlisten ='
        ' "nowhere"\n[lgo]\n'
    )
    for command in (("config", "check"), ("run",)):
        done = cluster.run(*command, str(path), check=False)
        assert done.returncode == 1
        assert "5 mistakes" in done.stderr
        for line in (2, 3, 4, 8, 9):
            assert f"line {line}: " in done.stderr
        assert "Traceback" not in done.stderr


def test_dev_leaves_strange_directories_alone_and_takes_no_misspelt_action_for_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for more in ((), ("--detach",)):
        done = cluster.run("dev", str(tmp_path / "mine"), *more, check=False)
        assert (done.returncode, "thesis.tex" in done.stderr) == (1, True)
        assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    log = (cluster.directory / "dev.log").exists()
    busy = cluster.run("dev", str(cluster.directory), "--detach", check=False)
    assert (busy.returncode, "already running" in busy.stderr) == (1, True)
    assert (cluster.directory / "dev.log").exists() == log
    done = cluster.run("dev", "strat", check=False)
    assert (done.returncode, "did you mean 'start'" in done.stderr) == (2, True)
    assert not Path("strat").exists()
    assert "not a disk's directory" in cluster.run("fsck", str(tmp_path / "mine"), check=False).stderr
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def ended(pids: Any) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_when_the_supervisor_is_killed_its_nodes_end_and_the_next_start_has_all_data(tmp_path: Path) -> None:
    own = Cluster(tmp_path / "own").start()
    try:
        bodies, pids = filled(own, "kept"), own.pids().values()
        own.kill()
        end = time.monotonic() + 45 * SLOWNESS
        while not ended(pids) and time.monotonic() < end:
            time.sleep(0.1)
        assert ended(pids)
        told = own.run("status", check=False)
        assert (told.returncode, f"storaged dev {own.directory}" in told.stdout) == (2, True)
        own.start()
        read_back(own, bodies)
    finally:
        own.stop()
