"""Lifecycle over the whole cluster: what a rule wants goes, and the operator sees it."""

from __future__ import annotations

import datetime
import json
from typing import Any

from tests.cluster import Cluster

PATIENCE_S = 180.0
"""A gateway looks at rules every 20 s, and compares clocks for 10 s after its start."""


def test_what_a_rule_wants_expires_and_the_operator_sees_it(cluster: Cluster) -> None:
    client = cluster.boto3(attempts=3)
    client.create_bucket(Bucket="expiring")
    for key in ("old/1", "old/2", "new"):
        client.put_object(Bucket="expiring", Key=key, Body=b"x")
    past = datetime.datetime(2015, 1, 1, tzinfo=datetime.UTC)
    rule = {"ID": "past", "Status": "Enabled", "Filter": {"Prefix": "old/"}, "Expiration": {"Date": past}}
    client.put_bucket_lifecycle_configuration(Bucket="expiring", LifecycleConfiguration={"Rules": [rule]})

    def keys() -> list[str]:
        return [found["Key"] for found in client.list_objects_v2(Bucket="expiring").get("Contents", [])]

    cluster.wait_until(lambda: keys() == ["new"], PATIENCE_S, "the objects have expired")

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cluster.run("bucket", "lifecycle", "expiring", "--json").stdout)
        return found

    cluster.wait_until(lambda: seen()["expired"] == 2, PATIENCE_S, "what expired is counted")
    found = seen()
    assert (found["objects_walked"], found["rules"][0]["id"], found["waiting"]) == (2, "past", [])
    assert "2 objects" in cluster.run("bucket", "lifecycle", "expiring").stdout
    (shown,) = [one for one in cluster.status()["lifecycle"] if one["bucket"] == "expiring"]
    assert (shown["expired"], shown["problem"]) == (2, "")
    client.delete_object(Bucket="expiring", Key="new")
    client.delete_bucket(Bucket="expiring")
