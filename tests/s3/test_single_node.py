"""One process with both roles and six disks is a complete installation: it loses no object and stops no request when a
disk goes.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from benches.servers import Server, storaged_single
from storaged.node.planes import DISK_STATUS_EVERY_S

BODIES = {
    f"{name}-{number}": random.Random(f"{name}{number}").randbytes(size + number)
    for name, size in (("tiny", 100), ("small", 4096), ("middle", 300_000), ("large", 9_000_000))
    for number in range(3)
}
"""A tiny object is in its record, a small one is three whole copies, the others are coded."""


def client_of(server: Server) -> Any:
    import boto3
    from botocore.config import Config

    target = server.target
    return boto3.session.Session().client(
        "s3",
        endpoint_url=target.endpoint,
        region_name=target.region,
        aws_access_key_id=target.access_key,
        aws_secret_access_key=target.secret_key,
        config=Config(retries={"total_max_attempts": 1, "mode": "standard"}, connect_timeout=5, read_timeout=60),
    )


def put_all(client: Any, bucket: str) -> None:
    client.create_bucket(Bucket=bucket)
    for key, body in BODIES.items():
        client.put_object(Bucket=bucket, Key=key, Body=body)


def wrong(client: Any, bucket: str) -> list[str]:
    return [key for key, body in BODIES.items() if client.get_object(Bucket=bucket, Key=key)["Body"].read() != body]


@pytest.mark.timeout(180)
def test_a_single_node_reads_and_writes_on_when_a_disk_goes_while_it_runs_and_after_a_restart_without_it(
    tmp_path: Path,
) -> None:
    with storaged_single(tmp_path) as server:
        client = client_of(server)
        put_all(client, "before")
        assert wrong(client, "before") == []
        assert server.folder is not None
        shutil.rmtree(server.folder / "disk1")
        time.sleep(2 * DISK_STATUS_EVERY_S)  # the node looks at its disks meanwhile
        put_all(client, "while")
        assert [wrong(client, bucket) for bucket in ("before", "while")] == [[], []]
        (pid,) = server.processes.values()
        os.kill(pid, 0)
        assert server.lose is not None
        server.lose()
        put_all(client, "after")
        assert [wrong(client, bucket) for bucket in ("before", "while", "after")] == [[], [], []]
        listed = client.list_objects_v2(Bucket="while")["Contents"]
        assert [entry["Key"] for entry in listed] == sorted(BODIES)
    assert list(tmp_path.iterdir()) == []
