"""A server that is built anew from its issued folder: it answers nothing, and says why, until an operator accepts its
disks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.cluster import Cluster

OBJECTS = 40


def test_a_server_built_anew_takes_no_part_until_its_disks_are_accepted(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "s3")
    try:
        cluster.start()
        s3 = cluster.boto3()
        for number in range(OBJECTS):
            s3.put_object(Bucket="demo", Key=f"key-{number}", Body=b"body %d" % number, IfNoneMatch="*")
        node = cluster.directory / "n1"
        cluster.run("dev", "stop", "n1")
        for path in node.iterdir():
            if path.name not in ("config.toml", "identity"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        cluster.run("dev", "start", "n1")

        def blank() -> list[str]:
            return [problem["detail"] for problem in cluster.status()["problems"] if problem["code"] == "DISK_BLANK"]

        cluster.wait_until(lambda: len(blank()) == 2 and "built anew" in blank()[0], 30, "DISK_BLANK of both disks")
        for number in range(OBJECTS):
            assert s3.get_object(Bucket="demo", Key=f"key-{number}")["Body"].read() == b"body %d" % number
            with pytest.raises(ClientError, match="PreconditionFailed"):
                s3.put_object(Bucket="demo", Key=f"key-{number}", Body=b"again", IfNoneMatch="*")
        for directory in ("d1", "d2"):
            cluster.run("accept-blank", str(node / "config.toml"), str(node / directory))

        def codes() -> set[str]:
            return {problem["code"] for problem in cluster.status()["problems"]}

        # Its audit log went with the server, and its witnesses remember: that alone is still said.
        cluster.wait_until(lambda: codes() == {"AUDIT_REFUSED_BY_WITNESS"}, 90, "a cluster that is whole again")
        assert "disk.accepted" in "".join(path.read_text() for path in (node / "audit").glob("*.jsonl"))
        for number in range(OBJECTS):
            assert s3.get_object(Bucket="demo", Key=f"key-{number}")["Body"].read() == b"body %d" % number
    finally:
        cluster.stop()
