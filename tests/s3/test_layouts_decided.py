"""Layouts that move data, on real processes that accept them: decided once, certified, followed by those who come late.

Whatever the movers do meanwhile, what was written stays readable.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from storaged.cli import create
from storaged.cli.succeeding import layouts_after
from storaged.cluster.certificates import accept, verify_certificate
from storaged.cluster.identity import Identity, NodeSigner, load_identity
from storaged.cluster.issuing import Authority, issue, load_authority
from storaged.cluster.layout import Layout, NodeEntry
from storaged.cluster.signed_layout import SignedLayout, sign_layout
from storaged.wire import decode, encode
from tests.cluster import RACKS, STORAGED, Cluster, free_port
from tests.patience import SLOWNESS


class MovingCluster(Cluster):
    @property
    def authority(self) -> Authority:
        return load_authority(self.directory / "authority")

    def held(self, node: str, epoch: int) -> SignedLayout | None:
        """What a node keeps of a layout."""
        path = self.directory / node / "layouts" / f"layout-{epoch:012d}.signed"
        return decode(path.read_bytes(), SignedLayout) if path.exists() else None

    def wait_held(self, epoch: int, *nodes: str) -> None:
        self.wait_until(lambda: all(self.held(node, epoch) for node in nodes), 60, f"layout {epoch} at {nodes}")

    def reload(self, node: str) -> None:
        os.kill(self.pids()[node], signal.SIGHUP)

    def refused(self, node: str) -> list[str]:
        return [
            problem["detail"]
            for problem in self.status()["problems"]
            if problem["code"] == "LAYOUT_REFUSED" and problem["subject"].split("/")[-1] == node
        ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MovingCluster]:
    found = MovingCluster(tmp_path_factory.mktemp("decided") / "s3")
    try:
        found.start()
        yield found
    finally:
        found.stop()


def wanted(cluster: MovingCluster, *names: str) -> tuple[Layout, SignedLayout]:
    """The next layout with further nodes, as another administrator's folder has it."""
    authority = cluster.authority
    plan = create.load_plan(authority.directory)
    last = create.last_signed(authority, plan)
    for number, name in enumerate(names):
        disks = create.new_disks(["/nowhere"])
        plan.nodes.append(create.NodePlan(name, f"DE/fra{number}/{name}", ("storage",), "127.0.0.1:9", disks=disks))
    (layout,) = layouts_after(plan, last)
    return layout, sign_layout(layout, authority.administration)


def test_a_layout_without_a_majority_is_refused_and_named(cluster: MovingCluster, tmp_path: Path) -> None:
    authority = cluster.authority
    layout, signed = wanted(cluster, "n7")
    file = cluster.directory / "n1" / "identity" / "layout.signed"
    before = file.read_bytes()
    nodes = {name: load_identity(cluster.directory / name / "identity") for name in RACKS}
    revoked = issue(authority, tmp_path / "n9", name="n9", location="FR/par1/a", roles=("storage",))

    def certified(*names: Identity, of: SignedLayout = signed) -> SignedLayout:
        return replace(signed, certificate=tuple(accept(NodeSigner(own), of, layout) for own in names))

    other = wanted(cluster, "n8")[1]
    for bad, said in (
        (certified(nodes["n1"]), "accepted by n1 alone"),
        (certified(nodes["n1"], nodes["n2"], of=other), "signature does not hold"),
        (certified(nodes["n1"], revoked), "n9 is no storage node of layout 1"),
    ):
        file.write_bytes(encode(bad))
        cluster.reload("n1")
        cluster.wait_until(lambda: any(said in text for text in cluster.refused("n1")), 30, said)  # noqa: B023
    file.write_bytes(before)
    cluster.reload("n1")
    cluster.wait_until(lambda: not cluster.refused("n1"), 30, "nothing refused")
    assert cluster.status()["epoch"] == 1


def objects() -> dict[str, bytes]:
    return {f"key-{number}": f"body {number}".encode() * (1 + 400 * (number % 3)) for number in range(30)}


def check_all(cluster: MovingCluster) -> None:
    s3 = cluster.boto3(attempts=5)
    for key, body in objects().items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key


def apply(cluster: MovingCluster, file: Path) -> subprocess.CompletedProcess[str]:
    return cluster.run("cluster", "apply", str(file), check=False, timeout_s=120)


@pytest.fixture(scope="module")
def rivals(cluster: MovingCluster) -> list[subprocess.CompletedProcess[str]]:
    """Two administrators add n4 at once, one of them with a gateway more, while n3 is away."""
    for key, body in objects().items():
        cluster.boto3().put_object(Bucket="demo", Key=key, Body=body)
    authority, place = cluster.authority, cluster.directory / "n4"
    cluster.run(
        *("cluster", "issue", str(authority.directory), "n4", "--rack", "DE/fra1/d", "--roles", "storage"),
        *("--address", f"127.0.0.1:{free_port()}", "--state", str(place), "--admin", "none"),
        *("--disk", str(place / "d1"), "--disk", str(place / "d2")),
    )
    cluster.run("cluster", "layout", str(authority.directory))
    mine = create.layout_path(authority, 100)
    layout = create.read_layout(authority, mine)[1]
    more = replace(layout, nodes=(*layout.nodes, NodeEntry("gateway9", "FR/par1/a", "", ("gateway",))))
    other = cluster.directory.parent / "other.signed"
    other.write_bytes(encode(sign_layout(more, authority.administration)))
    cluster.run("dev", "stop", "n3")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda file: apply(cluster, file), (mine, other)))
    cluster.run("dev", "start", "n3")
    return done


def test_of_two_administrators_one_wins_and_the_other_is_refused_by_name(
    cluster: MovingCluster, rivals: list[subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    won = [done for done in rivals if done.returncode == 0]
    lost = [done for done in rivals if done.returncode != 0]
    assert (len(won), len(lost)) == (1, 1), [(done.stdout, done.stderr) for done in rivals]
    assert "accepted by n1, n2" in won[0].stdout
    assert "LAYOUT_OVERTAKEN" in lost[0].stderr
    assert "of n4 is new" in lost[0].stderr
    fetched = tmp_path / "fetched"
    assert "it is in force" in cluster.run("cluster", "fetch", str(fetched)).stdout
    signed, layout = create.read_layout(cluster.authority, fetched)
    first = create.read_layout(cluster.authority, create.layout_path(cluster.authority, 1))[1]
    verify_certificate(signed, layout, first, cluster.authority.certificate)
    check_all(cluster)


def test_nodes_that_were_away_and_new_nodes_learn_the_layout_with_its_certificate(
    cluster: MovingCluster, rivals: list[subprocess.CompletedProcess[str]]
) -> None:
    cluster.wait_held(100, *RACKS, "gateway")
    node = cluster.directory / "authority" / "nodes" / "n4" / "config.toml"
    log = (cluster.directory.parent / "n4.log").open("a")
    process = subprocess.Popen(
        [STORAGED, "run", str(node)], env=cluster.environment(), stdout=log, stderr=log, start_new_session=True
    )
    try:
        cluster.wait_held(100, "n4")
        held = {name: cluster.held(name, 100) for name in (*RACKS, "n4", "gateway")}
        assert len({signed.payload for signed in held.values() if signed is not None}) == 1
        assert all(signed is not None and len(signed.certificate) >= 2 for signed in held.values())

        def disks() -> list[str]:
            nodes = {node["name"]: node for node in cluster.status()["nodes"]}
            return [disk["state"] for disk in nodes["n4"]["disks"]]

        cluster.wait_until(lambda: disks() == ["ok", "ok"], 60, "the disks of n4")
        check_all(cluster)
        cluster.run("dev", "kill", "n1")
        cluster.run("dev", "start", "n1")
        cluster.wait_until(lambda: cluster.status()["epoch"] == 100 and not cluster.refused("n1"), 60, "n1 again")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30 * SLOWNESS)


def test_a_node_whose_copy_of_the_certificate_is_gone_does_not_start(
    cluster: MovingCluster, rivals: list[subprocess.CompletedProcess[str]]
) -> None:
    cluster.run("dev", "stop", "n2")
    path = cluster.directory / "n2" / "layouts" / "layout-000000000100.signed"
    whole = path.read_bytes()
    path.write_bytes(encode(replace(decode(whole, SignedLayout), certificate=())))
    failed = cluster.run("dev", "start", "n2", check=False)
    assert failed.returncode != 0
    assert "has no certificate" in failed.stderr + (cluster.directory / "n2" / "log").read_text()
    path.unlink()
    cluster.run("dev", "start", "n2", check=False)
    assert "which is gone from" in (cluster.directory / "n2" / "log").read_text(), "its ledger knows that it used it"
    path.write_bytes(whole)
    cluster.run("dev", "start", "n2")
