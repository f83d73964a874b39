"""Who owns the gateway's machine, files and key rewrites its audit log: a real cluster notices, and
says which entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.cluster.audit.format import GENESIS, Event, make_line, parse_line
from tests.cluster import Cluster
from tests.s3.test_dev_cluster import problem_codes, round_trip


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(Path(tmp_path_factory.mktemp("attacked")) / "s3")
    try:
        yield found.start()
    finally:
        found.stop()


def test_entries_that_are_erased_with_all_hashes_made_anew_are_noticed(attacked: Cluster) -> None:
    attacked.run("user", "add", "mallory")
    attacked.boto3().create_bucket(Bucket="stolen")
    attacked.boto3().delete_bucket(Bucket="stolen")
    round_trip(attacked, "before")
    audit = attacked.directory / "gateway" / "audit"
    (path,) = audit.iterdir()
    entries = [parse_line(line) for line in path.read_bytes().splitlines()]
    told = {(entry.kind, entry.actor.partition(":")[0], entry.target, entry.outcome) for entry in entries}
    for outcome in ("intent", "done"):
        assert ("user.add", "unix", "user:mallory", outcome) in told
        assert ("bucket.create", "s3", "bucket:stolen", outcome) in told
        assert ("bucket.delete", "s3", "bucket:stolen", outcome) in told
    attacked.run("dev", "stop", "gateway")
    previous, kept = GENESIS, []
    for entry in (parse_line(line) for line in path.read_bytes().splitlines()):
        if entry.kind not in ("user.add", "key.release"):
            event = Event(entry.kind, entry.actor, entry.target, entry.outcome, entry.fields)
            line, previous = make_line(entry.chain, len(kept), entry.time_ms, event, previous, entry.salt)
            kept.append(line)
    path.write_bytes(b"".join(kept))
    attacked.run("dev", "start", "gateway")
    attacked.wait_until(
        lambda: "AUDIT_REFUSED_BY_WITNESS" in problem_codes(attacked.status()),
        60,
        "the witnesses to refuse the rewritten log",
    )
    done = attacked.run("audit", "verify", "--json", str(audit), check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 3
    assert {witness["state"] for witness in found["witnesses"]} == {"differs"}
    assert found["problems"][0]["chain"] == entries[0].chain
    elsewhere = attacked.run("--dir", str(attacked.directory / "n1"), "audit", "verify", str(audit), check=False)
    assert elsewhere.returncode == 3, (
        "a storage node asks the witnesses as well: the gateway's own word on them is worth little"
    )
    round_trip(attacked, "after")
