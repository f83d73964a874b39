"""A second layout over more servers, brought to a cluster that is in use: nothing is lost, and status says what was
refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from storaged.cli import create
from storaged.cluster.issuing import load_authority
from tests.cluster import RACKS, Cluster

OBJECTS = 60


def test_a_layout_over_more_servers_is_refused_named_and_loses_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "s3")
    try:
        cluster.start()
        s3 = cluster.boto3()
        bodies = {f"key-{number}": f"body {number}".encode() * (1 + 400 * (number % 3)) for number in range(OBJECTS)}
        for key, body in bodies.items():
            s3.put_object(Bucket="demo", Key=key, Body=body)

        def all_there() -> None:
            for key, body in bodies.items():
                assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key
            assert s3.list_objects_v2(Bucket="demo")["KeyCount"] == OBJECTS

        authority = load_authority(cluster.directory / "authority")
        plan = create.load_plan(authority.directory)
        for number, rack in ((4, "DE/fra1/a"), (5, "DE/fra2/b"), (6, "DE/ber1/c")):
            plan.nodes.append(
                create.NodePlan(
                    f"n{number}", rack, ("storage",), f"127.0.0.1:{number}", disks=create.new_disks(["d1", "d2"])
                )
            )
        folders = [cluster.directory / name for name in (*RACKS, "gateway")]
        create.sign_layout(authority, create.layout_of(plan), folders)  # as an older release signed it
        for pid in cluster.pids().values():
            os.kill(pid, signal.SIGHUP)

        def refused() -> set[str]:
            return {
                problem["subject"].split("/")[-1]
                for problem in cluster.status()["problems"]
                if problem["code"] == "LAYOUT_REFUSED"
            }

        cluster.wait_until(lambda: refused() == {*RACKS, "gateway"}, 30, "LAYOUT_REFUSED of every node")
        status = cluster.status()
        assert (status["epoch"], status["verdict"]) == (1, "DEGRADED")
        detail = next(problem["detail"] for problem in status["problems"] if problem["code"] == "LAYOUT_REFUSED")
        assert "layout 2, offered by " in detail
        assert "of n4 is new" in detail
        all_there()
        cluster.run("dev", "kill", "n1")
        cluster.run("dev", "start", "n1")
        cluster.wait_until(
            lambda: refused() == {*RACKS, "gateway"}, 30, "LAYOUT_REFUSED of the node that was started again"
        )
        all_there()
        assert "refuses" in cluster.run("explain", "LAYOUT_REFUSED").stdout
    finally:
        cluster.stop()
